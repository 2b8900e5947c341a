"""Dropout from bulk random bits and an explicit generator.

torch's own dropout draws from the process-wide generator, one Bernoulli variate an element. Here
the generator is an argument, so that a training step can be replayed alone, and each 64-bit draw
serves four elements: an element is kept when its 16-bit lane is at least p · 65536. A lane of 16
bits represents p = 0.1 to 6e-6 (a byte would make it 0.1016); kept values are divided by the keep
probability that the lanes really have, so the expectation is exact.
"""

import torch
from torch import Tensor

_LANE_VALUES = 65_536


def dropout(x: Tensor, p: float, generator: torch.Generator | None) -> Tensor:
    """Zero each element of `x` with probability p and scale the rest by 1 / (1 - p).

    x: any shape. generator: on x's device; None means evaluation, and returns `x` itself.
    """
    if generator is None or p == 0.0:
        return x
    drop_below = min(round(p * _LANE_VALUES), _LANE_VALUES - 1)
    keep_probability = 1.0 - drop_below / _LANE_VALUES
    kept = _random_lanes(x.numel(), generator).ge(drop_below - _LANE_VALUES // 2).view(x.shape)
    # The scale stays a number: as a bf16 tensor 1 / 0.9 would be 1.109, and the mean 0.15 % low.
    return (x * kept.to(x.dtype)).mul(1.0 / keep_probability)


def _random_lanes(count: int, generator: torch.Generator) -> Tensor:
    """[count] int16, uniform over all 65,536 values."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count]
