"""Schedule, clipping and AdamW against formulas and torch's own."""

import pytest
import torch

from twostage.training.optim import clip_gradients, linear_decay, make_adamw


def test_the_rate_falls_linearly_from_1_to_0_and_stays_there() -> None:
    assert [linear_decay(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_equals_torchs(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    ours = [p.grad.clone() for p in parameters]
    norm = clip_gradients(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(norm, expected)
    for gradient, parameter in zip(ours, parameters, strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_adamw_follows_the_published_update() -> None:
    weight = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    optimizer = make_adamw([weight], 0.1)
    m, v, expected = torch.zeros(3), torch.zeros(3), weight.clone()
    for step in range(1, 6):
        gradient = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64) * step
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        denominator = (v / (1 - 0.999**step)).sqrt() + 1e-8
        expected = expected - 0.1 * (m / (1 - 0.9**step)) / denominator
    torch.testing.assert_close(weight, expected)
