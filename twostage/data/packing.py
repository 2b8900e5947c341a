"""The ragged token store, and batches cut from it.

A data set is tokenised once, into one flat array of ids and the offsets between texts. A batch is a
slice of it: the ids of its texts end to end, with `cu_seqlens` marking the boundaries. The token
count is rounded up to a multiple of 64 with filler tokens that nobody reads: matrix libraries
prepare a kernel for each new shape, and an epoch of random batches would otherwise meet a new
token count at almost every step.

Shapes: N texts, B texts of a batch, T tokens of a batch with filler.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUND_TOKENS_TO = 64


@dataclass(frozen=True)
class TokenStore:
    """Token ids of N texts, end to end."""

    ids: Tensor
    """[total tokens] int32."""
    offsets: Tensor
    """[N+1] int64: text i is `ids[offsets[i] : offsets[i+1]]`."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """[N] int64, tokens of each text."""
        return self.offsets.diff()


@dataclass(frozen=True)
class PackedBatch:
    """The texts of one batch on a single token axis."""

    input_ids_T: Tensor
    """[T] int32; filler is 0."""
    position_ids_T: Tensor
    """[T] int32, from 0 in each text; filler is 0."""
    cu_seqlens: Tensor
    """[B+1] int32, from 0 to `num_tokens`."""
    num_tokens: int
    """Real tokens, without filler."""
    max_length: int
    """Tokens of the longest text."""
    labels_B: Tensor
    """[B] int64; empty in a batch that is not for training."""

    def inputs(self) -> dict[str, Any]:
        """The batch as keyword arguments of `BertClassifier.forward`."""
        return {
            "input_ids_T": self.input_ids_T,
            "position_ids_T": self.position_ids_T,
            "cu_seqlens": self.cu_seqlens,
            "num_tokens": self.num_tokens,
            "max_length": self.max_length,
        }

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on `device`, copied without waiting where the device allows it."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor) -> Tensor:
            return tensor.pin_memory().to(device, non_blocking=True)

        return PackedBatch(
            move(self.input_ids_T),
            move(self.position_ids_T),
            move(self.cu_seqlens),
            self.num_tokens,
            self.max_length,
            move(self.labels_B),
        )


def pack(
    store: TokenStore,
    rows_B: Tensor,
    labels_N: Tensor | None = None,
    *,
    round_to: int = ROUND_TOKENS_TO,
) -> PackedBatch:
    """The texts `rows_B` ([B] int64, B ≥ 1) of the store, in that order, as one batch."""
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
    labels_B = rows_B.new_empty(0) if labels_N is None else labels_N[rows_B]
    max_length = int(lengths_B.max())
    return PackedBatch(input_ids_T, position_ids_T, cu_seqlens, num_tokens, max_length, labels_B)
