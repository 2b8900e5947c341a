"""Class-weighted cross-entropy with margin and scale: loss and gradient in one pass.

One operation covers the losses of two-stage fine-tuning:

    z_bc = s · (logits_bc − m_c · [c = y_b])               margin on the true class, then scale
    L    = Σ_b w_{y_b} · (logsumexp_c z_bc − z_{b,y_b})  /  Σ_b w_{y_b}

    plain cross-entropy     w = 1,  m = 0,  s = 1
    class-weighted          w_c,    m = 0,  s = 1
    LDAM                    w_c,    m_c = max_m · (n_c / n_min)^(-1/4),  s

Gradient. With p_bc = softmax(z_b)_c, and dz/dlogits = s,

    ∂L/∂logits_bc = s · (w_{y_b} / Σ_b w_{y_b}) · (p_bc − [c = y_b])

Everything on the right is at hand once the loss has been computed, so the forward pass writes the
gradient too and the backward pass is one multiplication by the upstream gradient. The softmax is
never recomputed and no [B, C] intermediate of the forward pass is kept alive. The weighted mean is
normalised on the device: nothing waits for the host.

Shapes: B examples, C classes. Loss arithmetic is fp32 (fp64 for fp64 logits), whatever the
precision of the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def fused_cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    class_weights_C: Tensor | None = None,
    margins_C: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Weighted mean cross-entropy of `scale * (logits - margin of the true class)`.

    logits_BC: [B, C], any floating dtype. labels_B: [B], integer, each in 0 … C-1.
    class_weights_C, margins_C: [C] or None (ones; zeros); no gradient flows to them.
    Returns a scalar in fp32 (fp64 for fp64 logits).
    """
    # Inside a Function's forward, grad mode is off whatever it was outside.
    with_gradient = torch.is_grad_enabled() and logits_BC.requires_grad
    loss: Tensor = _FusedCrossEntropy.apply(
        logits_BC, labels_B, class_weights_C, margins_C, float(scale), with_gradient
    )
    return loss


def reference_cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    class_weights_C: Tensor | None = None,
    margins_C: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The same function, written as the formula and differentiated by autograd."""
    z_BC = logits_BC.to(_loss_dtype(logits_BC))
    one_hot_BC = torch.nn.functional.one_hot(labels_B, logits_BC.shape[1]).to(z_BC.dtype)
    if margins_C is not None:
        z_BC = z_BC - one_hot_BC * margins_C.to(z_BC.dtype)
    log_probabilities_BC = torch.log_softmax(scale * z_BC, dim=1)
    negative_log_likelihood_B = -(one_hot_BC * log_probabilities_BC).sum(dim=1)
    if class_weights_C is None:
        return negative_log_likelihood_B.mean()
    weights_B = class_weights_C.to(z_BC.dtype)[labels_B]
    return (weights_B * negative_log_likelihood_B).sum() / weights_B.sum()


class _FusedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_BC: Tensor,
        labels_B: Tensor,
        class_weights_C: Tensor | None,
        margins_C: Tensor | None,
        scale: float,
        with_gradient: bool,
    ) -> Tensor:
        labels_B1 = labels_B[:, None]
        # `copy`: the in-place steps below must not touch the caller's logits.
        z_BC = logits_BC.detach().to(_loss_dtype(logits_BC), copy=True)
        if margins_C is not None:
            z_BC.scatter_add_(1, labels_B1, -margins_C.to(z_BC.dtype)[labels_B1])
        log_probabilities_BC = torch.log_softmax(z_BC.mul_(scale), dim=1)
        negative_log_likelihood_B = -log_probabilities_BC.gather(1, labels_B1)[:, 0]

        if class_weights_C is None:
            shares_B = torch.full_like(negative_log_likelihood_B, 1.0 / max(1, len(labels_B)))
        else:
            weights_B = class_weights_C.to(z_BC.dtype)[labels_B]
            shares_B = weights_B / weights_B.sum()
        loss = torch.dot(shares_B, negative_log_likelihood_B)

        if with_gradient:
            gradient_BC = log_probabilities_BC.exp_()  # p_bc
            gradient_BC.scatter_add_(1, labels_B1, -torch.ones_like(labels_B1, dtype=z_BC.dtype))
            gradient_BC.mul_(scale * shares_B[:, None])
            ctx.save_for_backward(gradient_BC)
            ctx.logits_dtype = logits_BC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (gradient_BC,) = ctx.saved_tensors
        # Rounded last: upstream may hold a loss scale that brings tiny gradients into fp16's range.
        scaled_BC = (gradient_BC * upstream).to(ctx.logits_dtype)
        return scaled_BC, None, None, None, None, None


def _loss_dtype(logits_BC: Tensor) -> torch.dtype:
    return torch.float64 if logits_BC.dtype == torch.float64 else torch.float32
