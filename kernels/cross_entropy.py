"""Class-weighted cross-entropy with margin and scale: loss and gradient in one pass.

One operation covers the losses of two-stage fine-tuning:

    z_bc = s · (logits_bc − m_c · [c = y_b])               margin on the true class, then scale
    L    = Σ_b w_{y_b} · (logsumexp_c z_bc − z_{b,y_b})  /  Σ_b w_{y_b}

    plain cross-entropy     w = 1,  m = 0,  s = 1
    class-weighted          w_c,    m = 0,  s = 1
    LDAM                    w_c,    m_c = max_m · (n_c / n_min)^(-1/4),  s

`training/losses.py` has the same formulas with the gradient left to autograd.

Gradient. With p_bc = softmax(z_b)_c, and dz/dlogits = s,

    ∂L/∂logits_bc = s · (w_{y_b} / Σ_b w_{y_b}) · (p_bc − [c = y_b])

Everything on the right is at hand once the loss has been computed, so the forward pass writes the
gradient too and the backward pass is one multiplication by the upstream gradient. The softmax is
never recomputed and no [B, C] intermediate of the forward pass is kept alive. The weighted mean is
normalised on the device: nothing waits for the host.

In Triton, a program takes a tile of rows × classes, since a row of two classes alone would leave
its threads idle. Σ_b w_{y_b} is known only when all programs are done, so the tiles write their
gradient without it, a second launch of one program adds up what they found, and the backward pass,
which multiplies by the upstream gradient anyway, divides by it there.

Shapes: B examples, C classes; in Triton, blocks of R rows and P programs. Loss arithmetic is fp32
(fp64 for fp64 logits), whatever the precision of the logits.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import Pointer, jit, next_power_of_2, tl, torch_operator, use_triton

IGNORED_LABEL = -100
"""Of a row that counts neither in the loss nor in its mean: torch's own `ignore_index`."""


def fused_cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    class_weights_C: Tensor | None = None,
    margins_C: Tensor | None = None,
    scale: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Weighted mean cross-entropy of `scale * (logits - margin of the true class)`.

    logits_BC: [B, C], any floating dtype. labels_B: [B], integer, each in 0 … C-1 or IGNORED_LABEL.
    class_weights_C, margins_C: [C] or None (ones; zeros); no gradient flows to them.
    Returns a scalar in fp32 (fp64 for fp64 logits).
    """
    # Inside a Function's forward, grad mode is off whatever it was outside.
    with_gradient = torch.is_grad_enabled() and logits_BC.requires_grad
    function: Any = _TritonCrossEntropy if use_triton(impl, logits_BC) else _TorchCrossEntropy
    loss: Tensor = function.apply(
        logits_BC, labels_B, class_weights_C, margins_C, float(scale), with_gradient
    )
    return loss


class _TorchCrossEntropy(torch.autograd.Function):
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
        is_counted_B = labels_B != IGNORED_LABEL
        labels_B = labels_B.where(is_counted_B, 0)
        labels_B1 = labels_B[:, None]
        # `copy`: the in-place steps below must not touch the caller's logits.
        z_BC = logits_BC.detach().to(_loss_dtype(logits_BC), copy=True)
        if margins_C is not None:
            z_BC.scatter_add_(1, labels_B1, -margins_C.to(z_BC.dtype)[labels_B1])
        log_probabilities_BC = torch.log_softmax(z_BC.mul_(scale), dim=1)
        negative_log_likelihood_B = -log_probabilities_BC.gather(1, labels_B1)[:, 0]

        weights_B = is_counted_B.to(z_BC.dtype)
        if class_weights_C is not None:
            weights_B *= class_weights_C.to(z_BC.dtype)[labels_B]
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


class _TritonCrossEntropy(torch.autograd.Function):
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
        loss: Tensor
        loss, total_weight, gradient_BC = _forward(
            logits_BC.contiguous(),
            labels_B.contiguous(),
            None if class_weights_C is None else class_weights_C.contiguous(),
            None if margins_C is None else margins_C.contiguous(),
            scale,
            with_gradient,
        )
        ctx.save_for_backward(gradient_BC, total_weight)
        ctx.logits_dtype = logits_BC.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        gradient_BC, total_weight = ctx.saved_tensors
        scaled_BC: Tensor = _backward(gradient_BC, total_weight, upstream, ctx.logits_dtype)
        return scaled_BC, None, None, None, None, None


def _loss_dtype(logits_BC: Tensor) -> torch.dtype:
    return torch.float64 if logits_BC.dtype == torch.float64 else torch.float32


CONFIGS = {
    2: (256, 4),
    8: (128, 4),
    32: (32, 4),
    128: (8, 4),
    512: (2, 4),
    1_024: (1, 4),
    8_192: (1, 16),
}
"""Classes up to → (rows of a block, warps): some eight logits a thread. Not tuned on a GPU yet."""

BLOCK = 1_024
"""Elements of a program where there are no rows."""


def _config(num_classes: int) -> tuple[int, int, int]:
    """(rows of a block, its width, warps)."""
    for most, (rows, warps) in CONFIGS.items():
        if num_classes <= most:
            return rows, max(2, next_power_of_2(num_classes)), warps
    raise ValueError(f"{num_classes} classes; the Triton loss takes {max(CONFIGS)} at most")


def _fake_forward(
    logits_BC: Tensor,
    labels_B: Tensor,
    class_weights_C: Tensor | None,
    margins_C: Tensor | None,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    fp32 = torch.float32
    gradient_BC = logits_BC.new_empty(logits_BC.shape if with_gradient else (0, 0), dtype=fp32)
    return logits_BC.new_empty((), dtype=fp32), logits_BC.new_empty((), dtype=fp32), gradient_BC


@torch_operator(
    "cross_entropy_forward(Tensor logits, Tensor labels, Tensor? class_weights, Tensor? margins, "
    "float scale, bool with_gradient) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
)
def _forward(
    logits_BC: Tensor,
    labels_B: Tensor,
    class_weights_C: Tensor | None,
    margins_C: Tensor | None,
    scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, Σ_b w_{y_b}, the gradient without its division by that, fp32)."""
    loss, total_weight, gradient_BC = outputs = _fake_forward(
        logits_BC, labels_B, class_weights_C, margins_C, scale, with_gradient
    )
    num_rows, num_classes = logits_BC.shape
    block_rows, block_width, warps = _config(num_classes)
    programs = -(-num_rows // block_rows)
    shares_2P = loss.new_empty(2, programs)
    if num_rows:
        cross_entropy_forward_kernel[(programs,)](
            logits_BC,
            labels_B,
            class_weights_C,
            margins_C,
            gradient_BC,
            shares_2P,
            num_rows,
            num_classes,
            scale,
            IGNORED=IGNORED_LABEL,
            WITH_GRADIENT=with_gradient,
            BLOCK_R=block_rows,
            BLOCK_C=block_width,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        cross_entropy_reduce_kernel[(1,)](
            shares_2P,
            loss,
            total_weight,
            programs,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    else:
        loss.zero_()
        total_weight.zero_()
    return outputs


@jit
def cross_entropy_forward_kernel(
    logits_BC: "Pointer",
    labels_B: "Pointer",
    class_weights_C: "Pointer",
    margins_C: "Pointer",
    gradient_BC: "Pointer",
    shares_2P: "Pointer",
    num_rows: int,
    C: tl.constexpr,
    scale: float,
    IGNORED: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    rows_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    classes_C = tl.arange(0, BLOCK_C)
    is_row_R, is_class_C = rows_R < num_rows, classes_C < C
    inside_RC = is_row_R[:, None] & is_class_C[None, :]
    places_RC = rows_R[:, None].to(tl.int64) * C + classes_C[None, :]
    labels_R = tl.load(labels_B + rows_R, mask=is_row_R, other=0)
    is_label_RC = classes_C[None, :] == labels_R[:, None]
    # A label that is no class reads nothing and makes the loss NaN, which stops the training.
    is_known_R = (labels_R >= 0) & (labels_R < C)

    z_RC = tl.load(logits_BC + places_RC, mask=inside_RC, other=0.0).to(tl.float32)
    if margins_C is not None:
        margins_R = tl.load(margins_C + labels_R, mask=is_known_R, other=0.0).to(tl.float32)
        z_RC = tl.where(is_label_RC, z_RC - margins_R[:, None], z_RC)
    z_RC = tl.where(is_class_C[None, :], z_RC * scale, float("-inf"))
    shifted_RC = z_RC - tl.max(z_RC, axis=1)[:, None]
    exponentials_RC = tl.exp(shifted_RC)
    sums_R = tl.sum(exponentials_RC, axis=1)
    nll_R = tl.log(sums_R) - tl.sum(tl.where(is_label_RC, shifted_RC, 0.0), axis=1)

    weights_R = tl.where(is_known_R, 1.0, float("nan"))
    weights_R = tl.where(labels_R == IGNORED, 0.0, weights_R)
    if class_weights_C is not None:
        read_R = tl.load(class_weights_C + labels_R, mask=is_known_R, other=0.0).to(tl.float32)
        weights_R *= read_R
    weights_R = tl.where(is_row_R, weights_R, 0.0)
    losses_R = tl.where(is_row_R, weights_R * nll_R, 0.0)
    tl.store(shares_2P + tl.program_id(0), tl.sum(losses_R, axis=0))
    tl.store(shares_2P + tl.num_programs(0) + tl.program_id(0), tl.sum(weights_R, axis=0))
    if WITH_GRADIENT:
        difference_RC = exponentials_RC / sums_R[:, None] - is_label_RC.to(tl.float32)
        gradient_RC = (scale * weights_R)[:, None] * difference_RC
        tl.store(gradient_BC + places_RC, gradient_RC, mask=inside_RC)


@jit
def cross_entropy_reduce_kernel(
    shares_2P: "Pointer",
    loss: "Pointer",
    total_weight: "Pointer",
    num_programs: int,
    BLOCK: tl.constexpr,
) -> None:
    losses_N = tl.zeros([BLOCK], tl.float32)
    weights_N = tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_programs, BLOCK):
        programs_N = first + tl.arange(0, BLOCK)
        inside_N = programs_N < num_programs
        losses_N += tl.load(shares_2P + programs_N, mask=inside_N, other=0.0)
        weights_N += tl.load(shares_2P + num_programs + programs_N, mask=inside_N, other=0.0)
    weight = tl.sum(weights_N, axis=0)
    tl.store(loss, tl.sum(losses_N, axis=0) / weight)
    tl.store(total_weight, weight)


def _fake_backward(
    gradient_BC: Tensor, total_weight: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty_like(gradient_BC, dtype=dtype)


@torch_operator(
    "cross_entropy_backward(Tensor gradient, Tensor total_weight, Tensor upstream, "
    "ScalarType dtype) -> Tensor",
    fake=_fake_backward,
)
def _backward(
    gradient_BC: Tensor, total_weight: Tensor, upstream: Tensor, dtype: torch.dtype
) -> Tensor:
    scaled_BC = _fake_backward(gradient_BC, total_weight, upstream, dtype)
    count = gradient_BC.numel()
    if count:
        cross_entropy_backward_kernel[(-(-count // BLOCK),)](
            gradient_BC,
            total_weight,
            upstream,
            scaled_BC,
            count,
            BLOCK=BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return scaled_BC


@jit
def cross_entropy_backward_kernel(
    gradient_BC: "Pointer",
    total_weight: "Pointer",
    upstream: "Pointer",
    scaled_BC: "Pointer",
    count: int,
    BLOCK: tl.constexpr,
) -> None:
    places_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside_N = places_N < count
    factor = tl.load(upstream).to(tl.float32) / tl.load(total_weight)
    gradient_N = tl.load(gradient_BC + places_N, mask=inside_N, other=0.0)
    # Rounded last: upstream may hold a loss scale that brings tiny gradients into fp16's range.
    tl.store(scaled_BC + places_N, gradient_N * factor, mask=inside_N)
