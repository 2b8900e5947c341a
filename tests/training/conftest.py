"""How far two runs of the same training may part: as far as roundings of its own size drive it.

AdamW divides a gradient by its own size, so the rounding error of a tiny gradient becomes a step of
the learning rate, and no fixed tolerance holds on every machine. So each test measures its own: it
trains again from weights that are off by half a spacing, three times, and sees how far these runs
part from the first. Two implementations that differ by roundings alone part by as much; a wrong
gradient, mask or rate parts them by its own size at the first update.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from twostage.model.checkpoint import Checkpoint

FACTOR = 4.0
"""Two, as both runs that are compared are off; and two, as three runs may miss the worst."""


@dataclass(frozen=True)
class Spread:
    """Allowed differences, relative."""

    steps: list[Tensor]
    """One tensor for each measured number, with an entry for each step."""

    def check(self, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Each step's numbers are as near to each other as the spread allows."""
        for i, (mine, its, allowed) in enumerate(zip(ours, theirs, self.steps, strict=True)):
            apart = ((mine - its) / its).abs()
            assert (apart <= allowed).all(), f"number {i}: {apart} apart, {allowed} allowed"


MeasureSpread = Callable[[Callable[[Checkpoint], list[Tensor]], Checkpoint, torch.dtype], Spread]


def nudge(checkpoint: Checkpoint, dtype: torch.dtype, seed: int) -> Checkpoint:
    """Each weight off by up to half the spacing of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.finfo(dtype).eps / 2
    tensors = {
        name: t * (1 + half * (2 * torch.rand(t.shape, generator=generator) - 1))
        for name, t in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


@pytest.fixture(scope="session")
def nudged() -> Callable[[Checkpoint, torch.dtype, int], Checkpoint]:
    return nudge


@pytest.fixture(scope="session")
def measure_spread() -> MeasureSpread:
    """Takes what trains a checkpoint and returns a number a step, for each of several numbers."""

    def measure(
        run: Callable[[Checkpoint], list[Tensor]], checkpoint: Checkpoint, dtype: torch.dtype
    ) -> Spread:
        exact = run(checkpoint)
        others = [run(nudge(checkpoint, dtype, seed)) for seed in range(3)]
        # Differences grow, but not at each step: what was reached may be reached again.
        apart = [
            torch.stack([((o[i] - e) / e).abs() for o in others]).amax(0).cummax(0).values
            for i, e in enumerate(exact)
        ]
        return Spread([FACTOR * (a + torch.finfo(dtype).eps) for a in apart])

    return measure
