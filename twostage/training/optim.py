"""AdamW, the linear schedule, and clipping.

The update itself is `kernels/adamw.py` (Loshchilov & Hutter 2019): one pass over weights, gradients
and both moments. The recipe asks for eps 1e-8, weight decay 0, betas 0.9 and 0.999.

Shapes: P trained weights, end to end.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.adamw import adamw_
from .precision import WorkingCopy


@dataclass(frozen=True)
class Moments:
    """What AdamW remembers. It is updated in place."""

    exp_avg_P: Tensor
    """[P] fp32: running mean of the gradients."""
    exp_avg_sq_P: Tensor
    """[P] fp32: running mean of their squares."""
    updates: Tensor
    """Scalar fp32 on the device: how often the weights have been updated."""


def make_moments(weights_P: Tensor) -> Moments:
    """Of an optimizer that has not begun."""
    zeros = torch.zeros_like
    return Moments(zeros(weights_P), zeros(weights_P), weights_P.new_zeros(()))


@torch.no_grad()
def update_weights(
    work: WorkingCopy,
    gradients_P: Tensor,
    moments: Moments,
    learning_rate: Tensor,
    divisor: Tensor,
    skip: Tensor,
    impl: str = "auto",
) -> None:
    """One step of AdamW on the masters and the rounding of the new weights into the copy.

    gradients_P: from the working copy. learning_rate (fp64), divisor, skip: scalars on the device;
    the gradients are divided by `divisor`, and where `skip` is 1.0, nothing happens.
    """
    assert moments.exp_avg_P.shape == work.weights_P.shape, "moments of another table"
    moments.updates.add_(1.0 - skip)
    border = work.num_unrounded
    for part, rounded_P in ((slice(border), None), (slice(border, None), work.rounded_P)):
        adamw_(
            work.weights_P[part],
            gradients_P[part],
            moments.exp_avg_P[part],
            moments.exp_avg_sq_P[part],
            moments.updates,
            learning_rate,
            divisor,
            skip,
            rounded_P=rounded_P,
            impl=impl,
        )


def linear_decay(step: int, total_steps: int) -> float:
    """The learning rate's factor at `step`, counted from 0: from 1 down to 0, no warm-up.

    0 from `total_steps` on, as the published schedule of augmented stage 1 needs.
    """
    return max(0.0, 1.0 - step / total_steps)


def clip_divisor(
    gradients_P: Tensor, max_norm: float, loss_factor: Tensor
) -> tuple[Tensor, Tensor]:
    """(norm, divisor): dividing the gradients by `divisor` makes their L2 norm at most `max_norm`.

    gradients_P: all gradients end to end, fp32. loss_factor: scalar by which the loss was
    multiplied, and so they; norm and clipping are those without it. Both results are scalars on the
    device; the host does not wait. The division is left to the optimizer, which has the gradients
    in its hands anyway.
    """
    norm = torch.dot(gradients_P, gradients_P).sqrt() / loss_factor
    return norm, ((norm + 1e-6) / max_norm).clamp(min=1.0) * loss_factor
