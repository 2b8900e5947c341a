"""Dynamic loss scaling, so that fp16 keeps its small gradients.

fp16 has no number between 0 and 6e-8, and many gradients are smaller. So the loss is multiplied by
a factor before backward, every gradient with it, and the optimizer divides them by it again in
fp32. The factor should be as large as it can be before a gradient overflows at 65,504. It is found
by trying: a step whose gradient overflows is left out and halves the factor; 2,000 steps in a row
without one double it.

What is saved: the small gradients that the plain step's fixed factor loses, and the large ones at
which it stops; and the host sync of torch's own scaler, since the overflow is seen in the norm of
the gradient, which is computed anyway, and all else stays on the device. Exact where nothing is
lost: dividing by a power of two rounds nothing. Its speed has not been measured on a GPU.

Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), section 3.2.
"""

import torch
from torch import Tensor

from .step import Step

FIRST_FACTOR = 2.0**16
LARGEST_FACTOR = 2.0**24
GROW_AFTER = 2_000
"""Steps in a row without overflow. All three are the field's custom."""


def scale_loss(step: Step) -> None:
    """Scale the loss of steps that compute in fp16."""
    if step.model.bert.pooler.weight.dtype == torch.float16:
        scale = LossScale(step.state.optimizer, step.device)
        step.loss_factor = scale.factor
        step.guards.append(scale.update)


class LossScale:
    """The factor, and how it moves."""

    def __init__(self, memory: dict[str, Tensor], device: torch.device) -> None:
        """memory: `TrainingState.optimizer`."""
        first, zero = torch.tensor(FIRST_FACTOR, device=device), torch.zeros((), device=device)
        self.factor = memory.setdefault("loss_factor", first)
        """Scalar fp32, a power of two."""
        self.calm_steps = memory.setdefault("calm_steps", zero)
        """Scalar fp32: steps since the last overflow or doubling."""

    def update(self, loss: Tensor, grad_norm: Tensor, skip: Tensor) -> Tensor:
        """A guard of `Step`: leave out the step that overflows, and adapt the factor."""
        overflows = ~torch.isfinite(grad_norm)
        calm = torch.where(overflows, 0.0, self.calm_steps + 1.0)
        grows = calm == GROW_AFTER
        change = torch.where(overflows, 0.5, torch.where(grows, 2.0, 1.0))
        factor = (change * self.factor).clamp(1.0, LARGEST_FACTOR)
        self.factor.copy_(torch.where(skip, self.factor, factor))
        self.calm_steps.copy_(torch.where(skip, self.calm_steps, torch.where(grows, 0.0, calm)))
        return skip | overflows
