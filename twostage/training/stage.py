"""One stage of training: the step and the loop.

A batch's texts follow from (seed, stage, epoch), a step's dropout masks from (seed, stage, step): a
stage can be left and re-entered between any two steps without changing a bit.

Mixed precision: the model's weights are fp32. Each step rounds them to `dtype` for forward and
backward; the gradients come back to the fp32 weights, and AdamW moves these, so that an update
below the spacing of bf16 (1/256 to 1/128 of a weight) is not lost. The loss, softmax and layer
norm's statistics are fp32. For fp16, whose least number is 6e-8, the loss is multiplied before
backward and the gradients are divided after it.

The step here is the specification. `fast/` has one that computes the same numbers sooner.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from ..data.packing import pack, send
from ..data.samplers import epoch_batches
from ..data.token_store import StageData
from ..errors import NonFiniteError, UsageError
from ..model.bert import stays_fp32
from ..progress import StepReport, progress_bar
from .losses import Loss
from .optim import adamw_, clip_gradients, linear_decay
from .state import DROPOUT_STREAM, TrainingState, derive_seed

REPORT_EVERY = 10
"""Steps between two reports: on a GPU, the only host syncs of the loop with the fast step."""

TakeStep = Callable[[np.ndarray, int, float], tuple[Tensor, Tensor]]
"""(rows_B of the data, step from 0, learning rate) → (loss, gradient norm before clipping)."""
Epochs = Sequence[Sequence[np.ndarray]]
"""The rows of each batch of each epoch."""
MakeStep = Callable[
    [TrainingState, StageData, Loss, Epochs, torch.dtype], AbstractContextManager[TakeStep]
]
"""Prepares the steps of a stage (a fast one looks ahead in `Epochs`). The model is up to date when
the `with` block is left."""


@dataclass(frozen=True)
class StageSettings:
    """Hyperparameters of one stage."""

    epochs: int
    """Passes over the stage's data."""
    learning_rate: float
    """The learning rate of the first step."""
    batch_size: int = 16
    """Texts a step."""
    sampler: str = "random"
    """One of `data.samplers.SAMPLERS`."""
    schedule_steps: int | None = None
    """Steps until the learning rate reaches 0; None: the stage's own number of steps."""


@contextmanager
def make_plain_step(
    state: TrainingState, data: StageData, loss_function: Loss, epochs: Epochs, dtype: torch.dtype
) -> Iterator[TakeStep]:
    """The step as it is defined; forward and backward compute in `dtype`."""
    model, generator = state.model, torch.Generator(state.model.device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    loss_factor = 1_024.0 if dtype == torch.float16 else 1.0
    if "exp_avg_P" in state.optimizer:
        raise UsageError("the stage was begun by the fast step; go on with engine 'fast'")
    state.optimizer = state.optimizer or {
        f"{moment}.{name}": torch.zeros_like(weight)
        for moment in ("exp_avg", "exp_avg_sq")
        for name, weight in trained.items()
    }

    def take_step(rows_B: np.ndarray, step: int, learning_rate: float) -> tuple[Tensor, Tensor]:
        batch = pack(data.store, torch.from_numpy(rows_B), model.device)
        labels_B = send(torch.from_numpy(data.labels_N[rows_B]), model.device)
        generator.manual_seed(derive_seed(DROPOUT_STREAM, state.seed, state.stage, step))

        rounded = {
            name: weight if stays_fp32(name, weight.device) else weight.to(dtype)
            for name, weight in model.named_parameters()
        }
        # model(*batch, generator), with the rounded weights in place of its own
        logits_BC = functional_call(model, rounded, (*batch, generator))
        loss = loss_function(logits_BC, labels_B)
        scaled = torch.autograd.grad(loss * loss_factor, list(trained.values()))
        gradients, norm = clip_gradients([gradient / loss_factor for gradient in scaled])
        if not torch.isfinite(loss + norm):  # a host sync
            raise non_finite_error(state, rows_B)

        for (name, weight), gradient in zip(trained.items(), gradients, strict=True):
            moments = state.optimizer[f"exp_avg.{name}"], state.optimizer[f"exp_avg_sq.{name}"]
            adamw_(weight, gradient, *moments, step + 1, learning_rate)
        return loss.detach(), norm

    yield take_step


def train_stage(
    state: TrainingState,
    data: StageData,
    loss_function: Loss,
    settings: StageSettings,
    *,
    dtype: torch.dtype = torch.float32,
    make_step: MakeStep = make_plain_step,
    on_report: Callable[[StepReport], None] | None = None,
    show_progress: bool = False,
) -> None:
    """Train `state.model` from where `state` stands to the end of the stage, in place.

    Forward and backward compute in `dtype`. The model is up to date when this returns or raises.
    Raises NonFiniteError, naming the step and its rows, when a loss or gradient is not finite;
    `state` then stands before that step.
    """
    lengths_N, seed = data.store.lengths.numpy(), (state.seed, state.stage)
    epochs = [
        epoch_batches(settings.sampler, data.labels_N, lengths_N, settings.batch_size, seed, epoch)
        for epoch in range(settings.epochs)
    ]
    steps = [(epoch, rows_B) for epoch, batches in enumerate(epochs) for rows_B in batches]
    title = f"seed {state.seed}, stage {state.stage}"
    with (
        make_step(state, data, loss_function, epochs, dtype) as take_step,
        progress_bar(title, len(steps), "step", show_progress, initial=state.step) as bar,
    ):
        loss_sum = torch.zeros((), device=state.model.device)
        since, began = state.step, perf_counter()
        for step in range(state.step, len(steps)):
            epoch, rows_B = steps[step]
            decay = linear_decay(step, settings.schedule_steps or len(steps))
            learning_rate = settings.learning_rate * decay
            loss, grad_norm = take_step(rows_B, step, learning_rate)
            state.step = step + 1
            loss_sum += loss
            bar.update(1)
            if state.step % REPORT_EVERY == 0 or state.step == len(steps):
                num_examples = sum(len(rows) for _, rows in steps[since : state.step])
                report = StepReport(
                    seed=state.seed,
                    stage=state.stage,
                    epoch=epoch,
                    step=state.step,
                    total_steps=len(steps),
                    loss=float(loss_sum) / (state.step - since),  # host syncs: here and below
                    grad_norm=float(grad_norm),
                    learning_rate=learning_rate,
                    examples_per_second=num_examples / max(1e-9, perf_counter() - began),
                )
                bar.set_postfix_str(str(report))
                if on_report is not None:
                    on_report(report)
                loss_sum.zero_()
                since, began = state.step, perf_counter()


def non_finite_error(state: TrainingState, rows_B: np.ndarray) -> NonFiniteError:
    """The error of the step at which `state` stands, with these rows."""
    shown = ", ".join(map(str, rows_B[:16])) + (", …" if len(rows_B) > 16 else "")
    return NonFiniteError(
        f"seed {state.seed}, stage {state.stage}, step {state.step + 1}: the loss or the gradient "
        f"is not finite (rows {shown} of the stage's data, from 0); training stopped before that "
        "step changed the weights: try a lower learning rate or fp32 precision"
    )
