"""Self-attention over packed sequences.

The encoder keeps all texts of a batch on one token axis without padding. Only the attention product
needs to know where a text begins and ends. This is the plain-PyTorch form: copy queries, keys and
values into a padded [B, L] block, attend there with the padding masked out, and copy the contexts
of the real tokens back.

Shapes: B sequences, T packed tokens (N of them real, the rest filler at the end), L the longest
sequence, R = B·L rows of the padded block, D hidden, H heads, K = D / H head size, F any width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .dropout import dropout


@dataclass(frozen=True)
class PaddedLayout:
    """Where each packed token lies in the padded block: made once a batch, used by each layer."""

    rows_N: Tensor
    """[N] int64: token t of the packed axis is row `rows_N[t]` of the [B·L] padded block."""
    mask_B11L: Tensor
    """[B, 1, 1, L] fp32, added to the scores: 0 at real keys, -inf at padding."""
    batch_size: int
    length: int


def padded_layout(
    cu_seqlens: Tensor, position_ids_T: Tensor, num_tokens: int, max_length: int
) -> PaddedLayout:
    """The padded block for sequences that start at `cu_seqlens` ([B+1], from 0 to N)."""
    lengths_B = cu_seqlens.diff().long()
    batch_size = len(lengths_B)
    device = cu_seqlens.device
    first_row_B = torch.arange(batch_size, device=device) * max_length
    first_row_N = first_row_B.repeat_interleave(lengths_B, output_size=num_tokens)
    padding_BL = torch.arange(max_length, device=device) >= lengths_B[:, None]
    mask_BL = torch.zeros(batch_size, max_length, device=device)
    return PaddedLayout(
        rows_N=first_row_N + position_ids_T[:num_tokens],
        mask_B11L=mask_BL.masked_fill_(padding_BL, float("-inf"))[:, None, None, :],
        batch_size=batch_size,
        length=max_length,
    )


def packed_attention(
    qkv_T3D: Tensor,
    layout: PaddedLayout,
    num_heads: int,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """softmax(Q Kᵀ / √K) V within each sequence, with dropout on the probabilities.

    qkv_T3D: [T, 3·D], queries, keys and values side by side. Returns context_TD: [T, D], zero at
    filler tokens. The softmax is computed in fp32 (fp64 for fp64 input).
    Source: Vaswani et al. 2017, equation 1.
    """
    num_rows = layout.batch_size * layout.length
    head_size = qkv_T3D.shape[1] // (3 * num_heads)
    padded_R3D = _PlaceRows.apply(qkv_T3D, layout.rows_N, num_rows)
    query_BHLK, key_BHLK, value_BHLK = (
        padded_R3D.view(layout.batch_size, layout.length, 3, num_heads, head_size)
        .permute(2, 0, 3, 1, 4)
        .unbind(0)
    )
    scores_BHLL = (query_BHLK * head_size**-0.5) @ key_BHLK.transpose(2, 3)
    softmax_dtype = torch.promote_types(scores_BHLL.dtype, torch.float32)
    masked_BHLL = scores_BHLL.to(softmax_dtype) + layout.mask_B11L.to(softmax_dtype)
    probabilities_BHLL = torch.softmax(masked_BHLL, dim=-1).to(qkv_T3D.dtype)
    kept_BHLL = dropout(probabilities_BHLL, dropout_p, generator)
    context_BLHK = (kept_BHLL @ value_BHLK).transpose(1, 2)
    context_TD: Tensor = _TakeRows.apply(
        context_BLHK.reshape(num_rows, -1), layout.rows_N, len(qkv_T3D)
    )
    return context_TD


# The two copies are each other's backward. They are written out because autograd's own backward of
# `x[rows]` adds into place row by row, which distinct rows do not need.


def _place_rows(x_TF: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Row t of `x_TF` becomes row `rows_N[t]` of a block of zeros; rows beyond N are left out."""
    return x_TF.new_zeros(num_rows, x_TF.shape[1]).index_copy_(0, rows_N, x_TF[: len(rows_N)])


def _take_rows(block_RF: Tensor, rows_N: Tensor, num_tokens: int) -> Tensor:
    """Row `rows_N[t]` of the block becomes row t; filler rows, N to `num_tokens`, are zero."""
    taken_TF = block_RF.new_empty(num_tokens, block_RF.shape[1])
    torch.index_select(block_RF, 0, rows_N, out=taken_TF[: len(rows_N)])
    taken_TF[len(rows_N) :] = 0
    return taken_TF


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.num_tokens = len(x_TF)
        return _place_rows(x_TF, rows_N, num_rows)

    @staticmethod
    def backward(ctx: Any, gradient_RF: Tensor) -> tuple[Tensor, None, None]:
        (rows_N,) = ctx.saved_tensors
        return _take_rows(gradient_RF, rows_N, ctx.num_tokens), None, None


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block_RF: Tensor, rows_N: Tensor, num_tokens: int) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.num_rows = len(block_RF)
        return _take_rows(block_RF, rows_N, num_tokens)

    @staticmethod
    def backward(ctx: Any, gradient_TF: Tensor) -> tuple[Tensor, None, None]:
        (rows_N,) = ctx.saved_tensors
        return _place_rows(gradient_TF, rows_N, ctx.num_rows), None, None
