"""The embeddings: sum of three tables' rows, layer norm and dropout as one operation.

    e = word[input_id] + position[position_id] + token_type
    y = dropout(weight ⊙ x̂ + bias),     x̂ = (e − μ) · r,     r = 1 / √(σ² + eps)

BERT's token types tell two sentences apart; here there is one, so a single row of that table serves
every token and is added like a bias.

Backward, from dy, with g = weight ⊙ dy ⊙ mask / (1 − p), the gradient of x̂, and the gradient of a
norm as `residual_norm.py` derives it:

    de = r · (g − mean(g) − x̂ · mean(g ⊙ x̂))
    dword[w] = Σ_{tokens with id w} de       dposition[i] = Σ_{tokens at i} de
    dtoken_type = Σ_tokens de                 dweight, dbias: sums over the tokens too

Tables and norm are fp32, whatever the precision of y: reading a few rows of a table gains nothing
from bf16, and the sum of many gradients into the row of a frequent word would lose most of them.

In Triton, a program gathers the rows of its tokens, and y is all that it writes besides μ and r:
neither the three rows' sum nor the norm's output goes through memory. Backward gathers the rows
again. The sums into the tables are torch's own operation, which on a GPU adds up the tokens of an
id in a fixed order (beyond 3,072 tokens by sorting them first); atomic additions would come in an
order that changes from run to run, every text's [CLS] waiting for every other's.

Shapes: T tokens, D features, V words, L positions; in Triton, blocks of R rows and P programs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import Pointer, jit, tl, torch_operator, use_triton
from .dropout import Randomness, counter_tensors, dropout, keep_mask, lane_threshold
from .residual_norm import BACKWARD_PROGRAMS, norm_gradient, row_config


def embed_tokens(
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_LD: Tensor,
    token_type_D: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
    impl: str = "auto",
    *,
    sparse: bool = False,
) -> Tensor:
    """dropout(LayerNorm(word + position + token type)), [T, D], in `dtype`.

    input_ids_T, position_ids_T: int32 or int64. The tables and the norm are fp32. randomness: on
    their device, for Triton DropoutCounters; None turns dropout off. site: see `dropout`. sparse:
    the gradient of the word table names the rows that have one; torch only.
    """
    if use_triton(impl, word_VD):
        out_TD: Tensor = _TritonEmbedding.apply(
            input_ids_T,
            position_ids_T,
            word_VD,
            position_LD,
            token_type_D,
            weight_D,
            bias_D,
            eps,
            dtype,
            p,
            randomness,
            site,
        )
        return out_TD
    embedded_TD = F.embedding(input_ids_T, word_VD, sparse=sparse)
    embedded_TD = embedded_TD + F.embedding(position_ids_T, position_LD)
    normed_TD = F.layer_norm(embedded_TD + token_type_D, weight_D.shape, weight_D, bias_D, eps)
    return dropout(normed_TD.to(dtype), p, randomness, site)


def reference_embed_tokens(
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_LD: Tensor,
    token_type_D: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
) -> Tensor:
    """The same function, written as the formula and differentiated by autograd."""
    embedded_TD = word_VD[input_ids_T] + position_LD[position_ids_T] + token_type_D
    centred_TD = embedded_TD - embedded_TD.mean(1, keepdim=True)
    rstd_T1 = (centred_TD.square().mean(1, keepdim=True) + eps).rsqrt()
    normed_TD = weight_D * centred_TD * rstd_T1 + bias_D
    return dropout(normed_TD.to(dtype), p, randomness, site)


class _TritonEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        word_VD: Tensor,
        position_LD: Tensor,
        token_type_D: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
        dtype: torch.dtype,
        p: float,
        randomness: Randomness | None,
        site: int,
    ) -> Tensor:
        inputs = [
            x.contiguous()
            for x in (input_ids_T, position_ids_T, word_VD, position_LD, token_type_D, weight_D)
        ]
        where = counter_tensors(randomness, p)
        out_TD: Tensor
        out_TD, mean_T, rstd_T = _forward(*inputs, bias_D.contiguous(), *where, eps, p, site, dtype)
        ctx.save_for_backward(*inputs, mean_T, rstd_T, *where)
        ctx.p, ctx.site = p, site
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TD: Tensor) -> tuple[Tensor | None, ...]:
        input_ids_T, position_ids_T, word_VD, position_LD, *_ = ctx.saved_tensors
        dembedded_TD, sums_3D = _backward(
            upstream_TD.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site
        )
        dtables = [
            _sum_by_id(dembedded_TD, ids_T, len(table)) if needed else None
            for ids_T, table, needed in (
                (input_ids_T, word_VD, ctx.needs_input_grad[2]),
                (position_ids_T, position_LD, ctx.needs_input_grad[3]),
            )
        ]
        dtoken_type_D, dweight_D, dbias_D = sums_3D
        return None, None, *dtables, dtoken_type_D, dweight_D, dbias_D, *[None] * 5


def _sum_by_id(dembedded_TD: Tensor, ids_T: Tensor, num_rows: int) -> Tensor:
    # torch's kernel for GPUs does not check ids and would write beyond the table. The NaN of an
    # unknown one goes to the nearest row there is.
    known_T = ids_T.clamp(0, num_rows - 1)
    sums: Tensor = torch.ops.aten.embedding_dense_backward(
        dembedded_TD, known_T, num_rows, -1, False
    )
    return sums


def _fake_forward(
    input_ids_T: Tensor, position_ids_T: Tensor, word_VD: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_tokens, dtype = len(input_ids_T), rest[-1]
    out_TD = word_VD.new_empty(num_tokens, word_VD.shape[1], dtype=dtype)
    return out_TD, word_VD.new_empty(num_tokens), word_VD.new_empty(num_tokens)


@torch_operator(
    "embedding_forward(Tensor input_ids, Tensor position_ids, Tensor word, Tensor position, "
    "Tensor token_type, Tensor weight, Tensor bias, Tensor? key, Tensor? draws, "
    "Tensor? positions, float eps, float p, int site, ScalarType dtype) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_LD: Tensor,
    token_type_D: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    key: Tensor | None,
    draws_T: Tensor | None,
    positions_T: Tensor | None,
    eps: float,
    p: float,
    site: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    out_TD, mean_T, rstd_T = outputs = _fake_forward(input_ids_T, position_ids_T, word_VD, dtype)
    num_tokens, num_features = out_TD.shape
    block_rows, block_width, warps = row_config(num_features)
    drop_below, scale = lane_threshold(p)
    if num_tokens:
        embedding_forward_kernel[(-(-num_tokens // block_rows),)](
            input_ids_T,
            position_ids_T,
            word_VD,
            position_LD,
            token_type_D,
            weight_D,
            bias_D,
            out_TD,
            mean_T,
            rstd_T,
            key,
            draws_T,
            positions_T,
            num_tokens,
            len(word_VD),
            len(position_LD),
            num_features,
            eps,
            drop_below,
            scale,
            site,
            HAS_DROPOUT=key is not None,
            BLOCK_R=block_rows,
            BLOCK_D=block_width,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return outputs


@jit
def _gather_rows(
    input_ids_T: "Pointer",
    position_ids_T: "Pointer",
    word_VD: "Pointer",
    position_LD: "Pointer",
    token_type_D: "Pointer",
    rows_R: "Pointer",
    features_D: "Pointer",
    is_row_R: "Pointer",
    is_feature_D: "Pointer",
    num_words: int,
    num_positions: int,
    D: tl.constexpr,
) -> "Pointer":
    """e of a block's tokens, [BLOCK_R, BLOCK_D] fp32; NaN for an id that the table does not have.

    Nothing is read outside of the tables, and a NaN reaches the loss, which stops the training.
    """
    words_R = tl.load(input_ids_T + rows_R, mask=is_row_R, other=0).to(tl.int64)
    places_R = tl.load(position_ids_T + rows_R, mask=is_row_R, other=0).to(tl.int64)
    known_R = (words_R >= 0) & (words_R < num_words)
    known_R = known_R & (places_R >= 0) & (places_R < num_positions)
    inside_RD = (is_row_R & known_R)[:, None] & is_feature_D[None, :]
    embedded_RD = tl.load(
        word_VD + words_R[:, None] * D + features_D[None, :], mask=inside_RD, other=0.0
    )
    embedded_RD += tl.load(
        position_LD + places_R[:, None] * D + features_D[None, :], mask=inside_RD, other=0.0
    )
    embedded_RD += tl.load(token_type_D + features_D, mask=is_feature_D, other=0.0)[None, :]
    return tl.where(known_R[:, None], embedded_RD, float("nan"))


@jit
def embedding_forward_kernel(
    input_ids_T: "Pointer",
    position_ids_T: "Pointer",
    word_VD: "Pointer",
    position_LD: "Pointer",
    token_type_D: "Pointer",
    weight_D: "Pointer",
    bias_D: "Pointer",
    out_TD: "Pointer",
    mean_T: "Pointer",
    rstd_T: "Pointer",
    key: "Pointer",
    draws_T: "Pointer",
    positions_T: "Pointer",
    num_tokens: int,
    num_words: int,
    num_positions: int,
    D: tl.constexpr,
    eps: float,
    drop_below: int,
    scale: float,
    site: int,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    features_D = tl.arange(0, BLOCK_D)
    is_row_R, is_feature_D = rows_R < num_tokens, features_D < D
    inside_RD = is_row_R[:, None] & is_feature_D[None, :]
    embedded_RD = _gather_rows(
        input_ids_T,
        position_ids_T,
        word_VD,
        position_LD,
        token_type_D,
        rows_R,
        features_D,
        is_row_R,
        is_feature_D,
        num_words,
        num_positions,
        D,
    )
    mean_R = tl.sum(tl.where(inside_RD, embedded_RD, 0.0), axis=1) / D
    centred_RD = tl.where(inside_RD, embedded_RD - mean_R[:, None], 0.0)
    rstd_R = 1.0 / tl.sqrt(tl.sum(centred_RD * centred_RD, axis=1) / D + eps)
    weight_1D = tl.load(weight_D + features_D, mask=is_feature_D, other=0.0)[None, :]
    bias_1D = tl.load(bias_D + features_D, mask=is_feature_D, other=0.0)[None, :]
    out_RD = centred_RD * rstd_R[:, None] * weight_1D + bias_1D
    if HAS_DROPOUT:
        kept_RD = keep_mask(
            key, draws_T, positions_T, rows_R, is_row_R, site, drop_below, BLOCK_R, BLOCK_D
        )
        out_RD = tl.where(kept_RD, out_RD * scale, 0.0)
    places_RD = rows_R[:, None].to(tl.int64) * D + features_D[None, :]
    tl.store(out_TD + places_RD, out_RD, mask=inside_RD)
    tl.store(mean_T + rows_R, mean_R, mask=is_row_R)
    tl.store(rstd_T + rows_R, rstd_R, mask=is_row_R)


def _fake_backward(
    upstream_TD: Tensor, input_ids_T: Tensor, position_ids_T: Tensor, word_VD: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return word_VD.new_empty(upstream_TD.shape), word_VD.new_empty(3, word_VD.shape[1])


@torch_operator(
    "embedding_backward(Tensor upstream, Tensor input_ids, Tensor position_ids, Tensor word, "
    "Tensor position, Tensor token_type, Tensor weight, Tensor mean, Tensor rstd, Tensor? key, "
    "Tensor? draws, Tensor? positions, float p, int site) -> (Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(
    upstream_TD: Tensor,
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_LD: Tensor,
    token_type_D: Tensor,
    weight_D: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    key: Tensor | None,
    draws_T: Tensor | None,
    positions_T: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor]:
    num_tokens, num_features = upstream_TD.shape
    dembedded_TD = word_VD.new_empty(upstream_TD.shape)
    block_rows, block_width, warps = row_config(num_features)
    drop_below, scale = lane_threshold(p)
    programs = min(BACKWARD_PROGRAMS, -(-num_tokens // block_rows))
    shares_P3D = word_VD.new_empty(programs, 3, num_features)
    if num_tokens:
        embedding_backward_kernel[(programs,)](
            upstream_TD,
            input_ids_T,
            position_ids_T,
            word_VD,
            position_LD,
            token_type_D,
            weight_D,
            mean_T,
            rstd_T,
            dembedded_TD,
            shares_P3D,
            key,
            draws_T,
            positions_T,
            num_tokens,
            len(word_VD),
            len(position_LD),
            num_features,
            drop_below,
            scale,
            site,
            HAS_DROPOUT=key is not None,
            BLOCK_R=block_rows,
            BLOCK_D=block_width,
            num_warps=warps,
            enable_fp_fusion=True,
        )
    return dembedded_TD, shares_P3D.sum(0)


@jit
def embedding_backward_kernel(
    upstream_TD: "Pointer",
    input_ids_T: "Pointer",
    position_ids_T: "Pointer",
    word_VD: "Pointer",
    position_LD: "Pointer",
    token_type_D: "Pointer",
    weight_D: "Pointer",
    mean_T: "Pointer",
    rstd_T: "Pointer",
    dembedded_TD: "Pointer",
    shares_P3D: "Pointer",
    key: "Pointer",
    draws_T: "Pointer",
    positions_T: "Pointer",
    num_tokens: int,
    num_words: int,
    num_positions: int,
    D: tl.constexpr,
    drop_below: int,
    scale: float,
    site: int,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    features_D = tl.arange(0, BLOCK_D)
    is_feature_D = features_D < D
    weight_1D = tl.load(weight_D + features_D, mask=is_feature_D, other=0.0)[None, :]
    dtoken_type_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dweight_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dbias_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_R), tl.num_programs(0)):
        rows_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        is_row_R = rows_R < num_tokens
        inside_RD = is_row_R[:, None] & is_feature_D[None, :]
        places_RD = rows_R[:, None].to(tl.int64) * D + features_D[None, :]
        embedded_RD = _gather_rows(
            input_ids_T,
            position_ids_T,
            word_VD,
            position_LD,
            token_type_D,
            rows_R,
            features_D,
            is_row_R,
            is_feature_D,
            num_words,
            num_positions,
            D,
        )
        mean_R1 = tl.load(mean_T + rows_R, mask=is_row_R, other=0.0)[:, None]
        rstd_R1 = tl.load(rstd_T + rows_R, mask=is_row_R, other=0.0)[:, None]
        xhat_RD = tl.where(inside_RD, (embedded_RD - mean_R1) * rstd_R1, 0.0)

        upstream_RD = tl.load(upstream_TD + places_RD, mask=inside_RD, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            kept_RD = keep_mask(
                key, draws_T, positions_T, rows_R, is_row_R, site, drop_below, BLOCK_R, BLOCK_D
            )
            upstream_RD = tl.where(kept_RD, upstream_RD * scale, 0.0)
        dweight_RD += upstream_RD * xhat_RD
        dbias_RD += upstream_RD

        dembedded_RD = norm_gradient(upstream_RD * weight_1D, xhat_RD, rstd_R1, D)
        dembedded_RD = tl.where(inside_RD, dembedded_RD, 0.0)
        dtoken_type_RD += dembedded_RD
        tl.store(dembedded_TD + places_RD, dembedded_RD, mask=inside_RD)

    share = shares_P3D + tl.program_id(0) * 3 * D + features_D
    tl.store(share, tl.sum(dtoken_type_RD, axis=0), mask=is_feature_D)
    tl.store(share + D, tl.sum(dweight_RD, axis=0), mask=is_feature_D)
    tl.store(share + 2 * D, tl.sum(dbias_RD, axis=0), mask=is_feature_D)
