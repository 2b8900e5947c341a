"""Dropout, residual connection and layer norm as one operation: the end of each half of a layer.

    h = residual + x ⊙ mask / (1 − p)
    y = weight ⊙ x̂ + bias,     x̂ = (h − μ) · r,     r = 1 / √(σ² + eps)

with the mean μ and the variance σ² of each row's D features (Ba, Kiros & Hinton 2016).

Backward, from dy. Let g = weight ⊙ dy, the gradient of x̂. A change of h_j moves x̂_i directly, by
r·[i = j], and through both statistics: ∂μ/∂h_j = 1/D moves it by −r/D, and ∂r/∂h_j = −r² x̂_j / D
by −r x̂_i x̂_j / D. So

    dh_j = Σ_i g_i ∂x̂_i/∂h_j = r · (g_j − mean(g) − x̂_j · mean(g ⊙ x̂))
    dresidual = dh        dx = dh ⊙ mask / (1 − p)
    dweight = Σ_rows dy ⊙ x̂       dbias = Σ_rows dy

The statistics of the norm are fp32, for bf16 input too. In torch, autograd derives the norm's
gradient (written out, it was no faster: `benchmarks/README.md`). For torch's CPU kernel to keep
mean and 1/σ for backward in fp32, weight and bias must come in fp32 (with a bf16 weight it rounds
them to 8 bits); its CUDA kernel keeps them in fp32 by itself, and wants all of one dtype.

In Triton, nothing outlives it but μ and r: h is made again from x and residual, in fp32, and the
mask from its counters. A row is read once and stays in registers. Backward walks over the rows
with a fixed number of programs, each of which adds up its share of dweight and dbias; a last sum
over the programs replaces atomic additions, whose order would change from run to run.

Shapes: T rows, D features; in Triton, blocks of R rows and P programs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import Pointer, jit, next_power_of_2, tl, torch_operator, use_triton
from .dropout import (
    Randomness,
    counter_tensors,
    dropout,
    dropout_mask,
    keep_mask,
    lane_threshold,
)


def dropout_residual_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm(residual + dropout(x)), [T, D], in x's dtype.

    x_TD, residual_TD: of one dtype. weight_D, bias_D: in torch, fp32 on a CPU and x's dtype on a
    GPU; in Triton any. randomness: on x's device, for Triton DropoutCounters; None turns dropout
    off. site: see `dropout`.
    """
    if use_triton(impl, x_TD):
        normed_TD: Tensor = _TritonResidualNorm.apply(
            x_TD, residual_TD, weight_D, bias_D, eps, p, randomness, site
        )
        return normed_TD
    if p == 0.0 or randomness is None:
        hidden_TD = residual_TD + x_TD
    else:
        mask_TD, scale = dropout_mask(x_TD.shape, p, randomness, x_TD.dtype, site)
        hidden_TD = _AddDropped.apply(residual_TD, x_TD, mask_TD, scale)
    return F.layer_norm(hidden_TD, weight_D.shape, weight_D, bias_D, eps)


def reference_dropout_residual_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    p: float = 0.0,
    randomness: Randomness | None = None,
    site: int = 0,
) -> Tensor:
    """The same function, step by step and differentiated by autograd."""
    hidden_TD = residual_TD + dropout(x_TD, p, randomness, site)
    return F.layer_norm(hidden_TD, weight_D.shape, weight_D, bias_D, eps)


class _AddDropped(torch.autograd.Function):
    """residual + x ⊙ mask · scale, rounded once here and once in backward.

    Autograd's own gradient would round the scale to bf16: 1 / 0.9 would be 1.109.
    """

    @staticmethod
    def forward(
        ctx: Any, residual_TD: Tensor, x_TD: Tensor, mask_TD: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(mask_TD)
        ctx.scale = scale
        return torch.addcmul(residual_TD, x_TD, mask_TD, value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TD: Tensor) -> tuple[Tensor | None, ...]:
        (mask_TD,) = ctx.saved_tensors
        return upstream_TD, (upstream_TD * mask_TD).mul_(ctx.scale), None, None


class _TritonResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        residual_TD: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
        p: float,
        randomness: Randomness | None,
        site: int,
    ) -> Tensor:
        x_TD, residual_TD = x_TD.contiguous(), residual_TD.contiguous()
        where = counter_tensors(randomness, p)
        normed_TD: Tensor
        normed_TD, mean_T, rstd_T = _forward(
            x_TD, residual_TD, weight_D, bias_D, *where, eps, p, site
        )
        ctx.save_for_backward(x_TD, residual_TD, weight_D, mean_T, rstd_T, *where)
        ctx.p, ctx.site, ctx.bias_dtype = p, site, bias_D.dtype
        return normed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TD: Tensor) -> tuple[Tensor | None, ...]:
        dx_TD, dresidual_TD, sums_2D = _backward(
            upstream_TD.contiguous(), *ctx.saved_tensors, ctx.p, ctx.site
        )
        dweight_D, dbias_D = sums_2D
        weight_dtype = ctx.saved_tensors[2].dtype
        dnorm = (dweight_D.to(weight_dtype), dbias_D.to(ctx.bias_dtype))
        return dx_TD, dresidual_TD, *dnorm, None, None, None, None


CONFIGS = {
    32: (16, 4),
    64: (8, 4),
    128: (8, 4),
    256: (4, 4),
    512: (2, 4),
    1_024: (1, 4),
    2_048: (1, 8),
    4_096: (1, 16),
}
"""Features up to → (rows of a block, warps): eight elements a thread, one load of 16 bytes in
bf16. Not tuned on a GPU yet."""

BACKWARD_PROGRAMS = 256
"""At most; twice the multiprocessors of an H100. A fixed number, so that sums over rows come out
the same on every GPU."""


def row_config(num_features: int) -> tuple[int, int, int]:
    """(rows of a block, its width, warps)."""
    for most, (rows, warps) in CONFIGS.items():
        if num_features <= most:
            return rows, max(8, next_power_of_2(num_features)), warps
    raise ValueError(f"{num_features} features; the Triton layer norm takes {max(CONFIGS)} at most")


def _fake_forward(x_TD: Tensor, residual_TD: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics_T = x_TD.new_empty(len(x_TD), dtype=torch.float32)
    return torch.empty_like(x_TD), statistics_T, torch.empty_like(statistics_T)


@torch_operator(
    "residual_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? key, "
    "Tensor? draws, Tensor? positions, float eps, float p, int site) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    key: Tensor | None,
    draws_T: Tensor | None,
    positions_T: Tensor | None,
    eps: float,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    normed_TD, mean_T, rstd_T = outputs = _fake_forward(x_TD, residual_TD)
    num_rows, num_features = x_TD.shape
    block_rows, block_width, warps = row_config(num_features)
    drop_below, scale = lane_threshold(p)
    if num_rows:
        residual_norm_forward_kernel[(-(-num_rows // block_rows),)](
            x_TD,
            residual_TD,
            weight_D,
            bias_D,
            normed_TD,
            mean_T,
            rstd_T,
            key,
            draws_T,
            positions_T,
            num_rows,
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
def norm_gradient(
    g_RD: "Pointer", xhat_RD: "Pointer", rstd_R1: "Pointer", D: tl.constexpr
) -> "Pointer":
    """dh from g, the gradient of x̂; all are blocks, 0 beyond the features."""
    mean_g_R1 = (tl.sum(g_RD, axis=1) / D)[:, None]
    mean_gx_R1 = (tl.sum(g_RD * xhat_RD, axis=1) / D)[:, None]
    return rstd_R1 * (g_RD - mean_g_R1 - xhat_RD * mean_gx_R1)


@jit
def residual_norm_forward_kernel(
    x_TD: "Pointer",
    residual_TD: "Pointer",
    weight_D: "Pointer",
    bias_D: "Pointer",
    normed_TD: "Pointer",
    mean_T: "Pointer",
    rstd_T: "Pointer",
    key: "Pointer",
    draws_T: "Pointer",
    positions_T: "Pointer",
    num_rows: int,
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
    is_row_R, is_feature_D = rows_R < num_rows, features_D < D
    inside_RD = is_row_R[:, None] & is_feature_D[None, :]
    places_RD = rows_R[:, None].to(tl.int64) * D + features_D[None, :]

    hidden_RD = tl.load(x_TD + places_RD, mask=inside_RD, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        kept_RD = keep_mask(
            key, draws_T, positions_T, rows_R, is_row_R, site, drop_below, BLOCK_R, BLOCK_D
        )
        hidden_RD = tl.where(kept_RD, hidden_RD * scale, 0.0)
    hidden_RD += tl.load(residual_TD + places_RD, mask=inside_RD, other=0.0).to(tl.float32)

    mean_R = tl.sum(hidden_RD, axis=1) / D
    centred_RD = tl.where(inside_RD, hidden_RD - mean_R[:, None], 0.0)
    rstd_R = 1.0 / tl.sqrt(tl.sum(centred_RD * centred_RD, axis=1) / D + eps)
    weight_1D = tl.load(weight_D + features_D, mask=is_feature_D, other=0.0).to(tl.float32)[None, :]
    bias_1D = tl.load(bias_D + features_D, mask=is_feature_D, other=0.0).to(tl.float32)[None, :]
    normed_RD = centred_RD * rstd_R[:, None] * weight_1D + bias_1D
    tl.store(normed_TD + places_RD, normed_RD, mask=inside_RD)
    tl.store(mean_T + rows_R, mean_R, mask=is_row_R)
    tl.store(rstd_T + rows_R, rstd_R, mask=is_row_R)


def _fake_backward(
    upstream_TD: Tensor, x_TD: Tensor, residual_TD: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sums_2D = x_TD.new_empty(2, x_TD.shape[1], dtype=torch.float32)
    return torch.empty_like(x_TD), torch.empty_like(residual_TD), sums_2D


@torch_operator(
    "residual_norm_backward(Tensor upstream, Tensor x, Tensor residual, Tensor weight, "
    "Tensor mean, Tensor rstd, Tensor? key, Tensor? draws, Tensor? positions, float p, int site) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
def _backward(
    upstream_TD: Tensor,
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    key: Tensor | None,
    draws_T: Tensor | None,
    positions_T: Tensor | None,
    p: float,
    site: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx_TD, dresidual_TD, [2, D] fp32: dweight and dbias)."""
    dx_TD, dresidual_TD = torch.empty_like(x_TD), torch.empty_like(residual_TD)
    num_rows, num_features = x_TD.shape
    block_rows, block_width, warps = row_config(num_features)
    drop_below, scale = lane_threshold(p)
    programs = min(BACKWARD_PROGRAMS, -(-num_rows // block_rows))
    shares_P2D = mean_T.new_empty(programs, 2, num_features)
    if num_rows:
        residual_norm_backward_kernel[(programs,)](
            upstream_TD,
            x_TD,
            residual_TD,
            weight_D,
            mean_T,
            rstd_T,
            dx_TD,
            dresidual_TD,
            shares_P2D,
            key,
            draws_T,
            positions_T,
            num_rows,
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
    return dx_TD, dresidual_TD, shares_P2D.sum(0)


@jit
def residual_norm_backward_kernel(
    upstream_TD: "Pointer",
    x_TD: "Pointer",
    residual_TD: "Pointer",
    weight_D: "Pointer",
    mean_T: "Pointer",
    rstd_T: "Pointer",
    dx_TD: "Pointer",
    dresidual_TD: "Pointer",
    shares_P2D: "Pointer",
    key: "Pointer",
    draws_T: "Pointer",
    positions_T: "Pointer",
    num_rows: int,
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
    weight_1D = tl.load(weight_D + features_D, mask=is_feature_D, other=0.0).to(tl.float32)[None, :]
    dweight_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dbias_RD = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        is_row_R = rows_R < num_rows
        inside_RD = is_row_R[:, None] & is_feature_D[None, :]
        places_RD = rows_R[:, None].to(tl.int64) * D + features_D[None, :]

        hidden_RD = tl.load(x_TD + places_RD, mask=inside_RD, other=0.0).to(tl.float32)
        if HAS_DROPOUT:
            kept_RD = keep_mask(
                key, draws_T, positions_T, rows_R, is_row_R, site, drop_below, BLOCK_R, BLOCK_D
            )
            hidden_RD = tl.where(kept_RD, hidden_RD * scale, 0.0)
        hidden_RD += tl.load(residual_TD + places_RD, mask=inside_RD, other=0.0).to(tl.float32)
        mean_R1 = tl.load(mean_T + rows_R, mask=is_row_R, other=0.0)[:, None]
        rstd_R1 = tl.load(rstd_T + rows_R, mask=is_row_R, other=0.0)[:, None]
        xhat_RD = tl.where(inside_RD, (hidden_RD - mean_R1) * rstd_R1, 0.0)

        upstream_RD = tl.load(upstream_TD + places_RD, mask=inside_RD, other=0.0).to(tl.float32)
        dweight_RD += upstream_RD * xhat_RD
        dbias_RD += upstream_RD

        dhidden_RD = norm_gradient(upstream_RD * weight_1D, xhat_RD, rstd_R1, D)
        tl.store(dresidual_TD + places_RD, dhidden_RD, mask=inside_RD)
        if HAS_DROPOUT:
            dhidden_RD = tl.where(kept_RD, dhidden_RD * scale, 0.0)
        tl.store(dx_TD + places_RD, dhidden_RD, mask=inside_RD)

    share = shares_P2D + tl.program_id(0) * 2 * D + features_D
    tl.store(share, tl.sum(dweight_RD, axis=0), mask=is_feature_D)
    tl.store(share + D, tl.sum(dbias_RD, axis=0), mask=is_feature_D)
