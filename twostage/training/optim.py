"""AdamW, the linear schedule, and clipping.

The optimizer is torch's fused AdamW (Loshchilov & Hutter 2019): one pass over weights, gradients
and both moments. The recipe asks for eps 1e-8, weight decay 0, betas 0.9 and 0.999.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def make_adamw(
    parameters: Iterable[Tensor], learning_rate: float, weight_decay: float = 0.0
) -> torch.optim.AdamW:
    """AdamW over fp32 parameters."""
    return torch.optim.AdamW(
        list(parameters),
        lr=learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=weight_decay,
        fused=True,
    )


def linear_decay(step: int, total_steps: int) -> float:
    """The learning rate's factor at `step`, counted from 0: from 1 down to 0, no warm-up.

    0 from `total_steps` on, as the published schedule of augmented stage 1 needs.
    """
    return max(0.0, 1.0 - step / total_steps)


def clip_gradients(gradients: list[Tensor], max_norm: float) -> Tensor:
    """Scale fp32 gradients in place so that their joint L2 norm is at most `max_norm`.

    Returns the norm before clipping, a scalar on the device; the host does not wait.
    """
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, factor)
    return norm
