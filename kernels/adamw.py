"""AdamW over flat buffers: every trained weight in one pass over memory.

With g the gradient divided by `divisor` and t the number of this update (Loshchilov & Hutter 2019,
algorithm 2, without weight decay; `training/optim.py` has it as code):

    m ← m + (1 − β1) · (g − m)                 running mean of the gradients
    v ← β2 · v + (1 − β2) · g²                 running mean of their squares
    w ← w − lr / (1 − β1ᵗ) · m / (√v / √(1 − β2ᵗ) + eps)
    rounded ← w                                in bf16 or fp16

The divisions by 1 − βᵗ undo that m and v start at 0: after t updates, their weights of past
gradients sum to 1 − βᵗ only.

An encoder has some 200 parameters, and the same few operations for each of them. Here they lie end
to end, so that one launch serves all, and w, g, m and v are read once and written once: 16 bytes in
and 12 out a weight, and 2 more for the rounded copy that forward and backward use, which else would
cost a pass of its own.

Learning rate, t, divisor (the clip factor and the loss scale) and the flag `skip` are read from
device memory when the kernel runs: the host need not know them when it launches, and a CUDA graph
can launch the same kernel again with other values in the same places.

Shapes: P weights.
"""

import math

import torch
from torch import Tensor

from . import Pointer, jit, tl, torch_operator, use_triton

BETAS = (0.9, 0.999)
EPS = 1e-8


def adamw_(
    weights_P: Tensor,
    gradients_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    update: Tensor,
    learning_rate: Tensor,
    divisor: Tensor,
    skip: Tensor,
    *,
    rounded_P: Tensor | None = None,
    impl: str = "auto",
) -> None:
    """One update, in place, of weights and moments; without autograd.

    weights_P, exp_avg_P, exp_avg_sq_P: [P] fp32, contiguous. gradients_P: [P] fp32, bf16 or fp16;
    the torch path may leave them divided. rounded_P: [P] bf16 or fp16, gets the new weights. The
    rest are scalars on the device: update, the number of this one from 1, fp32; learning_rate,
    fp64; divisor of the gradients, fp32; skip, fp32: 0.0, or 1.0, and then nothing changes (the
    torch path rounds the same weights into the copy again).
    """
    if use_triton(impl, weights_P):
        _update(
            weights_P,
            gradients_P,
            exp_avg_P,
            exp_avg_sq_P,
            update,
            learning_rate,
            divisor,
            skip,
            rounded_P,
        )
        return
    torch._fused_adamw_(
        [weights_P],
        [gradients_P.to(weights_P.dtype)],
        [exp_avg_P],
        [exp_avg_sq_P],
        [],
        [update],
        # Its CUDA kernel reads the rate as fp32, its CPU kernel as fp64.
        lr=learning_rate.float() if weights_P.is_cuda else learning_rate,
        beta1=BETAS[0],
        beta2=BETAS[1],
        weight_decay=0.0,
        eps=EPS,
        amsgrad=False,
        maximize=False,
        grad_scale=divisor,
        found_inf=skip,
    )
    if rounded_P is not None:
        rounded_P.copy_(weights_P)


BLOCK, WARPS = 1_024, 4
"""Weights of a program: eight a thread, two loads of 16 bytes of each buffer. Not tuned on a
GPU yet."""


@torch_operator(
    "adamw_(Tensor(a!) weights, Tensor gradients, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, "
    "Tensor update, Tensor learning_rate, Tensor divisor, Tensor skip, Tensor(d!)? rounded) "
    "-> ()",
    fake=lambda *_: None,
)
def _update(
    weights_P: Tensor,
    gradients_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    update: Tensor,
    learning_rate: Tensor,
    divisor: Tensor,
    skip: Tensor,
    rounded_P: Tensor | None,
) -> None:
    num_weights = weights_P.numel()
    if num_weights:
        adamw_kernel[(-(-num_weights // BLOCK),)](
            weights_P,
            gradients_P,
            exp_avg_P,
            exp_avg_sq_P,
            rounded_P,
            update,
            learning_rate,
            divisor,
            skip,
            num_weights,
            BETA1=BETAS[0],
            BETA2=BETAS[1],
            LOG_BETA1=math.log(BETAS[0]),
            LOG_BETA2=math.log(BETAS[1]),
            EPS=EPS,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


@jit
def adamw_kernel(
    weights_P: "Pointer",
    gradients_P: "Pointer",
    exp_avg_P: "Pointer",
    exp_avg_sq_P: "Pointer",
    rounded_P: "Pointer",
    update: "Pointer",
    learning_rate: "Pointer",
    divisor: "Pointer",
    skip: "Pointer",
    num_weights: int,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    if tl.load(skip) != 0.0:
        return
    # βᵗ in fp64: in fp32, 1 - 0.999 has four digits.
    t = tl.load(update).to(tl.float64)
    debias1 = (1.0 - tl.exp(t * tl.full([], LOG_BETA1, tl.float64))).to(tl.float32)
    debias2 = (1.0 - tl.exp(t * tl.full([], LOG_BETA2, tl.float64))).to(tl.float32)
    step_size, correction = tl.load(learning_rate).to(tl.float32) / debias1, tl.sqrt(debias2)

    first = tl.program_id(0).to(tl.int64) * BLOCK
    places = first + tl.arange(0, BLOCK)
    # A mask that could end within 16 bytes would cut every load to single numbers: only the last
    # block has one.
    if first + BLOCK <= num_weights:
        _update_block(
            weights_P + places,
            gradients_P + places,
            exp_avg_P + places,
            exp_avg_sq_P + places,
            None if rounded_P is None else rounded_P + places,
            None,
            tl.load(divisor),
            step_size,
            correction,
            BETA1,
            BETA2,
            EPS,
        )
    else:
        _update_block(
            weights_P + places,
            gradients_P + places,
            exp_avg_P + places,
            exp_avg_sq_P + places,
            None if rounded_P is None else rounded_P + places,
            places < num_weights,
            tl.load(divisor),
            step_size,
            correction,
            BETA1,
            BETA2,
            EPS,
        )


@jit
def _update_block(
    weights: "Pointer",
    gradients: "Pointer",
    exp_avg: "Pointer",
    exp_avg_sq: "Pointer",
    rounded: "Pointer",
    inside: "Pointer",
    divisor: "Pointer",
    step_size: "Pointer",
    correction: "Pointer",
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
) -> None:
    g = tl.load(gradients, mask=inside).to(tl.float32) / divisor
    m = tl.load(exp_avg, mask=inside)
    v = tl.load(exp_avg_sq, mask=inside)
    w = tl.load(weights, mask=inside)
    m += (1.0 - BETA1) * (g - m)
    v = BETA2 * v + (1.0 - BETA2) * g * g
    w -= step_size * m / (tl.sqrt(v) / correction + EPS)
    tl.store(exp_avg, m, mask=inside)
    tl.store(exp_avg_sq, v, mask=inside)
    tl.store(weights, w, mask=inside)
    if rounded is not None:
        tl.store(rounded, w, mask=inside)
