"""Statistics of the masks, and that they follow from generator or counters alone."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from twostage.kernels.dropout import DropoutCounters, dropout, dropout_mask, philox
from twostage.kernels.residual_norm import dropout_residual_norm


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


MakeCounters = Callable[[int], DropoutCounters]


@pytest.mark.parametrize(
    ("key", "counter", "words"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0_A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(
    key: int, counter: tuple[int, ...], words: tuple[int, ...]
) -> None:
    ours = philox(torch.tensor([key]), [torch.tensor([word]) for word in counter])
    assert tuple(int(word) for word in ours) == words


def kept(
    rows: int, features: int, key: int = 3, draw: int = 0, site: int = 0, p: float = 0.1
) -> torch.Tensor:
    """[T, D] fp64 of 0 and 1; a text of 128 tokens after the other, from number `draw`."""
    positions_T = torch.arange(rows, dtype=torch.int32)
    counters = DropoutCounters(
        torch.tensor([key]), positions_T // 128 + draw, positions_T % 128, torch.Generator()
    )
    return dropout_mask((rows, features), p, counters, torch.float64, site)[0]


class TestCounters:
    @pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
    def test_the_share_of_dropped_elements_is_p(self, p: float) -> None:
        mask_TD = kept(4_000, 1_000, p=p)
        count = mask_TD.numel()
        sigmas = 5 * (p * (1 - p) / count) ** 0.5
        assert abs(1 - mask_TD.mean().item() - p) < sigmas + 1 / 65_536
        # Also in each of the eight lanes that one Philox gives.
        for lane in range(8):
            share = 1 - mask_TD[:, lane::8].mean().item()
            assert abs(share - p) < sigmas * 8**0.5 + 1 / 65_536

    def test_rows_and_columns_drop_as_much_as_independent_elements_would(self) -> None:
        mask_TD = kept(3_000, 768)
        for dim in (0, 1):
            spread = mask_TD.mean(dim).var() * mask_TD.shape[dim] / 0.09
            assert abs(spread.item() - 1) < 5 * (2 / mask_TD.shape[1 - dim]) ** 0.5

    @pytest.mark.parametrize(("row", "column"), [(0, 1), (0, 2), (0, 4), (0, 8), (1, 0), (128, 0)])
    def test_elements_are_dropped_independently_of_their_neighbours(
        self, row: int, column: int
    ) -> None:
        centred_TD = kept(4_000, 512) - 0.9
        shifted = centred_TD[row:, column:]
        correlation = (shifted * centred_TD[: shifted.shape[0], : shifted.shape[1]]).mean() / 0.09
        assert abs(correlation) < 5 / shifted.numel() ** 0.5

    @pytest.mark.parametrize("other", [{"key": 4}, {"draw": 1}, {"site": 1}, {"draw": 1 << 20}])
    def test_keys_draws_and_sites_have_masks_of_their_own(self, other: dict[str, int]) -> None:
        a, b = kept(2_000, 500) - 0.9, kept(2_000, 500, **other) - 0.9
        assert torch.equal(a, kept(2_000, 500) - 0.9)
        assert abs((a * b).mean() / 0.09) < 5 / 1_000_000**0.5

    def test_a_row_has_its_mask_wherever_it_is_packed(self, counters: MakeCounters) -> None:
        together = counters(30)
        mask_TD, _ = dropout_mask((30, 20), 0.3, together, torch.float32, 2)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
        elsewhere, _ = dropout_mask((30, 20), 0.3, together.take(order), torch.float32, 2)
        assert torch.equal(elsewhere, mask_TD[order])
        wider, _ = dropout_mask((30, 33), 0.3, together, torch.float32, 2)
        assert torch.equal(wider[:, :20], mask_TD), "the width of the others does not matter"

    @pytest.mark.parametrize("features", [1, 7, 8, 20, 65, 384])
    def test_triton_draws_the_same_masks(
        self, features: int, device: torch.device, counters: MakeCounters
    ) -> None:
        """Seen through a norm whose output tells, for each element, whether it was dropped."""
        where = counters(33)
        ones_TD = torch.ones(33, features, device=device)
        x_TD = ones_TD.clone().requires_grad_()
        ramp_D = torch.arange(1.0, features + 1, device=device)
        zero_D = torch.zeros_like(ramp_D)
        normed_TD = dropout_residual_norm(
            x_TD, ones_TD * ramp_D, zero_D + 1, zero_D, 1e-5, 0.3, where, 5, "triton"
        )
        normed_TD.backward(torch.rand(normed_TD.shape).to(device))
        mask_TD, _ = dropout_mask((33, features), 0.3, where, torch.float32, 5)
        if features > 2:  # else the gradient of a norm is 0 for kept elements too
            assert torch.equal(x_TD.grad != 0, mask_TD != 0)
        expected_TD = torch.nn.functional.layer_norm(
            ones_TD * ramp_D + mask_TD / (1 - 19_661 / 65_536), (features,), eps=1e-5
        )
        torch.testing.assert_close(normed_TD.detach(), expected_TD)

    def test_triton_reads_the_key_when_it_runs(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        """What a graph that is replayed relies on."""
        where = replace(counters(8), key=torch.tensor([1], device=device))
        x_TD = torch.randn(8, 64, device=device)
        weight_D, bias_D = torch.ones(64, device=device), torch.zeros(64, device=device)
        outputs = []
        for key in (1, 2, 1):
            where.key.fill_(key)
            outputs.append(
                dropout_residual_norm(x_TD, x_TD, weight_D, bias_D, 1e-5, 0.3, where, impl="triton")
            )
        assert torch.equal(outputs[0], outputs[2])
        assert not torch.equal(outputs[0], outputs[1])
