"""Dropout from bulk random bits and an explicit generator.

torch's own dropout draws from the process-wide generator, one Bernoulli variate an element. Here
the generator is an argument, so that a training step can be replayed alone, and each 64-bit draw
serves four elements: an element is kept when its 16-bit lane is at least p · 65536. A lane of 16
bits represents p = 0.1 to 6e-6 (a byte would make it 0.1016); kept values are divided by the keep
probability that the lanes really have, so the expectation is exact.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LANE_VALUES = 65_536


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Zero each element of `x` with probability p and scale the rest by 1 / (1 - p).

    x: any shape. generator: on x's device; None means evaluation, and returns `x` itself.
    """
    if generator is None or p == 0.0:
        return x
    mask, scale = dropout_mask(x.shape, p, generator, x.dtype)
    # The scale stays a number: as a bf16 tensor 1 / 0.9 would be 1.109, and the mean 0.15 % low.
    return (x * mask).mul(scale)


def dropout_mask(
    shape: Sequence[int], p: float, generator: torch.Generator, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """(mask, scale): 0 with probability p and else 1, in `dtype`; and 1 / (1 - p)."""
    drop_below = min(round(p * _LANE_VALUES), _LANE_VALUES - 1)
    lanes = _random_lanes(shape, generator)
    # Written back as int16 and then cast: on a CPU a fifth of the time of the way over bool, for
    # which torch has no vector code.
    torch.ge(lanes, drop_below - _LANE_VALUES // 2, out=lanes)
    return lanes.to(dtype), 1.0 / (1.0 - drop_below / _LANE_VALUES)


def _random_lanes(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """int16 of this shape, uniform over all 65,536 values."""
    count = torch.Size(shape).numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape)
