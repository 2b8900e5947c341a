"""A step that is not finite, found without a host sync.

The plain step looks at every loss and gradient before it updates a weight. On a GPU such a look
waits for the device, at every step. Here the finding stays on the device, as a flag that turns
the update of this step and of all later ones into nothing, and the host reads it at the next
report. Exact: the weights stay those from before the step that is named. What it gives has not been
measured (on a CPU, where nothing waits, the host reads at once).
"""

import torch
from torch import Tensor

from ..training import stage
from .step import Step


def watch_for_non_finite(step: Step) -> None:
    """Stop the training, with NonFiniteError, at the first step that is not finite."""
    monitor = Monitor(step)
    step.guards.append(monitor.watch)
    step.checks.append(monitor.check)


class Monitor:
    """Finds the first step whose loss or gradient is not finite.

    A gradient that overflows while the loss scale can still fall (`fp16.py`) is no such finding.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self.check_every = 1 if step.device.type == "cpu" else stage.REPORT_EVERY
        """Steps between two looks of the host."""
        self._is_bad = torch.zeros((), dtype=torch.bool, device=step.device)
        self._first_bad = torch.full((), step.state.step, device=step.device)

    def watch(self, loss: Tensor, grad_norm: Tensor, skip: Tensor) -> Tensor:
        """A guard of `Step`. In place: a CUDA graph reads and writes the same memory each time."""
        overflows = ~torch.isfinite(grad_norm) & (self._step.loss_factor <= 1.0)
        self._is_bad |= (overflows | ~torch.isfinite(loss)) & ~skip
        self._first_bad += ~(self._is_bad | skip)  # counts the steps up to it
        return skip | self._is_bad

    def check(self, number: int) -> None:
        """A check of `Step`: raise NonFiniteError if this step, or an earlier one, was bad."""
        state, places = self._step.state, self._step.places
        due = (number + 1) % self.check_every == 0 or number + 1 == len(places)
        # Deliberate host sync, once in `check_every` steps.
        if due and bool(self._is_bad):
            state.step = int(self._first_bad)  # no step since then has changed a weight
            raise stage.non_finite_error(state, places[state.step].rows_B)
