"""Self-attention over packed sequences: softmax(Q Kᵀ / √K) V within each, dropout in between.

The encoder keeps all texts of a batch on one token axis without padding. Only the attention product
needs to know where a text begins and ends, and who computes it depends on how long they are:

    up to 128 tokens     in Triton, the kernels below
    up to 512            in Triton's place, torch's flash attention (`flash_attention.py`)
    any                  in PyTorch's own operations, in padded blocks (`padded_attention.py`)

Formulas, forward and backward (⊙ is elementwise; Σ runs over keys, along a row of P):

    A = Q Kᵀ / √K      P = softmax(A)      P' = P ⊙ kept / (1 − p)      C = P' V

    dV = P'ᵀ dC        dP = dC Vᵀ ⊙ kept / (1 − p)        dA = P ⊙ (dP − Σ P ⊙ dP)
    dQ = dA K / √K     dK = dAᵀ Q / √K

Flash attention walks over keys in pieces, because the scores of a long text fit nowhere: it
rescales what it has summed up at each new maximum, and its backward adds up dQ from several
programs, by atomic additions. A text of up to 128 tokens needs none of that. One program takes one
head of one text, with all its scores in registers: an ordinary softmax; in backward P is made again
from Q and K, the mask from its counters, and dQ, dK and dV come out of the same program, each
written once, in an order that never changes. Nothing outlives the forward pass but its input.

The last layer wants the first token of each text alone (`model/bert.py`). That is the same kernel
with a block of one query instead of all.

Beyond the last text there may be filler tokens. A program of its own writes zeros there, as
context and as gradients; texts of no tokens at all are skipped.

Shapes: B texts, T packed tokens, D hidden, H heads, K = D / H head size; in Triton, blocks of M
queries and L keys.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _INTERPRETED, Pointer, jit, next_power_of_2, tl, to_device, torch_operator, use_triton
from .dropout import (
    HEAD_FEATURES,
    DropoutCounters,
    Randomness,
    counter_tensors,
    keep_mask_at,
    lane_threshold,
)
from .flash_attention import MAX_FLASH_LENGTH, can_flash, flash_attention
from .padded_attention import (
    PaddedBlock,
    padded_attention,
    padded_block,
    padded_first_token_attention,
)

MAX_SHORT_LENGTH = 128
"""Tokens of a text whose scores one program can hold."""

SHORT_HEAD_SIZES = (32, 64)
"""MiniLM's and BERT-base's: blocks must be powers of two, and smaller ones fill no matrix unit."""


@dataclass(frozen=True)
class PackedLayout:
    """Where the texts of a batch lie on the packed axis: made once a batch, used by each layer."""

    cu_seqlens: Tensor
    """[B+1] int32: text b is tokens `cu_seqlens[b]` to `cu_seqlens[b + 1]`, of which it has none or
    more."""
    first_tokens_B: Tensor
    """[B] int64: each text's first token; any other token for a text that has none."""
    max_length: int
    """No text is longer."""
    on_host: Tensor | None
    """`cu_seqlens` on the CPU; None where only the kernels for short texts are to be used."""

    @property
    def num_real_tokens(self) -> int:
        """Without filler."""
        assert self.on_host is not None, "only the kernels for short texts are to be used"
        return int(self.on_host[-1])

    @cached_property
    def block(self) -> PaddedBlock:
        """For attention in padded blocks: made when the first layer asks for it."""
        assert self.on_host is not None, "only the kernels for short texts are to be used"
        return padded_block(self.on_host).to(self.cu_seqlens.device)


def packed_layout(cu_seqlens: Tensor, device: torch.device | None = None) -> PackedLayout:
    """Texts that start at `cu_seqlens` ([B+1] integer, from 0 to N), laid out on `device`.

    device: None: where `cu_seqlens` is. There is a host sync only if that is a GPU.
    """
    on_host, on_device = cu_seqlens.cpu(), cu_seqlens.int()
    if device is not None and device != on_device.device:
        on_device = to_device(on_host.int(), device)
    return PackedLayout(on_device, on_device[:-1].long(), int(on_host.diff().max()), on_host)


def packed_attention(
    qkv_T3D: Tensor,
    layout: PackedLayout,
    num_heads: int,
    dropout_p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """softmax(Q Kᵀ / √K) V within each sequence, with dropout on the probabilities.

    qkv_T3D: [T, 3·D], queries, keys and values side by side. Returns context_TD: [T, D], zero at
    filler tokens (flash attention: finite). The softmax is computed in fp32 (fp64 for fp64 input).
    randomness: on its device, for Triton DropoutCounters; None turns dropout off. site: see
    `dropout`. impl: `triton` for texts beyond 128 tokens, or a head size that is neither 32 nor 64,
    is flash attention where that can run, and else padded blocks.
    Source: Vaswani et al. 2017, equation 1.
    """
    if use_triton(impl, qkv_T3D):
        head_size = qkv_T3D.shape[1] // 3 // num_heads
        short = layout.max_length <= MAX_SHORT_LENGTH
        if short and takes_short_texts(head_size, qkv_T3D.dtype, qkv_T3D.device):
            context_TD: Tensor = _ShortAttention.apply(
                qkv_T3D, layout, num_heads, dropout_p, randomness, site
            )
            return context_TD
        if layout.max_length <= MAX_FLASH_LENGTH and can_flash(qkv_T3D, head_size):
            query_TD, key_TD, value_TD = qkv_T3D.chunk(3, dim=1)
            # It leaves rows of no sequence as they happen to be: the filler is one, the last.
            num_tokens = qkv_T3D.shape[0]
            end = layout.cu_seqlens.new_full((1,), num_tokens)
            cu_seqlens = torch.cat([layout.cu_seqlens, end])
            longest = max(layout.max_length, num_tokens - layout.num_real_tokens)
            return flash_attention(
                query_TD,
                key_TD,
                value_TD,
                (cu_seqlens, cu_seqlens),
                (longest, longest),
                num_heads,
                dropout_p,
                _generator(randomness),
            )
    return padded_attention(qkv_T3D, layout.block, num_heads, dropout_p, randomness, site)


def first_token_attention(
    query_BD: Tensor,
    key_value_T2D: Tensor,
    layout: PackedLayout,
    num_heads: int,
    dropout_p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """`packed_attention` of each sequence's first token alone: context_BD, [B, D].

    query_BD: [B, D], of the first tokens. key_value_T2D: [T, 2·D], keys and values side by side.
    randomness: of the T tokens. A text without tokens has a context of zeros.
    """
    if use_triton(impl, query_BD):
        head_size = query_BD.shape[1] // num_heads
        short = layout.max_length <= MAX_SHORT_LENGTH
        if short and takes_short_texts(head_size, query_BD.dtype, query_BD.device):
            context_BD: Tensor = _ShortFirstTokenAttention.apply(
                query_BD, key_value_T2D, layout, num_heads, dropout_p, randomness, site
            )
            return context_BD
        if layout.max_length <= MAX_FLASH_LENGTH and can_flash(query_BD, head_size):
            # Without the filler, of whose keys it would leave the gradients as they happen to be.
            key_TD, value_TD = key_value_T2D[: layout.num_real_tokens].chunk(2, dim=1)
            counts = torch.arange(len(query_BD) + 1, dtype=torch.int32, device=query_BD.device)
            return flash_attention(
                query_BD,
                key_TD,
                value_TD,
                (counts, layout.cu_seqlens),
                (1, layout.max_length),
                num_heads,
                dropout_p,
                _generator(randomness),
            )
    return padded_first_token_attention(
        query_BD,
        key_value_T2D,
        layout.block,
        layout.first_tokens_B,
        num_heads,
        dropout_p,
        randomness,
        site,
    )


def takes_short_texts(head_size: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels here take texts that are short enough.

    In fp32 only in the interpreter: matrix units have no fp32, and without them a block of scores
    does not fit into the registers. Before compute capability 8.0 it does not fit at all.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return head_size in SHORT_HEAD_SIZES and (dtype != torch.float32 or _INTERPRETED)


def _generator(randomness: Randomness | None) -> torch.Generator | None:
    return randomness.generator if isinstance(randomness, DropoutCounters) else randomness


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv_T3D: Tensor,
        layout: PackedLayout,
        num_heads: int,
        p: float,
        randomness: Randomness | None,
        site: int,
    ) -> Tensor:
        qkv_T3D = qkv_T3D.contiguous()
        tensors = (layout.cu_seqlens, *counter_tensors(randomness, p)[:2])
        ctx.save_for_backward(qkv_T3D, *tensors)
        ctx.numbers = (num_heads, layout.max_length, p, site)
        context_TD: Tensor = _forward(*_split(qkv_T3D), *tensors, *ctx.numbers, False)
        return context_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TD: Tensor) -> tuple[Tensor | None, ...]:
        qkv_T3D, *tensors = ctx.saved_tensors
        dqkv_T3D = torch.empty_like(qkv_T3D)
        _backward_(
            *_split(dqkv_T3D),
            upstream_TD.contiguous(),
            *_split(qkv_T3D),
            *tensors,
            *ctx.numbers,
            False,
        )
        return dqkv_T3D, *[None] * 5


class _ShortFirstTokenAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_BD: Tensor,
        key_value_T2D: Tensor,
        layout: PackedLayout,
        num_heads: int,
        p: float,
        randomness: Randomness | None,
        site: int,
    ) -> Tensor:
        query_BD, key_value_T2D = query_BD.contiguous(), key_value_T2D.contiguous()
        tensors = (layout.cu_seqlens, *counter_tensors(randomness, p)[:2])
        ctx.save_for_backward(query_BD, key_value_T2D, *tensors)
        ctx.numbers = (num_heads, layout.max_length, p, site)
        context_BD: Tensor = _forward(query_BD, key_value_T2D, *tensors, *ctx.numbers, True)
        return context_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_BD: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, key_value_T2D, *tensors = ctx.saved_tensors
        dquery_BD, dkey_value_T2D = torch.empty_like(query_BD), torch.empty_like(key_value_T2D)
        _backward_(
            dquery_BD,
            dkey_value_T2D,
            upstream_BD.contiguous(),
            query_BD,
            key_value_T2D,
            *tensors,
            *ctx.numbers,
            True,
        )
        return dquery_BD, dkey_value_T2D, *[None] * 5


def _split(qkv_T3D: Tensor) -> tuple[Tensor, Tensor]:
    """Views of the queries, [T, D], and of keys and values, [T, 2·D]."""
    width = qkv_T3D.shape[1] // 3
    return qkv_T3D[:, :width], qkv_T3D[:, width:]


WARPS = {16: 2, 32: 2, 64: 4, 128: 8}
"""By keys of a block: at 128, 64 scores a thread, of which backward holds three kinds. Not tuned on
a GPU yet."""

LEAST_BLOCK = 16
"""What a matrix unit takes."""


def block_of_keys(max_length: int) -> int:
    """What the kernels are compiled for where no text is longer."""
    return max(LEAST_BLOCK, next_power_of_2(max_length))


def _block_sizes(max_length: int, first_only: bool) -> tuple[int, int]:
    """(queries of a block, keys of a block)."""
    keys = block_of_keys(max_length)
    return LEAST_BLOCK if first_only else keys, keys


def _fake_forward(query: Tensor, *_: Any) -> Tensor:
    return query.new_empty(query.shape)


@torch_operator(
    "short_attention_forward(Tensor query, Tensor key_value, Tensor cu_seqlens, Tensor? key, "
    "Tensor? draws, int num_heads, int max_length, float p, int site, bool first_only) -> Tensor",
    fake=_fake_forward,
)
def _forward(
    query: Tensor,
    key_value_T2D: Tensor,
    cu_seqlens: Tensor,
    key: Tensor | None,
    draws_T: Tensor | None,
    num_heads: int,
    max_length: int,
    p: float,
    site: int,
    first_only: bool,
) -> Tensor:
    """Contexts, contiguous. query: [T, D], or with `first_only` [B, D]; rows may lie apart."""
    context = _fake_forward(query)
    block_queries, block_keys = _block_sizes(max_length, first_only)
    drop_below, scale = lane_threshold(p)
    # A text has a program a head, and the filler one more.
    attention_forward_kernel[(len(cu_seqlens), num_heads)](
        query,
        key_value_T2D,
        context,
        cu_seqlens,
        key,
        draws_T,
        len(key_value_T2D),
        drop_below,
        scale,
        site,
        **_constants(query, key_value_T2D, num_heads, first_only),
        HAS_DROPOUT=key is not None,
        BLOCK_M=block_queries,
        BLOCK_L=block_keys,
        num_warps=WARPS[block_keys],
        enable_fp_fusion=True,
    )
    return context


def _constants(
    query: Tensor, key_value_T2D: Tensor, num_heads: int, first_only: bool
) -> dict[str, Any]:
    """What the kernels are compiled for besides blocks: shapes and precision."""
    return {
        "D": query.shape[1],
        "HEAD_SIZE": query.shape[1] // num_heads,
        "QUERY_STRIDE": query.stride(0),
        "KEY_STRIDE": key_value_T2D.stride(0),
        "FIRST_ONLY": first_only,
        "HEAD_GROUPS": HEAD_FEATURES // 8,
        # Triton's interpreter would multiply the bits of bf16 as if they were integers.
        "IN_FP32": _INTERPRETED and query.dtype == torch.bfloat16,
    }


@jit
def _find_rows(
    text: "Pointer",
    start: "Pointer",
    length: "Pointer",
    FIRST_ONLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> tuple["Pointer", "Pointer", "Pointer", "Pointer"]:
    """(rows of the queries, [M, 1], and which there are; the same of the keys, [L, 1])."""
    queries_M1, keys_L1 = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_L)[:, None]
    if FIRST_ONLY:
        rows_M1, is_query_M1 = text.to(tl.int64) + queries_M1, queries_M1 < 1
    else:
        rows_M1, is_query_M1 = start.to(tl.int64) + queries_M1, queries_M1 < length
    return rows_M1, is_query_M1, start.to(tl.int64) + keys_L1, keys_L1 < length


@jit
def _keep_mask(
    key: "Pointer",
    draw: "Pointer",
    head: "Pointer",
    site: int,
    drop_below: int,
    HEAD_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> "Pointer":
    """[M, L] bool. The first token alone is query 0, as among all."""
    draws_M = draw + tl.zeros([BLOCK_M], tl.int32)
    positions_M = tl.arange(0, BLOCK_M)
    first_group = head * HEAD_GROUPS
    return keep_mask_at(key, draws_M, positions_M, first_group, site, drop_below, BLOCK_M, BLOCK_L)


@jit
def _dot(a: "Pointer", b: "Pointer", IN_FP32: tl.constexpr) -> "Pointer":
    """a @ b, summed in fp32; fp32 is multiplied as fp32, not as tf32."""
    if IN_FP32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@jit
def _softmax(
    query_MK: "Pointer",
    key_LK: "Pointer",
    length: "Pointer",
    HEAD_SIZE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    IN_FP32: tl.constexpr,
) -> "Pointer":
    """P, [M, L] fp32; all zero where there are no keys."""
    scores_ML = _dot(query_MK, tl.trans(key_LK), IN_FP32) * (HEAD_SIZE**-0.5)
    is_key_1L = (tl.arange(0, BLOCK_L) < length)[None, :]
    scores_ML = tl.where(is_key_1L, scores_ML, float("-inf"))
    most_M = tl.where(length > 0, tl.max(scores_ML, axis=1), 0.0)
    exponentials_ML = tl.exp(scores_ML - most_M[:, None])
    sums_M = tl.where(length > 0, tl.sum(exponentials_ML, axis=1), 1.0)
    return exponentials_ML / sums_M[:, None]


@jit
def attention_forward_kernel(
    query: "Pointer",
    key_value: "Pointer",
    context: "Pointer",
    cu_seqlens: "Pointer",
    key: "Pointer",
    draws_T: "Pointer",
    num_tokens: int,
    drop_below: int,
    scale: float,
    site: int,
    D: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    FIRST_ONLY: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    IN_FP32: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + text)
    features_K = head * HEAD_SIZE + tl.arange(0, HEAD_SIZE)

    if text < tl.num_programs(0) - 1:
        length = tl.load(cu_seqlens + text + 1) - start
        rows_M1, is_query_M1, rows_L1, is_key_L1 = _find_rows(
            text, start, length, FIRST_ONLY, BLOCK_M, BLOCK_L
        )
        query_MK = tl.load(
            query + rows_M1 * QUERY_STRIDE + features_K[None, :],
            mask=is_query_M1,
            other=0.0,
        )
        at_key_LK = key_value + rows_L1 * KEY_STRIDE + features_K[None, :]
        key_LK = tl.load(at_key_LK, mask=is_key_L1, other=0.0)
        value_LK = tl.load(at_key_LK + D, mask=is_key_L1, other=0.0)

        dropped_ML = _softmax(query_MK, key_LK, length, HEAD_SIZE, BLOCK_L, IN_FP32)
        if HAS_DROPOUT:
            draw = tl.load(draws_T + start, mask=length > 0, other=0)
            kept_ML = _keep_mask(key, draw, head, site, drop_below, HEAD_GROUPS, BLOCK_M, BLOCK_L)
            dropped_ML = tl.where(kept_ML, dropped_ML * scale, 0.0)
        context_MK = _dot(dropped_ML.to(value_LK.dtype), value_LK, IN_FP32)
        at_context_MK = context + rows_M1 * D + features_K[None, :]
        tl.store(at_context_MK, context_MK, mask=is_query_M1)
    elif not FIRST_ONLY:
        nothing_LK = tl.zeros([BLOCK_L, HEAD_SIZE], context.dtype.element_ty)
        for first in range(start, num_tokens, BLOCK_L):
            rows_L1 = (first + tl.arange(0, BLOCK_L))[:, None]
            at_LK = context + rows_L1.to(tl.int64) * D + features_K[None, :]
            tl.store(at_LK, nothing_LK, mask=rows_L1 < num_tokens)


@torch_operator(
    "short_attention_backward_(Tensor(a!) dquery, Tensor(b!) dkey_value, Tensor upstream, "
    "Tensor query, Tensor key_value, Tensor cu_seqlens, Tensor? key, Tensor? draws, "
    "int num_heads, int max_length, float p, int site, bool first_only) -> ()",
    fake=lambda *_: None,
)
def _backward_(
    dquery: Tensor,
    dkey_value_T2D: Tensor,
    upstream: Tensor,
    query: Tensor,
    key_value_T2D: Tensor,
    cu_seqlens: Tensor,
    key: Tensor | None,
    draws_T: Tensor | None,
    num_heads: int,
    max_length: int,
    p: float,
    site: int,
    first_only: bool,
) -> None:
    """Fills the gradients, which lie in memory as what they are the gradients of."""
    block_queries, block_keys = _block_sizes(max_length, first_only)
    drop_below, scale = lane_threshold(p)
    attention_backward_kernel[(len(cu_seqlens), num_heads)](
        upstream,
        query,
        key_value_T2D,
        dquery,
        dkey_value_T2D,
        cu_seqlens,
        key,
        draws_T,
        len(key_value_T2D),
        drop_below,
        scale,
        site,
        **_constants(query, key_value_T2D, num_heads, first_only),
        HAS_DROPOUT=key is not None,
        BLOCK_M=block_queries,
        BLOCK_L=block_keys,
        num_warps=WARPS[block_keys],
        enable_fp_fusion=True,
    )


@jit
def attention_backward_kernel(
    upstream: "Pointer",
    query: "Pointer",
    key_value: "Pointer",
    dquery: "Pointer",
    dkey_value: "Pointer",
    cu_seqlens: "Pointer",
    key: "Pointer",
    draws_T: "Pointer",
    num_tokens: int,
    drop_below: int,
    scale: float,
    site: int,
    D: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    QUERY_STRIDE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    FIRST_ONLY: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    IN_FP32: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
) -> None:
    text, head = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + text)
    features_K = head * HEAD_SIZE + tl.arange(0, HEAD_SIZE)

    if text < tl.num_programs(0) - 1:
        length = tl.load(cu_seqlens + text + 1) - start
        rows_M1, is_query_M1, rows_L1, is_key_L1 = _find_rows(
            text, start, length, FIRST_ONLY, BLOCK_M, BLOCK_L
        )
        places_MK = rows_M1 * QUERY_STRIDE + features_K[None, :]
        places_LK = rows_L1 * KEY_STRIDE + features_K[None, :]
        query_MK = tl.load(query + places_MK, mask=is_query_M1, other=0.0)
        key_LK = tl.load(key_value + places_LK, mask=is_key_L1, other=0.0)
        value_LK = tl.load(key_value + D + places_LK, mask=is_key_L1, other=0.0)
        upstream_MK = tl.load(
            upstream + rows_M1 * D + features_K[None, :], mask=is_query_M1, other=0.0
        )

        p_ML = _softmax(query_MK, key_LK, length, HEAD_SIZE, BLOCK_L, IN_FP32)
        dropped_ML = p_ML
        dp_ML = _dot(upstream_MK, tl.trans(value_LK), IN_FP32)
        if HAS_DROPOUT:
            draw = tl.load(draws_T + start, mask=length > 0, other=0)
            kept_ML = _keep_mask(key, draw, head, site, drop_below, HEAD_GROUPS, BLOCK_M, BLOCK_L)
            dropped_ML = tl.where(kept_ML, p_ML * scale, 0.0)
            dp_ML = tl.where(kept_ML, dp_ML * scale, 0.0)
        # Rows beyond the queries have a P of their own, but no upstream: they add zeros.
        dvalue_LK = _dot(tl.trans(dropped_ML.to(value_LK.dtype)), upstream_MK, IN_FP32)
        tl.store(dkey_value + D + places_LK, dvalue_LK, mask=is_key_L1)

        da_ML = p_ML * (dp_ML - tl.sum(p_ML * dp_ML, axis=1)[:, None])
        da_ML = da_ML.to(query_MK.dtype)
        root = HEAD_SIZE**-0.5
        dquery_MK = _dot(da_ML, key_LK, IN_FP32) * root
        tl.store(dquery + places_MK, dquery_MK, mask=is_query_M1)
        dkey_LK = _dot(tl.trans(da_ML), query_MK, IN_FP32) * root
        tl.store(dkey_value + places_LK, dkey_LK, mask=is_key_L1)
    else:
        nothing_LK = tl.zeros([BLOCK_L, HEAD_SIZE], dkey_value.dtype.element_ty)
        for first in range(start, num_tokens, BLOCK_L):
            rows_L1 = (first + tl.arange(0, BLOCK_L))[:, None]
            is_row_L1 = rows_L1 < num_tokens
            places_LK = rows_L1.to(tl.int64) * KEY_STRIDE + features_K[None, :]
            tl.store(dkey_value + places_LK, nothing_LK, mask=is_row_L1)
            tl.store(dkey_value + D + places_LK, nothing_LK, mask=is_row_L1)
            if not FIRST_ONLY:
                at_LK = dquery + rows_L1.to(tl.int64) * QUERY_STRIDE + features_K[None, :]
                tl.store(at_LK, nothing_LK, mask=is_row_L1)
