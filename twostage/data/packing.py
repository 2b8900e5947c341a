"""Batches without padding, cut from the token store.

A batch is the ids of its texts end to end, with `cu_seqlens` marking the boundaries. The token
count is rounded up to a multiple of 64 with filler tokens, which belong to no text: matrix
libraries prepare a kernel for each new shape, and an epoch of random batches would otherwise meet a
new token count at almost every step.

Shapes: B texts of a batch, T tokens of a batch with filler.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .token_store import TokenStore

ROUND_TOKENS_TO = 64
CPU = torch.device("cpu")


class PackedBatch(NamedTuple):
    """The texts of one batch on a single token axis: what `BertClassifier` takes."""

    input_ids_T: Tensor
    """[T] int32; filler is 0."""
    position_ids_T: Tensor
    """[T] int32, from 0 in each text; filler is 0."""
    cu_seqlens: Tensor
    """[B+1] int32, on the CPU: text b is tokens `cu_seqlens[b]` to `cu_seqlens[b + 1]`."""

    @property
    def num_tokens(self) -> int:
        """Real tokens, without filler."""
        return int(self.cu_seqlens[-1])


def pack(
    store: TokenStore,
    rows_B: Tensor,
    device: torch.device = CPU,
    *,
    round_to: int = ROUND_TOKENS_TO,
) -> PackedBatch:
    """The texts `rows_B` ([B] int64, B ≥ 1) of the store, in that order, as one batch on `device`.

    No host sync.
    """
    starts_B = store.offsets[rows_B]
    lengths_B = store.offsets[rows_B + 1] - starts_B
    cu_seqlens = torch.zeros(len(rows_B) + 1, dtype=torch.int32)
    torch.cumsum(lengths_B, 0, dtype=torch.int32, out=cu_seqlens[1:])
    num_tokens = int(cu_seqlens[-1])
    size = -(-num_tokens // round_to) * round_to

    position_ids_T = torch.zeros(size, dtype=torch.int32)
    input_ids_T = torch.zeros(size, dtype=torch.int32)
    # Token t of text b is at starts_b + (t - cu_seqlens_b) in the store.
    tokens = torch.arange(num_tokens)
    position_ids_T[:num_tokens] = tokens - cu_seqlens[:-1].repeat_interleave(lengths_B)
    shift_B = starts_B - cu_seqlens[:-1]
    input_ids_T[:num_tokens] = store.ids[tokens + shift_B.repeat_interleave(lengths_B)]
    return PackedBatch(send(input_ids_T, device), send(position_ids_T, device), cu_seqlens)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without a host sync."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
