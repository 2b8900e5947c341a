"""Attention over packed sequences in PyTorch's own operations, on any device.

Copy queries, keys and values into padded [S, H, L, K] blocks, attend there with all but a text's
own tokens masked out, and copy the contexts back.

Padding in the block costs quadratically, so a strip of it holds one text or, where that makes the
block smaller, two: the longest with the shortest, the second longest with the second shortest and
so on. Lengths like 60, 31, 28, 12 need 4·64² scores one to a strip, and 2·72² in pairs.

    A = Q Kᵀ / √K + mask        P = softmax(A)        P' = P ⊙ kept / (1 − p)        C = P' V

Backward, from dC (⊙ is elementwise; Σ runs over keys, along a row of P):

    dV = P'ᵀ dC      dP = dC Vᵀ ⊙ kept / (1 − p)      dA = P ⊙ (dP − Σ P ⊙ dP)
    dQ = dA K / √K   dK = dAᵀ Q / √K

It is written out because autograd keeps and passes over twice as many [S, H, L, L] tensors: here
only P and the mask of dropout outlive the forward pass, and every factor 1/(1 − p) and 1/√K is
applied on the smaller side of its product.

Shapes: B sequences, T packed tokens (N of them real, the rest filler at the end), S strips of
length L, R = S·L rows of the block, W sequences to a strip (1 or 2), D hidden, H heads, K = D / H
head size, M queries of a strip (L of them, or W), P projections side by side (queries, keys,
values).
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import to_device
from .dropout import (
    HEAD_FEATURES,
    DropoutCounters,
    Randomness,
    dropout_mask,
    dropout_mask_at,
)

ROUND_LENGTH_TO = 8
"""Matrix libraries make a kernel for each new shape: fewer lengths are worth a little padding."""


@dataclass(frozen=True)
class PaddedBlock:
    """Where each packed token lies in the padded block: made once a batch, used by each layer."""

    rows_N: Tensor
    """[N] int64: token t of the packed axis is row `rows_N[t]` of the block."""
    tokens_R: Tensor
    """[R] int64, the way back: row r is token `tokens_R[r]`; token 0 at padding."""
    mask_S1LL: Tensor
    """[S, 1, L, L] fp32, added to the scores: 0 within a text (and within padding), else -inf."""
    slots_B: Tensor
    """[B] int64: sequence b is number `slots_B[b]` of the S·W places for sequences."""
    sequences_SW: Tensor
    """[S·W] int64, the way back: the sequence in each place; 0 where a strip has room left."""
    mask_S1WL: Tensor
    """[S, 1, W, L] fp32: the rows of `mask_S1LL` that belong to first tokens."""

    def to(self, device: torch.device) -> "PaddedBlock":
        """The block on `device`, from a CPU and without a host sync."""
        return PaddedBlock(*(to_device(getattr(self, f.name), device) for f in fields(self)))


def padded_block(cu_seqlens: Tensor) -> PaddedBlock:
    """The block for sequences that start at `cu_seqlens` ([B+1] integer, from 0 to N)."""
    starts_B, lengths_B = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    batch_size, num_tokens = len(lengths_B), int(cu_seqlens[-1])
    strips_B, offsets_B, length, per_strip = _place_in_strips(lengths_B)
    num_strips = -(-batch_size // per_strip)
    first_rows_B = strips_B * length + offsets_B

    def count_up(end: int) -> Tensor:
        return torch.arange(end, device=cu_seqlens.device)

    def each_token(x_B: Tensor) -> Tensor:
        return x_B.repeat_interleave(lengths_B, output_size=num_tokens)

    rows_N = count_up(num_tokens) + each_token(first_rows_B - starts_B)
    tokens_R = rows_N.new_zeros(num_strips * length)
    tokens_R[rows_N] = count_up(num_tokens)
    slots_B = strips_B * per_strip + (offsets_B > 0)
    sequences_SW = slots_B.new_zeros(num_strips * per_strip)
    sequences_SW[slots_B] = count_up(batch_size)

    sequences_R = rows_N.new_full((num_strips * length,), -1)  # -1: padding
    sequences_R[rows_N] = each_token(count_up(batch_size))
    sequences_SL = sequences_R.view(num_strips, length)
    other_SLL = sequences_SL[:, :, None] != sequences_SL[:, None, :]
    mask_SLL = torch.zeros(other_SLL.shape, device=cu_seqlens.device)
    mask_SLL.masked_fill_(other_SLL, float("-inf"))
    # Nobody reads the context of an empty place: any row of the strip's mask will do there.
    first_rows_SW = (count_up(num_strips) * length).repeat_interleave(per_strip)
    first_rows_SW[slots_B] = first_rows_B
    return PaddedBlock(
        rows_N=rows_N,
        tokens_R=tokens_R,
        mask_S1LL=mask_SLL[:, None],
        slots_B=slots_B,
        sequences_SW=sequences_SW,
        mask_S1WL=mask_SLL.view(-1, length)[first_rows_SW].view(num_strips, 1, per_strip, length),
    )


def _place_in_strips(lengths_B: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """(strip of each sequence, its offset there, length of a strip, sequences to a strip)."""
    batch_size = len(lengths_B)
    order = torch.argsort(lengths_B, descending=True, stable=True)
    sorted_B = lengths_B[order]
    place = torch.arange(batch_size, device=lengths_B.device)
    partner = batch_size - 1 - place
    is_second = place > partner
    offsets = torch.where(is_second, sorted_B[partner], 0)
    alone, paired = (_round_up(int(x.max())) for x in (sorted_B, sorted_B + offsets))
    if -(-batch_size // 2) * paired**2 >= batch_size * alone**2:
        return place, torch.zeros_like(place), alone, 1
    strips_B, offsets_B = torch.empty_like(place), torch.empty_like(place)
    strips_B[order], offsets_B[order] = torch.minimum(place, partner), offsets
    return strips_B, offsets_B, paired, 2


def _round_up(length: int) -> int:
    return -(-length // ROUND_LENGTH_TO) * ROUND_LENGTH_TO


def padded_attention(
    qkv_T3D: Tensor,
    block: PaddedBlock,
    num_heads: int,
    dropout_p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
) -> Tensor:
    """`attention.packed_attention` in padded blocks."""
    query_SHLK, key_SHLK, value_SHLK = _Pad.apply(qkv_T3D, block, 3, num_heads)
    tokens_SL = block.tokens_R.view(key_SHLK.shape[0], -1)
    kept_SHLL, scale = _draw_mask(
        tokens_SL, tokens_SL, num_heads, dropout_p, randomness, site, qkv_T3D.dtype
    )
    context_SHLK = attend(query_SHLK, key_SHLK, value_SHLK, block.mask_S1LL, kept_SHLL, scale)
    context_TD: Tensor = _Unpad.apply(context_SHLK, block, len(qkv_T3D))
    return context_TD


def padded_first_token_attention(
    query_BD: Tensor,
    key_value_T2D: Tensor,
    block: PaddedBlock,
    first_tokens_B: Tensor,
    num_heads: int,
    dropout_p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
) -> Tensor:
    """`attention.first_token_attention` in padded blocks. first_tokens_B: [B] integer."""
    key_SHLK, value_SHLK = _Pad.apply(key_value_T2D, block, 2, num_heads)
    num_strips, _, per_strip, _ = block.mask_S1WL.shape
    query_SWHK = query_BD.index_select(0, block.sequences_SW).view(
        num_strips, per_strip, num_heads, -1
    )
    kept_SHWL, scale = _draw_mask(
        first_tokens_B[block.sequences_SW].view(num_strips, per_strip),
        block.tokens_R.view(num_strips, -1),
        num_heads,
        dropout_p,
        randomness,
        site,
        query_BD.dtype,
    )
    context_SHWK = attend(
        query_SWHK.transpose(1, 2), key_SHLK, value_SHLK, block.mask_S1WL, kept_SHWL, scale
    )
    context_SWD = context_SHWK.transpose(1, 2).reshape(len(block.sequences_SW), -1)
    return context_SWD.index_select(0, block.slots_B)


def _draw_mask(
    queries_SM: Tensor,
    keys_SL: Tensor,
    num_heads: int,
    p: float,
    randomness: Randomness | None,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, float]:
    """([S, H, M, L] of 1 and 0, its scale); no mask without dropout.

    queries_SM, keys_SL: which packed token each row and each column of the block belongs to.
    """
    if randomness is None or p == 0.0:
        return None, 1.0
    if not isinstance(randomness, DropoutCounters):
        shape = (len(keys_SL), num_heads, queries_SM.shape[1], keys_SL.shape[1])
        return dropout_mask(shape, p, randomness, dtype)
    heads_H11 = torch.arange(num_heads, device=keys_SL.device)[:, None, None]
    return dropout_mask_at(
        randomness.key,
        randomness.draws_T[queries_SM][:, None, :, None],
        randomness.positions_T[queries_SM][:, None, :, None],
        heads_H11 * HEAD_FEATURES + randomness.positions_T[keys_SL][:, None, None, :],
        site,
        p,
        dtype,
    )


def attend(
    query_SHMK: Tensor,
    key_SHLK: Tensor,
    value_SHLK: Tensor,
    mask_S1ML: Tensor,
    kept_SHML: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The product on padded blocks, [S, H, M, K].

    mask_S1ML: added to the scores. kept_SHML, scale: dropout's, applied to the probabilities.
    """
    context_SHMK: Tensor = _Attend.apply(
        query_SHMK, key_SHLK, value_SHLK, mask_S1ML, kept_SHML, scale
    )
    return context_SHMK


def reference_attend(
    query_SHMK: Tensor,
    key_SHLK: Tensor,
    value_SHLK: Tensor,
    mask_S1ML: Tensor,
    kept_SHML: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same function, written as the formula and differentiated by autograd."""
    scores_SHML = (query_SHMK @ key_SHLK.transpose(2, 3)).to(_softmax_dtype(query_SHMK))
    scores_SHML = scores_SHML * query_SHMK.shape[-1] ** -0.5 + mask_S1ML
    probabilities_SHML = torch.softmax(scores_SHML, dim=-1).to(value_SHLK.dtype)
    if kept_SHML is not None:
        probabilities_SHML = probabilities_SHML * kept_SHML * scale
    return probabilities_SHML @ value_SHLK


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_SHMK: Tensor,
        key_SHLK: Tensor,
        value_SHLK: Tensor,
        mask_S1ML: Tensor,
        kept_SHML: Tensor | None,
        scale: float,
    ) -> Tensor:
        scores_SHML = (query_SHMK @ key_SHLK.transpose(2, 3)).to(_softmax_dtype(query_SHMK))
        root = query_SHMK.shape[-1] ** -0.5
        torch.add(mask_S1ML, scores_SHML, alpha=root, out=scores_SHML)
        probabilities_SHML = torch.softmax(scores_SHML, dim=-1).to(query_SHMK.dtype)
        dropped_SHML = probabilities_SHML if kept_SHML is None else probabilities_SHML * kept_SHML
        context_SHMK = dropped_SHML @ value_SHLK
        ctx.save_for_backward(query_SHMK, key_SHLK, value_SHLK, probabilities_SHML, kept_SHML)
        ctx.scale, ctx.root = scale, root
        return context_SHMK if kept_SHML is None else context_SHMK.mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_SHMK: Tensor) -> tuple[Tensor | None, ...]:
        query_SHMK, key_SHLK, value_SHLK, probabilities_SHML, kept_SHML = ctx.saved_tensors
        upstream_SHMK = upstream_SHMK * ctx.scale
        dprobabilities_SHML = upstream_SHMK @ value_SHLK.transpose(2, 3)
        dropped_SHML = probabilities_SHML
        if kept_SHML is not None:
            dropped_SHML = probabilities_SHML * kept_SHML
            dprobabilities_SHML *= kept_SHML
        dvalue_SHLK = dropped_SHML.transpose(2, 3) @ upstream_SHMK
        dscores_SHML = torch._softmax_backward_data(
            dprobabilities_SHML, probabilities_SHML, -1, probabilities_SHML.dtype
        )
        dquery_SHMK = (dscores_SHML @ key_SHLK).mul_(ctx.root)
        dkey_SHLK = (dscores_SHML.transpose(2, 3) @ query_SHMK).mul_(ctx.root)
        return dquery_SHMK, dkey_SHLK, dvalue_SHLK, None, None, None


# The two copies between the packed axis and the padded blocks are gathers both ways, also in
# backward: autograd's own backward of a gather adds into place row by row, which distinct rows do
# not need.


class _Pad(torch.autograd.Function):
    """[T, P·D] → P blocks [S, H, L, K]. Padding rows repeat token 0: as keys they are masked, and
    as queries nobody reads them."""

    @staticmethod
    def forward(
        ctx: Any, x_TPD: Tensor, block: PaddedBlock, num_parts: int, num_heads: int
    ) -> tuple[Tensor, ...]:
        ctx.block, ctx.num_tokens = block, len(x_TPD)
        block_RPD = x_TPD.index_select(0, block.tokens_R)
        block_SLPHK = block_RPD.view(*block.mask_S1LL.shape[::3], num_parts, num_heads, -1)
        return block_SLPHK.permute(2, 0, 3, 1, 4).contiguous().unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients_SHLK: Tensor) -> tuple[Tensor | None, ...]:
        num_strips, num_heads, length, head_size = gradients_SHLK[0].shape
        block_SLPHK = gradients_SHLK[0].new_empty(
            num_strips, length, len(gradients_SHLK), num_heads, head_size
        )
        for part, gradient_SHLK in enumerate(gradients_SHLK):
            block_SLPHK[:, :, part] = gradient_SHLK.transpose(1, 2)
        block_RPD = block_SLPHK.view(num_strips * length, -1)
        return _take_rows(block_RPD, ctx.block.rows_N, ctx.num_tokens), None, None, None


class _Unpad(torch.autograd.Function):
    """[S, H, L, K] → [T, D]; filler tokens get zeros."""

    @staticmethod
    def forward(ctx: Any, block_SHLK: Tensor, block: PaddedBlock, num_tokens: int) -> Tensor:
        ctx.block, ctx.shape = block, block_SHLK.shape
        block_RD = block_SHLK.transpose(1, 2).reshape(len(block.tokens_R), -1)
        return _take_rows(block_RD, block.rows_N, num_tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_TD: Tensor) -> tuple[Tensor, None, None]:
        num_strips, num_heads, length, head_size = ctx.shape
        rows_N = ctx.block.rows_N
        # Zeros at padding: what comes from there must not reach keys and values.
        block_RD = gradient_TD.new_zeros(num_strips * length, gradient_TD.shape[1])
        block_RD.index_copy_(0, rows_N, gradient_TD[: len(rows_N)])
        block_SLHK = block_RD.view(num_strips, length, num_heads, head_size)
        return block_SLHK.transpose(1, 2).contiguous(), None, None


def _take_rows(block_RF: Tensor, rows_N: Tensor, num_tokens: int) -> Tensor:
    """Row `rows_N[t]` of the block becomes row t; filler rows, N to `num_tokens`, are zero."""
    taken_TF = block_RF.new_empty(num_tokens, block_RF.shape[1])
    torch.index_select(block_RF, 0, rows_N, out=taken_TF[: len(rows_N)])
    taken_TF[len(rows_N) :] = 0
    return taken_TF


def _softmax_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
