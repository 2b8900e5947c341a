"""AdamW, the linear schedule and gradient clipping, as formulas.

`kernels/adamw.py` computes the same update in one pass over all weights (`fast/weights.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.adamw import BETAS, EPS

MAX_GRAD_NORM = 1.0


def linear_decay(step: int, total_steps: int) -> float:
    """The learning rate's factor at `step`, counted from 0: from 1 down to 0, no warm-up.

    0 from `total_steps` on, as the published schedule of augmented stage 1 needs.
    """
    return max(0.0, 1.0 - step / total_steps)


def clip_gradients(gradients: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """(gradients scaled down to an L2 norm, over all of them, of MAX_GRAD_NORM; norm before)."""
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    divisor = ((norm + 1e-6) / MAX_GRAD_NORM).clamp(min=1.0)
    return [gradient / divisor for gradient in gradients], norm


@torch.no_grad()
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    update: int,
    learning_rate: float,
) -> None:
    """Update a weight and its two moments in place; all four tensors have one shape, in fp32.

    exp_avg, exp_avg_sq: running means of the gradient and of its square, from 0. update: number of
    this one, from 1. No weight decay. Source: Loshchilov & Hutter 2019, algorithm 2.
    """
    beta1, beta2 = BETAS
    exp_avg.mul_(beta1).add_((1 - beta1) * gradient)
    exp_avg_sq.mul_(beta2).add_((1 - beta2) * gradient**2)
    # After t updates the weights of past gradients sum to 1 - βᵗ only.
    mean, mean_sq = exp_avg / (1 - beta1**update), exp_avg_sq / (1 - beta2**update)
    weight.sub_(learning_rate * mean / (mean_sq.sqrt() + EPS))
