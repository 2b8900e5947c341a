"""AdamW, the linear schedule, and clipping.

The optimizer is torch's fused AdamW (Loshchilov & Hutter 2019): one pass over weights, gradients
and both moments. The recipe asks for eps 1e-8, weight decay 0, betas 0.9 and 0.999.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


def make_adamw(
    parameters: Iterable[Tensor],
    learning_rate: float,
    weight_decay: float = 0.0,
    previous: torch.optim.AdamW | None = None,
) -> torch.optim.AdamW:
    """AdamW over fp32 parameters; it goes on from the moments of `previous`, if given.

    previous: of parameters of the same shapes in the same order; its settings are not taken over.
    """
    optimizer = torch.optim.AdamW(
        list(parameters),
        lr=learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=weight_decay,
        fused=True,
    )
    if previous is not None:
        settings = optimizer.state_dict()["param_groups"]
        moments = previous.state_dict()["state"]
        optimizer.load_state_dict({"state": moments, "param_groups": settings})
        for parameter, state in optimizer.state.items():
            assert state["exp_avg"].shape == parameter.shape, "moments of another table"
    return optimizer


def linear_decay(step: int, total_steps: int) -> float:
    """The learning rate's factor at `step`, counted from 0: from 1 down to 0, no warm-up.

    0 from `total_steps` on, as the published schedule of augmented stage 1 needs.
    """
    return max(0.0, 1.0 - step / total_steps)


def clip_divisor(gradients_P: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """(norm, divisor): dividing the gradients by `divisor` makes their L2 norm at most `max_norm`.

    gradients_P: all gradients end to end, fp32. Both are scalars on the device; the host does not
    wait. The division is left to the optimizer, which has the gradients in its hands anyway.
    """
    norm = torch.dot(gradients_P, gradients_P).sqrt()
    return norm, ((norm + 1e-6) / max_norm).clamp(min=1.0)
