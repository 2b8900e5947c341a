"""Dropout, residual connection and layer norm as one operation: the end of each half of a layer.

    h = residual + x ⊙ mask / (1 − p)
    y = weight ⊙ (h − mean(h)) / √(var(h) + eps) + bias

Backward. Layer norm's own gradient gives dh (Ba, Kiros & Hinton 2016); from it

    dresidual = dh        dx = dh ⊙ mask / (1 − p)

Written out, dropout and residual are one pass over memory instead of three, and of the
intermediate tensors only h and the mask outlive the forward pass. The statistics of the norm are
fp32, for bf16 input too. For torch's CPU kernel to keep mean and 1/σ for backward so, weight and
bias must come in fp32 (with a bf16 weight it rounds them to 8 bits); its CUDA kernel keeps them in
fp32 by itself, and wants all of one dtype.

Shapes: T rows, D features.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .dropout import dropout, dropout_mask


def dropout_residual_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """LayerNorm(residual + dropout(x)), [T, D], in x's dtype.

    x_TD, residual_TD: of one dtype. weight_D, bias_D: fp32 on a CPU, x's dtype on a GPU.
    generator: on x's device; None turns dropout off.
    """
    if generator is None or p == 0.0:
        return F.layer_norm(residual_TD + x_TD, weight_D.shape, weight_D, bias_D, eps)
    mask_TD, scale = dropout_mask(x_TD.shape, p, generator, x_TD.dtype)
    normed_TD: Tensor = _DropoutResidualNorm.apply(
        x_TD, residual_TD, mask_TD, scale, weight_D, bias_D, eps
    )
    return normed_TD


def reference_dropout_residual_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    p: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The same function, step by step and differentiated by autograd."""
    hidden_TD = residual_TD + dropout(x_TD, p, generator)
    return F.layer_norm(hidden_TD, weight_D.shape, weight_D, bias_D, eps)


class _DropoutResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        residual_TD: Tensor,
        mask_TD: Tensor,
        scale: float,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
    ) -> Tensor:
        hidden_TD = torch.addcmul(residual_TD, x_TD, mask_TD, value=scale)
        normed_TD, mean_T1, rstd_T1 = torch.native_layer_norm(
            hidden_TD, weight_D.shape, weight_D, bias_D, eps
        )
        ctx.save_for_backward(hidden_TD, mask_TD, mean_T1, rstd_T1, weight_D, bias_D)
        ctx.scale = scale
        return normed_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_TD: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TD, mask_TD, mean_T1, rstd_T1, weight_D, bias_D = ctx.saved_tensors
        dhidden_TD, dweight_D, dbias_D = torch.ops.aten.native_layer_norm_backward(
            upstream_TD.contiguous(),
            hidden_TD,
            weight_D.shape,
            mean_T1,
            rstd_T1,
            weight_D,
            bias_D,
            [True, ctx.needs_input_grad[4], ctx.needs_input_grad[5]],
        )
        dx_TD = (dhidden_TD * mask_TD).mul_(ctx.scale)
        return dx_TD, dhidden_TD, None, None, dweight_D, dbias_D, None
