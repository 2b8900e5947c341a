"""What a training step reads: its texts, labels, dropout masks and learning rate, on the device.

Either for one step, brought to the device as the step comes; or for a run of steps at once, which
CUDA graphs then read from the device (`graphs.py`).

Shapes: N texts, E tokens of a run, T tokens and B texts of a step, D hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.packing import TokenStore, pack, send
from ..kernels.attention import PackedLayout
from ..kernels.dropout import Randomness
from .masks import Masks, seed_masks
from .state import DROPOUT_STREAM, TrainingState
from .trunk import FrozenTrunk


@dataclass(frozen=True)
class StepInputs:
    """Everything that a step reads besides weights and the optimizer's state."""

    input_ids_T: Tensor
    """[T] integer."""
    position_ids_T: Tensor
    """[T] int32."""
    layout: PackedLayout
    labels_B: Tensor
    """[B] int64."""
    randomness: Randomness
    hidden_TD: Tensor | None
    """What the frozen layers made of the tokens; None where none are."""
    learning_rate: Tensor
    """Scalar fp64."""


@dataclass(frozen=True)
class Run:
    """Consecutive steps of an epoch."""

    first_step: int
    """Of the stage."""
    batches: Sequence[np.ndarray]
    """Rows of the store, for each step."""
    store: TokenStore
    labels: Sequence[np.ndarray]
    """[B] of each step, in the order of its rows."""
    masks: Masks
    """Counted."""
    hidden_ED: Tensor | None
    """What the ids of the store are rows of, where layers are frozen."""


class Feed:
    """The inputs of the step at which a stage stands."""

    def __init__(
        self,
        state: TrainingState,
        store: TokenStore,
        labels_N: np.ndarray,
        trunk: FrozenTrunk | None,
        learning_rate_at: Callable[[int], float],
        impl: str,
    ) -> None:
        """trunk: of the layers that are frozen. learning_rate_at: by the number of the step."""
        self._state, self._store, self._labels_N = state, store, labels_N
        self._trunk, self._learning_rate_at, self._impl = trunk, learning_rate_at, impl
        self._device = state.model.device
        self._generator = torch.Generator(self._device)
        self.begin_epoch([])

    def begin_epoch(self, batches: Sequence[np.ndarray]) -> None:
        """batches: rows of the store, for each step."""
        self._batches = batches
        self._draws_before = np.cumsum([0, *map(len, batches)])

    def step_inputs(self) -> StepInputs:
        """Of the next step."""
        state, hidden_TD = self._state, None
        rows_B = self._batches[state.batch]
        if self._trunk is None:
            batch = pack(self._store, torch.from_numpy(rows_B), self._device)
        else:
            hidden_TD, batch = self._trunk.take_batch(state, self._batches)
        learning_rate = self._learning_rate_at(state.step)
        return StepInputs(
            batch.input_ids_T,
            batch.position_ids_T,
            batch.layout,
            send(torch.from_numpy(self._labels_N[rows_B]), self._device),
            self._masks_from(state.batch).of_batch(batch),
            hidden_TD,
            torch.full((), learning_rate, dtype=torch.float64, device=self._device),
        )

    def run(self) -> Run:
        """The next step and others around it: those of its epoch, or of its window (`trunk.py`)."""
        state = self._state
        first, rows, store, hidden_ED = 0, self._batches, self._store, None
        if self._trunk is not None:
            window = self._trunk.find_window(state, self._batches)
            first = state.batch - (state.step - window.first_step)
            rows, store = window.batches, window.features.store
            hidden_ED = window.features.hidden_ED
        labels = [self._labels_N[b] for b in self._batches[first : first + len(rows)]]
        first_step = state.step - (state.batch - first)
        return Run(first_step, rows, store, labels, self._masks_from(first), hidden_ED)

    def _masks_from(self, batch: int) -> Masks:
        """Dropout's, from batch number `batch` of the epoch on."""
        state, first_draw = self._state, int(self._draws_before[batch])
        return seed_masks(
            state, DROPOUT_STREAM, state.step, first_draw, self._generator, self._impl
        )
