"""Statistics of the masks, and that they follow from the generator alone."""

import pytest
import torch

from twostage.kernels.dropout import dropout


def mask(p: float, count: int, seed: int) -> torch.Tensor:
    return dropout(torch.ones(count), p, torch.Generator().manual_seed(seed)) != 0


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_the_share_of_dropped_elements_is_p(p: float) -> None:
    count = 4_000_000
    dropped = 1 - mask(p, count, seed=1).double().mean().item()
    # five standard deviations, and what a 16-bit lane cannot represent
    assert abs(dropped - p) < 5 * (p * (1 - p) / count) ** 0.5 + 1 / 65_536


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_elements_are_scaled_so_that_the_mean_stays(dtype: torch.dtype) -> None:
    # Values over a whole binade: their roundings to bf16 cancel, a rounded scale would not.
    x = torch.linspace(1, 2, 4_000_001)[:-1].to(dtype)
    out = dropout(x, 0.1, torch.Generator().manual_seed(1))
    ratio = out[out != 0].double().sum() / (x[out != 0].double().sum() / 0.9)
    assert ratio.item() == pytest.approx(1, abs=2e-4)
    assert (out.double().mean() / x.double().mean()).item() == pytest.approx(1, abs=1e-3)


def test_a_probability_next_to_one_keeps_next_to_nothing() -> None:
    out = dropout(torch.ones(1_000), 0.999_999, torch.Generator().manual_seed(1))
    assert (out == 0).sum() > 990


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 64, 384])
def test_elements_are_dropped_independently_of_their_neighbours(lag: int) -> None:
    centred = mask(0.1, 2_000_000, seed=3).double() - 0.9
    correlation = (centred[lag:] * centred[:-lag]).mean() / 0.09
    assert abs(correlation) < 5 / 2_000_000**0.5


def test_masks_of_two_seeds_are_unrelated_and_of_one_seed_equal() -> None:
    a, b, again = (mask(0.1, 1_000_000, seed).double() - 0.9 for seed in (1, 2, 1))
    assert torch.equal(a, again)
    assert abs((a * b).mean() / 0.09) < 5 / 1_000_000**0.5


@pytest.mark.parametrize("shape", [(1,), (3, 5), (2, 3, 7), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_kept_and_the_gradient_uses_the_same_mask(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    out = dropout(x, 0.4, torch.Generator().manual_seed(5))
    out.sum().backward()
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert torch.equal(x.grad, out.detach())


def test_without_generator_or_probability_it_is_the_identity() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.5, None) is x
    assert dropout(x, 0.0, torch.Generator()) is x
