"""Progress of long work: reports of training, and bars.

A bar is shown on a terminal only, and only where a caller asks for it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepReport:
    """What happened since the last report."""

    seed: int
    stage: int
    epoch: int
    step: int
    """Steps of the stage so far."""
    total_steps: int
    loss: float
    """Mean over the steps since the last report."""
    grad_norm: float
    """The last step's, before clipping."""
    learning_rate: float
    """The last step's."""
    examples_per_second: float

    def __str__(self) -> str:
        return f"loss {self.loss:.4f}, {self.examples_per_second:.0f} examples/s"


class Bar(Protocol):
    """What the code that does the work sees of a bar."""

    def update(self, n: int) -> object: ...

    def set_postfix_str(self, text: str) -> object: ...


class _Silent:
    def update(self, n: int) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


@contextmanager
def progress_bar(
    description: str, total: int | None, unit: str, show: bool, *, initial: int = 0
) -> Iterator[Bar]:
    """A bar on standard error; silent when `show` is false or standard error is not a terminal.

    total: None where it is not known yet
    unit: `"B"` is bytes, shown as kB and MB
    initial: what was done before, as when a download goes on where it stopped
    """
    if not show:
        yield _Silent()
        return
    from tqdm import tqdm

    from .printing import visible

    # `disable=None`: tqdm's own test for a terminal
    with tqdm(
        total=total,
        desc=visible(description),
        unit=unit,
        unit_scale=unit == "B",
        initial=initial,
        disable=None,
        leave=False,
        dynamic_ncols=True,
    ) as bar:
        yield bar
