"""Schedule, clipping and AdamW against formulas and torch's own."""

import pytest
import torch

from twostage.training.optim import adamw_, clip_gradients, linear_decay


def test_the_rate_falls_linearly_from_1_to_0_and_stays_there() -> None:
    assert [linear_decay(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
def test_clipping_equals_torchs(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1,))]
    gradients = [size * torch.randn(p.shape, generator=generator) for p in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    clipped, norm = clip_gradients(gradients)
    expected = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.testing.assert_close(norm, expected)
    for parameter, ours in zip(parameters, clipped, strict=True):
        torch.testing.assert_close(ours, parameter.grad)


def test_adamw_is_torchs() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    theirs = ours.clone()
    mean, mean_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    optimizer = torch.optim.AdamW([theirs], weight_decay=0.0)
    for update in range(1, 6):
        gradient = torch.randn(40, 5, generator=generator, dtype=torch.float64) * 10.0**-update
        optimizer.param_groups[0]["lr"] = 1e-2 / update
        theirs.grad = gradient
        optimizer.step()
        adamw_(ours, gradient, mean, mean_sq, update, 1e-2 / update)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(mean_sq, optimizer.state[theirs]["exp_avg_sq"])
