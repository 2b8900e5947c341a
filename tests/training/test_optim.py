"""Schedule, clipping and AdamW against formulas and torch's own."""

import pytest
import torch

from twostage.training.optim import clip_divisor, linear_decay, make_adamw


def test_the_rate_falls_linearly_from_1_to_0_and_stays_there() -> None:
    assert [linear_decay(step, 4) for step in range(6)] == [1, 0.75, 0.5, 0.25, 0, 0]


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_equals_torchs(max_norm: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1,))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    gradients_P = torch.cat([p.grad.flatten() for p in parameters])
    norm, divisor = clip_divisor(gradients_P, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    torch.testing.assert_close(norm, expected)
    clipped_P = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(gradients_P / divisor, clipped_P)


def test_the_optimizer_divides_the_gradients_before_it_uses_them() -> None:
    """`grad_scale` is torch's name for it: what its fused AdamW must do with it is pinned here."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(70, generator=generator) for _ in range(2))
    ends = []
    for divisor in (None, 4.0):
        weight = start.clone()
        optimizer = make_adamw([weight], 0.1)
        for step in range(3):
            weight.grad = gradient * (step + 1) * (divisor or 1.0)
            if divisor is not None:
                optimizer.grad_scale = torch.tensor(divisor)  # type: ignore[attr-defined]
                optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
            optimizer.step()
        ends.append((weight, optimizer.state[weight]["exp_avg_sq"]))
    for plain, divided in zip(*ends, strict=True):
        torch.testing.assert_close(divided, plain)


def test_a_new_optimizer_goes_on_from_the_moments_of_the_previous_one() -> None:
    whole, parted = torch.ones(5), torch.ones(5)
    optimizers = [make_adamw([whole], 0.1), make_adamw([parted], 0.1)]
    for step in range(6):
        if step == 3:
            moved = parted.clone()  # the same parameter in new memory
            optimizers[1] = make_adamw([moved], 0.1, previous=optimizers[1])
            parted = moved
        for weight, optimizer in zip((whole, parted), optimizers, strict=True):
            weight.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimizer.step()
    assert torch.equal(whole, parted)


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
