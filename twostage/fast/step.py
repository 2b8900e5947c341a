"""The fast step: the numbers of `training.stage.make_plain_step`, sooner.

Here is what a step does and in which order, on flat weights (`weights.py`). Each other file of this
folder is one saving and one line of `make_step`: without the line, training goes on without the
saving. (The Triton kernels alone need `randomness.py`.) A saving replaces a part of `Step` by a
function of its own.

There is no host sync in a step, so a GPU computes while the host prepares what follows.

Shapes: E tokens of a window, T tokens and B texts of a step, D hidden.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.packing import PackedBatch, pack, send
from ..data.token_store import StageData, TokenStore
from ..kernels.attention import PackedLayout, packed_layout
from ..kernels.cross_entropy import fused_cross_entropy
from ..kernels.dropout import Randomness
from ..training.losses import Loss, cross_entropy, ldam
from ..training.stage import Epochs
from ..training.state import COUNTER_STREAM, DROPOUT_STREAM, TrainingState, derive_seed
from .weights import FlatWeights, clip_divisor, renumber_tokens

if TYPE_CHECKING:
    from .trunk import Features


@contextmanager
def make_step(
    state: TrainingState,
    data: StageData,
    loss_function: Loss,
    epochs: Epochs,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
    graphs: bool = False,
    features: Sequence["Features"] = (),
) -> Iterator["Step"]:
    """The steps of a stage, as `train_stage` asks for them.

    loss_function: with impl `triton`, one that leaves rows with IGNORED_LABEL out, as ours do here.
    impl: how the operations run (`kernels/__init__.py`). graphs: replay CUDA graphs (`graphs.py`).
    features: what the frozen layers make of the data, where it was computed before (`trunk.py`).
    """
    # Imported here, since each of these files imports this one.
    from .fp16 import scale_loss
    from .graphs import replay_graphs
    from .monitor import watch_for_non_finite
    from .randomness import count_masks
    from .trunk import run_frozen_layers_ahead

    store, used_tokens_V = data.store, None
    if state.model.bert.embeddings.word.weight.requires_grad:
        store, used_tokens_V = renumber_tokens(store)
    with FlatWeights(state, dtype, used_tokens_V, impl) as weights:
        fused = fuse(loss_function, impl)
        step = Step(state, StageData(store, data.labels_N), fused, epochs, weights, impl)
        try:
            count_masks(step)
            run_frozen_layers_ahead(step, features)
            replay_graphs(step, graphs)
            watch_for_non_finite(step)  # before the next: a step that it skips is not looked at
            scale_loss(step)
            yield step
        finally:
            step.release()


def fuse(loss_function: Loss, impl: str) -> Loss:
    """Our losses as one operation with its own gradient (`kernels/cross_entropy.py`)."""
    loss = loss_function if isinstance(loss_function, partial) else partial(loss_function)
    if loss.func not in (cross_entropy, ldam):
        return loss_function
    assert not loss.args, "settings of a loss have names"
    return partial(fused_cross_entropy, impl=impl, **loss.keywords)


@dataclass(frozen=True)
class StepInputs:
    """What a step reads besides weights and the optimizer's memory, on the device."""

    input_ids_T: Tensor
    """[T] integer: token ids, or where `hidden_TD` is given rows of `Window.hidden_ED`."""
    position_ids_T: Tensor
    """[T] int32."""
    layout: PackedLayout
    """Where the texts lie on the token axis."""
    labels_B: Tensor
    """[B] int64."""
    randomness: Randomness
    hidden_TD: Tensor | None
    """What `num_lower_layers` made of the tokens; None: they have not been computed."""
    learning_rate: Tensor
    """Scalar fp64."""


@dataclass(frozen=True)
class Window:
    """Consecutive steps of an epoch, and where their texts lie."""

    steps: range
    """Numbers of the steps in the stage."""
    batches: Sequence[np.ndarray]
    """Rows of the store, for each step."""
    store: TokenStore
    hidden_ED: Tensor | None = None
    """Hidden states after the frozen layers, of which the store's ids are row numbers."""


class Place(NamedTuple):
    """Where a step stands in its epoch."""

    epoch: int
    rows_B: np.ndarray
    first_draw: int
    """Texts that the epoch has drawn before it."""


Masks = Callable[[PackedBatch, np.ndarray | None], Randomness]
"""(batch, numbers of its texts among those drawn from a step on; None: all, in order) → its dropout
masks."""


class Step:
    """Takes the steps of a stage: forward, backward, clipping, update.

    The attributes up to `impl` are what a saving reads; those below are what it may replace.
    """

    def __init__(
        self,
        state: TrainingState,
        data: StageData,
        loss_function: Loss,
        epochs: Epochs,
        weights: FlatWeights,
        impl: str,
    ) -> None:
        self.state, self.data = state, data
        self.weights, self.model, self.impl = weights, weights.model, impl
        self.device = state.model.device
        self.places: list[Place] = []
        """Where each step of the stage stands."""
        self.epoch_windows: list[Window] = []
        """All steps of each epoch."""
        for epoch, batches in enumerate(epochs):
            numbers = range(len(self.places), len(self.places) + len(batches))
            self.epoch_windows.append(Window(numbers, batches, data.store))
            draws = np.cumsum([0, *map(len, batches)]).tolist()
            self.places += [Place(epoch, *place) for place in zip(batches, draws, strict=False)]

        self.take: Callable[[np.ndarray, int, float], tuple[Tensor, Tensor]] = self.take_eagerly
        self.find_window: Callable[[int], Window] = self.find_epoch
        """The window that a step is in."""
        self.make_masks: Callable[[int, int], Masks] = self.draw_masks
        """Dropout masks of a stream from a step on."""
        self.loss_function = loss_function
        self.num_lower_layers = len(self.model.bert.layers) - 1
        """Layers that are computed before `Bert.pool`."""
        self.loss_factor = torch.ones((), device=self.device)
        """Multiplies the loss before backward."""
        self.guards: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = []
        """(loss, gradient norm, skip) → skip: whether to leave the update out, scalar bool; with
        `skip` a guard must not note anything."""
        self.checks: list[Callable[[int], None]] = []
        """Called after each step, on the host, with its number."""
        self.skip = torch.zeros((), dtype=torch.bool, device=self.device)
        """Leave all updates out."""
        self.capture_seconds = 0.0
        """Spent on compiling Triton kernels and recording CUDA graphs."""
        self._generator = torch.Generator(self.device)

    def __call__(
        self, rows_B: np.ndarray, number: int, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """Take step `number`, from 0, of the stage: (loss, gradient norm)."""
        assert rows_B is self.places[number].rows_B, "the rows of this step"
        result = self.take(rows_B, number, learning_rate)
        for check in self.checks:
            check(number)
        return result

    def take_eagerly(
        self, rows_B: np.ndarray, number: int, learning_rate: float
    ) -> tuple[Tensor, Tensor]:
        """Bring the inputs to the device, and train on them."""
        return self.train_on(self.read_inputs(rows_B, number, learning_rate))

    def read_inputs(self, rows_B: np.ndarray, number: int, learning_rate: float) -> StepInputs:
        """The inputs of step `number`."""
        window = self.find_window(number)
        rows = torch.from_numpy(window.batches[number - window.steps.start])
        batch, hidden_TD = pack(window.store, rows, self.device), None
        if window.hidden_ED is not None:
            hidden_TD = window.hidden_ED.index_select(0, batch.input_ids_T)
        return StepInputs(
            batch.input_ids_T,
            batch.position_ids_T,
            packed_layout(batch.cu_seqlens, self.device),
            send(torch.from_numpy(self.data.labels_N[rows_B]), self.device),
            self.make_masks(DROPOUT_STREAM, number)(batch, None),
            hidden_TD,
            torch.full((), learning_rate, dtype=torch.float64, device=self.device),
        )

    def train_on(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Forward, backward, clipping, update: all on the device, without a host sync."""
        loss = self.loss_function(self.compute_logits(inputs), inputs.labels_B)
        (loss * self.loss_factor).backward()

        gradients_P = self.weights.take_gradients()
        grad_norm, divisor = clip_divisor(gradients_P, self.loss_factor)
        loss, skip = loss.detach(), self.skip
        for guard in self.guards:
            skip = guard(loss, grad_norm, skip)
        self.weights.update(gradients_P, inputs.learning_rate, divisor, skip)
        return loss, grad_norm

    def compute_logits(self, inputs: StepInputs) -> Tensor:
        """[B, C], from the tokens or from what the lower layers made of them before."""
        bert, layout, randomness = self.model.bert, inputs.layout, inputs.randomness
        hidden_TD, num_layers = inputs.hidden_TD, self.num_lower_layers
        if hidden_TD is None:
            tokens = (inputs.input_ids_T, inputs.position_ids_T)
            hidden_TD = bert(*tokens, layout, num_layers=num_layers, randomness=randomness)
        pooled_BD = bert.pool(hidden_TD, layout, first_layer=num_layers, randomness=randomness)
        logits_BC: Tensor = self.model.classifier(pooled_BD)
        return logits_BC

    def release(self) -> None:
        """Forget everything: the step and its savings refer to each other, and would keep their
        memory until the garbage collector runs."""
        vars(self).clear()

    def find_epoch(self, number: int) -> Window:
        """The window of a step where none is smaller."""
        return self.epoch_windows[self.places[number].epoch]

    def draw_masks(self, stream: int, number: int) -> Masks:
        """Masks from a generator that is seeded for step `number`."""
        return drawn_from(self.seed_generator(stream, number))

    def seed_generator(self, stream: int, number: int) -> torch.Generator:
        """The generator of this stage's steps, seeded for what begins at step `number`."""
        seed = derive_seed(stream, self.state.seed, self.state.stage, number)
        return self._generator.manual_seed(seed)


def drawn_from(generator: torch.Generator) -> Masks:
    """Masks that follow from the generator's state when they are drawn."""
    return lambda batch, texts_B: generator


def epoch_key(seed: int, stage: int, epoch: int, device: torch.device) -> Tensor:
    """[1] int64: the key of counted masks (`kernels/dropout.py`)."""
    return send(torch.tensor([derive_seed(COUNTER_STREAM, seed, stage, epoch)]), device)
