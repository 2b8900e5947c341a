"""Schedule and clipping against formulas and torch's own. (AdamW: tests/kernels/test_adamw.py.)"""

import pytest
import torch

from twostage.training.optim import clip_divisor, linear_decay


def test_the_rate_falls_linearly_from_1_to_0_and_stays_there() -> None:
    assert [linear_decay(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("loss_factor", [1.0, 1024.0])
def test_clipping_equals_torchs(max_norm: float, loss_factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients_P = loss_factor * torch.cat([p.grad.flatten() for p in parameters])
    norm, divisor = clip_divisor(gradients_P, max_norm, torch.tensor(loss_factor))
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(norm, expected)
    clipped_P = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradients_P / divisor, clipped_P)
