"""Bias and GELU as one operation: the middle of a layer's feed-forward half.

    z = x + bias
    y = z · Φ(z),     Φ(z) = ½ · (1 + erf(z / √2))

A unit is passed on by the probability that a standard normal variable lies below it (Hendrycks &
Gimpel 2016, arXiv 1606.08415). BERT was pretrained with this exact form; the tanh form that other
encoders use is an approximation, off by up to 5e-4, and another function.

Backward. Φ' is the normal density φ(z) = e^(−z²/2) / √(2π), so

    dx = dy · (Φ(z) + z · φ(z))       dbias = Σ_rows dx

Why the bias belongs to it: forward, x comes out of a matrix product and has to be read for the
activation anyway; backward, dx is at hand when its sum over the rows is wanted, which else costs a
pass over memory of its own. x is kept for backward, as it came out of the product; z is not.

In torch the bias is better left to the matrix product (`model/bert.py` does so), and this function
is its reference. In Triton, programs stand in a grid of rows × columns; backward, each walks down
its columns and adds up its share of dbias, and a last sum over the programs takes the place of
atomic additions, whose order would change from run to run.

Shapes: T rows, I features; in Triton, blocks of R rows and C columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from . import Pointer, jit, tl, torch_operator, use_triton


def bias_gelu(x_TI: Tensor, bias_I: Tensor, impl: str = "auto") -> Tensor:
    """GELU(x + bias), the erf form, [T, I], in x's dtype.

    bias_I: in x's dtype or fp32.
    """
    if use_triton(impl, x_TI):
        y_TI: Tensor = _TritonBiasGelu.apply(x_TI, bias_I)
        return y_TI
    return F.gelu((x_TI + bias_I).to(x_TI.dtype))


def reference_bias_gelu(x_TI: Tensor, bias_I: Tensor) -> Tensor:
    """The same function, written as the formula and differentiated by autograd."""
    z_TI = (x_TI + bias_I).to(x_TI.dtype)
    return z_TI * 0.5 * (1.0 + torch.erf(z_TI * 0.5**0.5))


class _TritonBiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, bias_I: Tensor) -> Tensor:
        x_TI, bias_I = x_TI.contiguous(), bias_I.contiguous()
        ctx.save_for_backward(x_TI, bias_I)
        y_TI: Tensor = _forward(x_TI, bias_I)
        return y_TI

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TI: Tensor) -> tuple[Tensor, Tensor]:
        dx_TI, dbias_I = _backward(upstream_TI.contiguous(), *ctx.saved_tensors)
        return dx_TI, dbias_I


BLOCK_R, BLOCK_C, WARPS = 4, 256, 4
"""Eight elements a thread, one load of 16 bytes in bf16. Not tuned on a GPU yet."""

BACKWARD_ROWS = 32
"""Programs in a column, at most: with 3,072 features, 384 in all, three to a multiprocessor of an
H100. A fixed number, so that sums over rows come out the same on every GPU."""


def _grid(x_TI: Tensor) -> tuple[int, int]:
    """(programs in a column, columns of programs), one block of rows to each program."""
    num_rows, num_features = x_TI.shape
    return -(-num_rows // BLOCK_R), -(-num_features // BLOCK_C)


@torch_operator(
    "bias_gelu_forward(Tensor x, Tensor bias) -> Tensor",
    fake=lambda x_TI, bias_I: torch.empty_like(x_TI),
)
def _forward(x_TI: Tensor, bias_I: Tensor) -> Tensor:
    y_TI = torch.empty_like(x_TI)
    if x_TI.numel():
        gelu_forward_kernel[_grid(x_TI)](
            x_TI,
            bias_I,
            y_TI,
            *x_TI.shape,
            BLOCK_R=BLOCK_R,
            BLOCK_C=BLOCK_C,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return y_TI


@jit
def gelu_forward_kernel(
    x_TI: "Pointer",
    bias_I: "Pointer",
    y_TI: "Pointer",
    num_rows: int,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column_C = columns_C < WIDTH
    inside_RC = (rows_R < num_rows)[:, None] & is_column_C[None, :]
    places_RC = rows_R[:, None].to(tl.int64) * WIDTH + columns_C[None, :]
    bias_1C = tl.load(bias_I + columns_C, mask=is_column_C, other=0.0).to(tl.float32)[None, :]
    z_RC = tl.load(x_TI + places_RC, mask=inside_RC, other=0.0).to(tl.float32) + bias_1C
    below_RC = 0.5 * (1.0 + tl.erf(z_RC * 0.7071067811865476))
    tl.store(y_TI + places_RC, z_RC * below_RC, mask=inside_RC)


@torch_operator(
    "bias_gelu_backward(Tensor upstream, Tensor x, Tensor bias) -> (Tensor, Tensor)",
    fake=lambda upstream_TI, x_TI, bias_I: (torch.empty_like(x_TI), torch.empty_like(bias_I)),
)
def _backward(upstream_TI: Tensor, x_TI: Tensor, bias_I: Tensor) -> tuple[Tensor, Tensor]:
    dx_TI = torch.empty_like(x_TI)
    rows, columns = _grid(x_TI)
    programs = min(rows, BACKWARD_ROWS)
    shares_PI = x_TI.new_empty(programs, x_TI.shape[1], dtype=torch.float32)
    if x_TI.numel():
        gelu_backward_kernel[(programs, columns)](
            upstream_TI,
            x_TI,
            bias_I,
            dx_TI,
            shares_PI,
            *x_TI.shape,
            BLOCK_R=BLOCK_R,
            BLOCK_C=BLOCK_C,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )
    return dx_TI, shares_PI.sum(0).to(bias_I.dtype)


@jit
def gelu_backward_kernel(
    upstream_TI: "Pointer",
    x_TI: "Pointer",
    bias_I: "Pointer",
    dx_TI: "Pointer",
    shares_PI: "Pointer",
    num_rows: int,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    columns_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column_C = columns_C < WIDTH
    bias_1C = tl.load(bias_I + columns_C, mask=is_column_C, other=0.0).to(tl.float32)[None, :]
    dbias_RC = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows_R = block * BLOCK_R + tl.arange(0, BLOCK_R)
        inside_RC = (rows_R < num_rows)[:, None] & is_column_C[None, :]
        places_RC = rows_R[:, None].to(tl.int64) * WIDTH + columns_C[None, :]
        z_RC = tl.load(x_TI + places_RC, mask=inside_RC, other=0.0).to(tl.float32) + bias_1C
        upstream_RC = tl.load(upstream_TI + places_RC, mask=inside_RC, other=0.0).to(tl.float32)
        below_RC = 0.5 * (1.0 + tl.erf(z_RC * 0.7071067811865476))
        density_RC = 0.3989422804014327 * tl.exp(-0.5 * z_RC * z_RC)
        dx_RC = upstream_RC * (below_RC + z_RC * density_RC)
        dbias_RC += dx_RC  # upstream is 0 outside
        tl.store(dx_TI + places_RC, dx_RC, mask=inside_RC)
    share_C = shares_PI + tl.program_id(0) * WIDTH + columns_C
    tl.store(share_C, tl.sum(dbias_RC, axis=0), mask=is_column_C)
