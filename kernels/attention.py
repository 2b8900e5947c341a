"""Self-attention over packed sequences.

The encoder keeps all texts of a batch on one token axis without padding. Only the attention product
needs to know where a text begins and ends. This is the plain-PyTorch form: copy queries, keys and
values into padded [B, H, L, K] blocks, attend there with the padding masked out, and copy the
contexts of the real tokens back.

    S = Q Kᵀ / √K + mask        P = softmax(S)        P' = P ⊙ kept / (1 − p)        C = P' V

Backward, from dC (⊙ is elementwise; Σ runs over keys, along a row of P):

    dV = P'ᵀ dC      dP = dC Vᵀ ⊙ kept / (1 − p)      dS = P ⊙ (dP − Σ P ⊙ dP)
    dQ = dS K / √K   dK = dSᵀ Q / √K

It is written out because autograd keeps and passes over twice as many [B, H, L, L] tensors: here
only P and the mask outlive the forward pass, and every factor 1/(1 − p) and 1/√K is applied on the
smaller side of its product.

Shapes: B sequences, T packed tokens (N of them real, the rest filler at the end), L the padded
length, R = B·L rows of a padded block, D hidden, H heads, K = D / H head size, M queries of a
sequence (L of them, or 1), P projections in a row (queries, keys, values).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dropout import dropout, dropout_mask

ROUND_LENGTH_TO = 16
"""Matrix libraries make a kernel for each new shape, and vector code likes whole registers: fewer
and rounder lengths are worth a little more padding."""


@dataclass(frozen=True)
class PackedLayout:
    """Where each packed token lies in a padded block: made once a batch, used by each layer."""

    starts_B: Tensor
    """[B] integer: the first token of each sequence on the packed axis."""
    rows_N: Tensor
    """[N] int64: token t of the packed axis is row `rows_N[t]` of the [B·L] padded block."""
    tokens_R: Tensor
    """[R] int64, the way back: row r of the block is token `tokens_R[r]`; token 0 at padding."""
    mask_B11L: Tensor
    """[B, 1, 1, L] fp32, added to the scores: 0 at real keys, -inf at padding."""
    length: int
    """L."""


def packed_layout(
    cu_seqlens: Tensor,
    position_ids_T: Tensor,
    num_tokens: int | None = None,
    max_length: int | None = None,
) -> PackedLayout:
    """The padded block for sequences that start at `cu_seqlens` ([B+1], from 0 to N).

    num_tokens, max_length: N and the longest sequence; None reads them from `cu_seqlens`, which on
    a GPU waits for the device.
    """
    if num_tokens is None:
        num_tokens = int(cu_seqlens[-1])
    if max_length is None:
        max_length = int(cu_seqlens.diff().max())
    lengths_B = cu_seqlens.diff().long()
    batch_size = len(lengths_B)
    device = cu_seqlens.device
    length = -(-max_length // ROUND_LENGTH_TO) * ROUND_LENGTH_TO
    first_row_B = torch.arange(batch_size, device=device) * length
    first_row_N = first_row_B.repeat_interleave(lengths_B, output_size=num_tokens)
    rows_N = first_row_N + position_ids_T[:num_tokens]
    tokens_R = torch.zeros(batch_size * length, dtype=torch.int64, device=device)
    tokens_R[rows_N] = torch.arange(num_tokens, device=device)
    padding_BL = torch.arange(length, device=device) >= lengths_B[:, None]
    mask_BL = torch.zeros(batch_size, length, device=device)
    return PackedLayout(
        starts_B=cu_seqlens[:-1],
        rows_N=rows_N,
        tokens_R=tokens_R,
        mask_B11L=mask_BL.masked_fill_(padding_BL, float("-inf"))[:, None, None, :],
        length=length,
    )


def packed_attention(
    qkv_T3D: Tensor,
    layout: PackedLayout,
    num_heads: int,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """softmax(Q Kᵀ / √K) V within each sequence, with dropout on the probabilities.

    qkv_T3D: [T, 3·D], queries, keys and values side by side. Returns context_TD: [T, D], zero at
    filler tokens. The softmax is computed in fp32 (fp64 for fp64 input).
    Source: Vaswani et al. 2017, equation 1.
    """
    query_BHLK, key_BHLK, value_BHLK = _Pad.apply(qkv_T3D, layout, 3, num_heads)
    context_BHLK = attend(
        query_BHLK, key_BHLK, value_BHLK, layout.mask_B11L, dropout_p, generator
    )
    context_TD: Tensor = _Unpad.apply(context_BHLK, layout, len(qkv_T3D))
    return context_TD


def first_token_attention(
    query_BD: Tensor,
    key_value_T2D: Tensor,
    layout: PackedLayout,
    num_heads: int,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`packed_attention` of each sequence's first token alone: context_BD, [B, D].

    query_BD: [B, D], of the first tokens. key_value_T2D: [T, 2·D], keys and values side by side.
    """
    batch_size, hidden_size = query_BD.shape
    key_BHLK, value_BHLK = _Pad.apply(key_value_T2D, layout, 2, num_heads)
    query_BH1K = query_BD.view(batch_size, num_heads, 1, hidden_size // num_heads)
    context_BH1K = attend(
        query_BH1K, key_BHLK, value_BHLK, layout.mask_B11L, dropout_p, generator
    )
    return context_BH1K.view(batch_size, hidden_size)


def attend(
    query_BHMK: Tensor,
    key_BHLK: Tensor,
    value_BHLK: Tensor,
    mask_B11L: Tensor,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The product on padded blocks, [B, H, M, K]; `mask_B11L` is added to the scores."""
    context_BHMK: Tensor = _Attend.apply(
        query_BHMK, key_BHLK, value_BHLK, mask_B11L, dropout_p, generator
    )
    return context_BHMK


def reference_attend(
    query_BHMK: Tensor,
    key_BHLK: Tensor,
    value_BHLK: Tensor,
    mask_B11L: Tensor,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same function, written as the formula and differentiated by autograd."""
    scores_BHML = (query_BHMK @ key_BHLK.transpose(2, 3)).to(_softmax_dtype(query_BHMK))
    scores_BHML = scores_BHML * query_BHMK.shape[-1] ** -0.5 + mask_B11L
    probabilities_BHML = torch.softmax(scores_BHML, dim=-1).to(value_BHLK.dtype)
    return dropout(probabilities_BHML, dropout_p, generator) @ value_BHLK


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BHMK: Tensor,
        key_BHLK: Tensor,
        value_BHLK: Tensor,
        mask_B11L: Tensor,
        dropout_p: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        scores_BHML = (query_BHMK @ key_BHLK.transpose(2, 3)).to(_softmax_dtype(query_BHMK))
        root = query_BHMK.shape[-1] ** -0.5
        torch.add(mask_B11L, scores_BHML, alpha=root, out=scores_BHML)
        probabilities_BHML = torch.softmax(scores_BHML, dim=-1).to(query_BHMK.dtype)
        if generator is None or dropout_p == 0.0:
            kept_BHML, scale, dropped_BHML = None, 1.0, probabilities_BHML
        else:
            kept_BHML, scale = dropout_mask(
                probabilities_BHML.shape, dropout_p, generator, query_BHMK.dtype
            )
            dropped_BHML = probabilities_BHML * kept_BHML
        context_BHMK = dropped_BHML @ value_BHLK
        ctx.save_for_backward(query_BHMK, key_BHLK, value_BHLK, probabilities_BHML, kept_BHML)
        ctx.scale, ctx.root = scale, root
        return context_BHMK.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_BHMK: Tensor) -> tuple[Tensor | None, ...]:
        query_BHMK, key_BHLK, value_BHLK, probabilities_BHML, kept_BHML = ctx.saved_tensors
        upstream_BHMK = upstream_BHMK * ctx.scale
        dprobabilities_BHML = upstream_BHMK @ value_BHLK.transpose(2, 3)
        dropped_BHML = probabilities_BHML
        if kept_BHML is not None:
            dropped_BHML = probabilities_BHML * kept_BHML
            dprobabilities_BHML *= kept_BHML
        dvalue_BHLK = dropped_BHML.transpose(2, 3) @ upstream_BHMK
        dscores_BHML = torch._softmax_backward_data(
            dprobabilities_BHML, probabilities_BHML, -1, probabilities_BHML.dtype
        )
        dquery_BHMK = (dscores_BHML @ key_BHLK).mul_(ctx.root)
        dkey_BHLK = (dscores_BHML.transpose(2, 3) @ query_BHMK).mul_(ctx.root)
        return dquery_BHMK, dkey_BHLK, dvalue_BHLK, None, None, None


# The two copies between the packed axis and the padded blocks are gathers both ways, also in
# backward: autograd's own backward of a gather adds into place row by row, which distinct rows do
# not need.


class _Pad(torch.autograd.Function):
    """[T, P·D] → P blocks [B, H, L, K]. Padding rows repeat token 0: they are masked as keys, and
    as queries nobody reads them."""

    @staticmethod
    def forward(
        ctx: Any, x_TPD: Tensor, layout: PackedLayout, num_parts: int, num_heads: int
    ) -> tuple[Tensor, ...]:
        ctx.layout, ctx.num_tokens = layout, len(x_TPD)
        block_BLPHK = x_TPD.index_select(0, layout.tokens_R).view(
            len(layout.starts_B), layout.length, num_parts, num_heads, -1
        )
        return block_BLPHK.permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_BHLK: Tensor) -> tuple[Tensor | None, ...]:
        batch_size, num_heads, length, head_size = gradients_BHLK[0].shape
        block_BLPHK = gradients_BHLK[0].new_empty(
            batch_size, length, len(gradients_BHLK), num_heads, head_size
        )
        for part, gradient_BHLK in enumerate(gradients_BHLK):
            block_BLPHK[:, :, part] = gradient_BHLK.transpose(1, 2)
        gradient_TPD = _take_rows(
            block_BLPHK.view(batch_size * length, -1), ctx.layout.rows_N, ctx.num_tokens
        )
        return gradient_TPD, None, None, None


class _Unpad(torch.autograd.Function):
    """[B, H, L, K] → [T, D]; filler tokens get zeros."""

    @staticmethod
    def forward(ctx: Any, block_BHLK: Tensor, layout: PackedLayout, num_tokens: int) -> Tensor:
        ctx.layout, ctx.shape = layout, block_BHLK.shape
        block_RD = block_BHLK.transpose(1, 2).reshape(len(layout.tokens_R), -1)
        return _take_rows(block_RD, layout.rows_N, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        batch_size, num_heads, length, head_size = ctx.shape
        rows_N = ctx.layout.rows_N
        # Zeros at padding: what comes from there must not reach keys and values.
        block_RD = gradient_TD.new_zeros(batch_size * length, gradient_TD.shape[1])
        block_RD.index_copy_(0, rows_N, gradient_TD[: len(rows_N)])
        block_BLHK = block_RD.view(batch_size, length, num_heads, head_size)
        return block_BLHK.transpose(1, 2).contiguous(), None, None


def _take_rows(block_RF: Tensor, rows_N: Tensor, num_tokens: int) -> Tensor:
    """Row `rows_N[t]` of the block becomes row t; filler rows, N to `num_tokens`, are zero."""
    taken_TF = block_RF.new_empty(num_tokens, block_RF.shape[1])
    torch.index_select(block_RF, 0, rows_N, out=taken_TF[: len(rows_N)])
    taken_TF[len(rows_N) :] = 0
    return taken_TF


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
