"""One stage of training: the loop.

Which parameters are trained is set before, by freezing (`two_stage.py`); a frozen parameter takes
part in no backward. Which texts a batch holds is a function of (seed, stage, epoch), and the
dropout masks of a step are a function of (seed, stage, step), those of frozen layers of the step's
window (`trunk.py`): a stage can be left and re-entered between any two steps without changing a
bit of the outcome. (With CUDA graphs, `graphs.py`: no more than a rounding.)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..data.packing import TokenStore, renumber_tokens
from ..data.samplers import epoch_batches
from ..errors import NonFiniteError
from ..kernels.attention import takes_short_texts
from ..progress import progress_bar
from .graphs import StepGraphs
from .inputs import Feed, StepInputs
from .loss_scale import LossScale, make_loss_scale
from .losses import Loss
from .optim import clip_divisor, linear_decay, make_moments, update_weights
from .precision import WorkingCopy
from .state import TrainingState
from .trunk import Features, FrozenTrunk, count_frozen_layers


@dataclass(frozen=True)
class StageData:
    """Tokenised training texts and their classes."""

    store: TokenStore
    labels_N: np.ndarray
    """[N] int64."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def class_counts(self, num_classes: int) -> list[int]:
        """Rows of each class, C of them."""
        counts_C: list[int] = np.bincount(self.labels_N, minlength=num_classes).tolist()
        return counts_C


@dataclass(frozen=True)
class StageSettings:
    """Hyperparameters of one stage."""

    epochs: int
    """Passes over the stage's data."""
    learning_rate: float
    """At the first step."""
    batch_size: int = 16
    """Texts a step."""
    max_grad_norm: float = 1.0
    """L2 norm, over all trained parameters, to which the gradient is clipped."""
    sampler: str = "random"
    """One of `data.samplers.SAMPLERS`."""
    dtype: torch.dtype = torch.float32
    """Precision of forward and backward; the weights that are trained stay fp32."""
    impl: str = "auto"
    """Of the model's operations and the optimizer's; one of `kernels.IMPLS`."""
    graphs: bool = False
    """Replay steps as CUDA graphs (`graphs.py`), with impl `triton`; on a CPU, run them eagerly."""
    schedule_steps: int | None = None
    """Steps until the learning rate reaches 0; None: the stage's own number of steps."""

    def __post_init__(self) -> None:
        assert not self.graphs or self.impl == "triton", "only these kernels' shapes are few"


@dataclass(frozen=True)
class StepReport:
    """What happened since the last report."""

    seed: int
    stage: int
    epoch: int
    step: int
    """Optimizer steps of the stage so far."""
    total_steps: int
    loss: float
    """Mean over the steps since the last report."""
    grad_norm: float
    """Of the last step, before clipping."""
    learning_rate: float
    examples_per_second: float
    capture_seconds: float = 0.0
    """Spent on compiling Triton kernels and recording CUDA graphs so far in this stage."""


REPORT_EVERY = 10
"""Steps between two reports. On a GPU, the only times at which the host waits for the device."""


def train_stage(
    state: TrainingState,
    data: StageData,
    loss_function: Loss,
    settings: StageSettings,
    *,
    features: Sequence[Features] = (),
    on_report: Callable[[StepReport], None] | None = None,
    show_progress: bool = False,
) -> None:
    """Train `state.model` from where `state` stands to the end of the stage, in place.

    The model is up to date when this returns or raises; on the way its word embeddings are not.
    features: of all texts of `data` after the layers that are frozen, for each epoch or, if it is
    only one, for all; none: computed as they are needed, with dropout (`trunk.py`).
    Raises NonFiniteError, naming the step and its rows, when a loss or gradient is not finite;
    `state` then stands before that step.
    """
    model, device = state.model, state.model.device
    lengths_N = data.store.lengths.numpy()

    order = (state.seed, state.stage)
    epochs = [
        epoch_batches(settings.sampler, data.labels_N, lengths_N, settings.batch_size, order, epoch)
        for epoch in range(settings.epochs)
    ]
    # Counted, not computed: epochs of the token-budget sampler differ by a batch or two.
    total_steps = sum(map(len, epochs))
    schedule_steps = settings.schedule_steps or total_steps
    monitor = Monitor(state, total_steps, device)

    def learning_rate_at(step: int) -> float:
        return settings.learning_rate * linear_decay(step, schedule_steps)

    store, used_tokens_V = data.store, None
    if model.bert.embeddings.word.weight.requires_grad:
        store, used_tokens_V = renumber_tokens(store)
    num_frozen = count_frozen_layers(model)
    title = f"seed {state.seed}, stage {state.stage}"
    with (
        WorkingCopy(model, settings.dtype, used_tokens_V, settings.impl) as work,
        progress_bar(title, total_steps, "step", show_progress) as bar,
    ):
        moments = state.moments = state.moments or make_moments(work.weights_P)
        scale = state.loss_scale = state.loss_scale or make_loss_scale(settings.dtype, device)
        trunk = None
        if num_frozen:
            trunk = FrozenTrunk(work.model, store, num_frozen, features, settings.impl)
        feed = Feed(state, store, data.labels_N, trunk, learning_rate_at, settings.impl)

        def take_step(
            inputs: StepInputs, monitor: Monitor = monitor, scale: LossScale = scale
        ) -> None:
            """Forward, backward, clipping, update: all on the device, and the host never waits."""
            if inputs.hidden_TD is None:
                logits_BC = work.model(
                    inputs.input_ids_T,
                    inputs.position_ids_T,
                    inputs.layout.cu_seqlens,
                    layout=inputs.layout,
                    randomness=inputs.randomness,
                )
            else:
                logits_BC = work.model.classify(
                    inputs.hidden_TD, inputs.layout, num_frozen, inputs.randomness
                )
            loss = loss_function(logits_BC, inputs.labels_B)
            (loss * scale.factor).backward()

            gradients_P = work.take_gradients()
            grad_norm, divisor = clip_divisor(gradients_P, settings.max_grad_norm, scale.factor)
            skip = monitor.watch(loss, grad_norm, scale.update(grad_norm))
            rate, impl = inputs.learning_rate, settings.impl
            update_weights(work, gradients_P, moments, rate, divisor, skip, impl)

        graphs, head_size = None, model.bert.config.head_size
        if settings.impl == "triton" and takes_short_texts(head_size, settings.dtype, device):
            graphs = StepGraphs(take_step, chain(*epochs), lengths_N, learning_rate_at, device)
            spare, unused_scale = Monitor(state, 0, device), make_loss_scale(settings.dtype, device)
            spare.bad.fill_(1.0)  # with it a step changes neither weights nor moments
            no_trace = partial(take_step, monitor=spare, scale=unused_scale)
            hidden_DD = work.model.bert.pooler.weight.detach() if num_frozen else None
            graphs.compile(no_trace, hidden_DD)
        assert graphs is not None or not settings.graphs, "the recipe has checked it"

        bar.update(state.step)
        while state.epoch < settings.epochs:
            batches = epochs[state.epoch]
            feed.begin_epoch(batches)
            while state.batch < len(batches):
                rows_B = batches[state.batch]
                bucket = graphs.find_bucket(rows_B) if graphs and settings.graphs else None
                if graphs is None or bucket is None:
                    take_step(feed.step_inputs())
                else:
                    graphs.replay(bucket, state.step, feed.run)

                learning_rate = learning_rate_at(state.step)
                state.batch += 1
                state.step += 1
                bar.update(1)
                bad_step = monitor.find_bad_step()
                if bad_step is not None:
                    _return_to(state, bad_step, epochs)
                    rows = epochs[state.epoch][state.batch]
                    raise NonFiniteError(_describe_bad_step(state, rows))
                report = monitor.report(len(rows_B), learning_rate)
                if report is not None:
                    if graphs is not None:
                        report = replace(report, capture_seconds=graphs.capture_seconds)
                    bar.set_postfix_str(
                        f"loss {report.loss:.4f}, {report.examples_per_second:.0f} examples/s"
                    )
                    if on_report is not None:
                        on_report(report)
            state.epoch, state.batch = state.epoch + 1, 0


class Monitor:
    """Loss, gradient norm and speed since the last report, and whether all was finite.

    A step with a non-finite loss or gradient must not reach the weights, but if the host looked at
    every step it would wait for the device at every step. So the finding stays on the device, as a
    flag that turns this and all later steps of the optimizer into nothing, and the host reads it
    at the next report (on the CPU, where nothing waits, at once). A gradient that overflows while
    the loss scale can still fall is no such finding: that step alone is left out.
    """

    def __init__(self, state: TrainingState, total_steps: int, device: torch.device) -> None:
        self.state = state
        self.total_steps = total_steps
        self.check_every = 1 if device.type == "cpu" else REPORT_EVERY
        self.bad = torch.zeros((), device=device)
        # Counts up to the first bad step, whose number it then is.
        self.finite_steps = torch.full((), float(state.step), device=device)
        self.loss_sum = torch.zeros((), device=device)
        self.grad_norm = torch.zeros((), device=device)
        self.steps = self.examples = 0
        self.began = perf_counter()

    def watch(self, loss: Tensor, grad_norm: Tensor, hopeless: Tensor) -> Tensor:
        """Call before the optimizer's step; returns 1.0 when it must not happen, else 0.0.

        hopeless: of `LossScale.update`.
        """
        # In place: a CUDA graph adds to the same memory at every replay.
        loss = loss.detach()
        self.loss_sum += loss
        self.grad_norm.copy_(grad_norm)
        is_bad = torch.maximum(hopeless, (~torch.isfinite(loss)).float())
        torch.maximum(self.bad, is_bad, out=self.bad)
        self.finite_steps += 1.0 - self.bad
        return torch.maximum(self.bad, (~torch.isfinite(grad_norm)).float())

    def find_bad_step(self) -> int | None:
        """The first step, from 0, that was not finite; None also while it is too early to look."""
        due = self.state.step % self.check_every == 0 or self.state.step == self.total_steps
        # Deliberate wait for the device, once in `check_every` steps.
        return int(self.finite_steps) if due and bool(self.bad) else None

    def report(self, num_examples: int, learning_rate: float) -> StepReport | None:
        """Count a step; a report when one is due. Reading the loss waits for the device."""
        self.steps += 1
        self.examples += num_examples
        state = self.state
        if state.step % REPORT_EVERY and state.step != self.total_steps:
            return None
        loss = float(self.loss_sum) / self.steps
        seconds = max(1e-9, perf_counter() - self.began)
        report = StepReport(
            seed=state.seed,
            stage=state.stage,
            epoch=state.epoch,
            step=state.step,
            total_steps=self.total_steps,
            loss=loss,
            grad_norm=float(self.grad_norm),
            learning_rate=learning_rate,
            examples_per_second=self.examples / seconds,
        )
        self.loss_sum.zero_()
        self.steps = self.examples = 0
        self.began = perf_counter()
        return report


def _return_to(state: TrainingState, step: int, batches: list[list[np.ndarray]]) -> None:
    """Set the counters back to `step`: no step since then has changed weights or optimizer."""
    state.step, state.epoch, state.batch = step, 0, step
    while state.batch >= len(batches[state.epoch]):
        state.batch -= len(batches[state.epoch])
        state.epoch += 1


def _describe_bad_step(state: TrainingState, rows: np.ndarray) -> str:
    shown = ", ".join(map(str, rows[:16])) + (", …" if len(rows) > 16 else "")
    return (
        f"seed {state.seed}, stage {state.stage}, step {state.step + 1}: the loss or the gradient "
        f"is not finite (rows {shown} of the stage's data, from 0); training stopped before that "
        "step changed the weights: try a lower learning rate or fp32 precision"
    )
