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

from ..kernels.attention import PackedLayout

ROUND_TOKENS_TO = 64
CPU = torch.device("cpu")


@dataclass(frozen=True)
class TokenStore:
    """Token ids of N texts, end to end."""

    ids: Tensor
    """[total tokens] int32."""
    offsets: Tensor
    """[N+1] int64: text i is `ids[offsets[i] : offsets[i+1]]`."""
    num_cut: int = 0
    """Texts that had more tokens than were kept."""

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
    layout: PackedLayout
    """Where the texts lie."""

    @property
    def cu_seqlens(self) -> Tensor:
        """[B+1] int32, from 0 to `num_tokens`."""
        return self.layout.cu_seqlens

    @property
    def num_tokens(self) -> int:
        """Real tokens, without filler."""
        return self.layout.num_real_tokens

    def inputs(self) -> dict[str, Any]:
        """The batch as keyword arguments of `BertClassifier.forward`."""
        return {
            "input_ids_T": self.input_ids_T,
            "position_ids_T": self.position_ids_T,
            "cu_seqlens": self.cu_seqlens,
            "layout": self.layout,
        }


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; on a GPU the host does not wait."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(
    store: TokenStore,
    rows_B: Tensor,
    device: torch.device = CPU,
    *,
    round_to: int = ROUND_TOKENS_TO,
) -> PackedBatch:
    """The texts `rows_B` ([B] int64, B ≥ 1) of the store, in that order, as one batch on `device`.

    A GPU's copies are not waited for.
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
    on_device = send(cu_seqlens, device)
    return PackedBatch(
        send(input_ids_T, device),
        send(position_ids_T, device),
        PackedLayout(on_device, on_device[:-1].long(), int(lengths_B.max()), cu_seqlens),
    )


def renumber_tokens(store: TokenStore) -> tuple[TokenStore, Tensor]:
    """(the store with its tokens renumbered from 0, used_tokens_V: which they are).

    Token i of the new store is token `used_tokens_V[i]` of the old one, [V'] integer, ascending.
    """
    used_tokens_V, ids = torch.unique(store.ids, return_inverse=True)
    return TokenStore(ids.int(), store.offsets), used_tokens_V
