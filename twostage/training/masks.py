"""Where a batch's dropout masks come from.

Without Triton's kernels, from a generator that is seeded anew for each step (and in a frozen trunk
for each window of steps). With them, from counters: the number of a text in the order in which the
epoch draws them, and the position of the token. Then it makes no difference how texts are packed
into batches, windows or padding (`kernels/dropout.py`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.packing import PackedBatch, send
from ..kernels.dropout import DropoutCounters, Randomness
from .state import COUNTER_STREAM, TrainingState, derive_seed


@dataclass(frozen=True)
class Masks:
    """The masks of one step, or of the steps of one window."""

    generator: torch.Generator
    """Seeded for this step or window."""
    key: Tensor | None
    """[1] int64, of the epoch: masks are counted. None: they are drawn from the generator."""
    first_draw: int
    """Texts that the epoch had drawn before this step's or window's."""

    def of_batch(self, batch: PackedBatch, texts_B: np.ndarray | None = None) -> Randomness:
        """For the model. texts_B: which texts of the step or window; None: all, in order."""
        if self.key is None:
            return self.generator
        lengths_B = batch.cu_seqlens.diff()
        numbers_B = np.arange(len(lengths_B)) if texts_B is None else texts_B
        draws_B = send(torch.from_numpy(numbers_B + self.first_draw).int(), self.key.device)
        draws_T = torch.zeros_like(batch.position_ids_T)
        draws_T[: batch.num_tokens] = draws_B.repeat_interleave(
            lengths_B, output_size=batch.num_tokens
        )
        return DropoutCounters(self.key, draws_T, batch.position_ids_T, self.generator)


def seed_masks(
    state: TrainingState,
    stream: int,
    first_step: int,
    first_draw: int,
    generator: torch.Generator,
    impl: str,
) -> Masks:
    """Seeds `generator` for what begins at `first_step`. impl: of the model's operations."""
    generator.manual_seed(derive_seed(stream, state.seed, state.stage, first_step))
    key = None
    if impl == "triton":
        number = derive_seed(COUNTER_STREAM, state.seed, state.stage, state.epoch)
        key = send(torch.tensor([number]), generator.device)
    return Masks(generator, key, first_draw)
