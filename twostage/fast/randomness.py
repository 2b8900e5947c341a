"""Dropout masks that are counted instead of stored.

With Triton's kernels a mask is a function of where an element stands in training: the number of its
text in the order in which the epoch draws them, its position, its feature (`kernels/dropout.py`).
What is saved: no mask is drawn before, written to memory and kept for backward; the kernels compute
it where they need it, twice. The masks are others than the plain step's, of the same distribution;
they are the same however texts are packed into batches, windows or padding. What it gives has not
been measured on a GPU.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data.packing import PackedBatch, send
from ..kernels.dropout import DropoutCounters
from .step import Masks, Step, epoch_key


def count_masks(step: Step) -> None:
    """Count the masks where the kernels can: with impl `triton`."""
    if step.impl == "triton":
        step.make_masks = partial(counted_masks, step)


def counted_masks(step: Step, stream: int, number: int) -> Masks:
    """Masks of the texts that are drawn from step `number` on; none has two in an epoch."""
    place = step.places[number]
    key = epoch_key(step.state.seed, step.state.stage, place.epoch, step.device)
    generator = step.seed_generator(stream, number)
    return partial(counters_of, key, generator, place.first_draw)


def counters_of(
    key: Tensor,
    generator: torch.Generator,
    first_draw: int,
    batch: PackedBatch,
    texts_B: np.ndarray | None,
) -> DropoutCounters:
    """The counters of a batch. first_draw: number of text 0 in the epoch. texts_B: see `Masks`."""
    lengths_B = batch.cu_seqlens.diff()
    numbers_B = np.arange(len(lengths_B)) if texts_B is None else texts_B
    draws_B = send(torch.from_numpy(numbers_B + first_draw).int(), key.device)
    draws_T = torch.zeros_like(batch.position_ids_T)
    draws_T[: batch.num_tokens] = draws_B.repeat_interleave(
        send(lengths_B, key.device), output_size=batch.num_tokens
    )
    return DropoutCounters(key, draws_T, batch.position_ids_T, generator)
