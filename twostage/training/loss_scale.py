"""Loss scaling, which keeps the small gradients of fp16.

fp16 has no number between 0 and 6e-8, and many gradients are smaller. So the loss is multiplied by
a factor before backward, every gradient with it, and the optimizer divides them by it again in
fp32. The factor should be as large as it can be before a gradient overflows at 65,504, and nobody
knows how large that is. So it is found by trying: a step whose gradient overflowed is left out and
halves the factor; 2,000 steps in a row without one double it.

The overflow is seen in the norm of the gradient, which is computed anyway, and everything here
stays on the device: the host never waits to learn whether a step counted.

Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_FACTOR = 2.0**16
LARGEST_FACTOR = 2.0**24
GROW_AFTER = 2_000
"""Steps in a row without overflow. All three are the field's custom."""


@dataclass
class LossScale:
    """A factor for the loss; in fp32 and bf16, which need none, always 1."""

    factor: Tensor
    """Scalar fp32, a power of two."""
    calm_steps: Tensor
    """Scalar fp32: steps since the last overflow or doubling."""
    grows: bool
    """Whether the factor is to be as large as it can be."""

    def update(self, grad_norm: Tensor) -> Tensor:
        """Adapt the factor; call once a step.

        grad_norm: scalar, with the factor or without: what counts is whether it is finite. Returns
        1.0 when it is not and a smaller factor cannot help, else 0.0. Nobody waits for either.
        """
        overflow = (~torch.isfinite(grad_norm)).float()
        hopeless = overflow * (self.factor <= 1.0)
        if self.grows:
            self.calm_steps.add_(1.0).mul_(1.0 - overflow)
            grow = (self.calm_steps == GROW_AFTER).float()
            self.calm_steps.mul_(1.0 - grow)
            self.factor.mul_(1.0 + grow).mul_(1.0 - 0.5 * overflow).clamp_(1.0, LARGEST_FACTOR)
        return hopeless


def make_loss_scale(dtype: torch.dtype, device: torch.device) -> LossScale:
    """For gradients that are computed in `dtype`."""
    grows = dtype == torch.float16
    factor = torch.full((), FIRST_FACTOR if grows else 1.0, device=device)
    return LossScale(factor, torch.zeros((), device=device), grows)
