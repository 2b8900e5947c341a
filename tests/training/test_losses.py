"""Losses and class weights by hand, and against torch's own."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from twostage.errors import DataError, UsageError
from twostage.training.losses import (
    CLASS_WEIGHTS,
    cross_entropy,
    effective_number_weights,
    inverse_frequency_weights,
    ldam,
    ldam_margins,
    make_class_weights,
)


def random_batch(num_classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(9, num_classes, generator=generator, dtype=torch.float64)
    return logits_BC, torch.randint(num_classes, (9,), generator=generator)


def test_effective_number_weights_by_hand() -> None:
    # beta = 1/2: effective numbers of 1 and 2 examples are 1 and 3/2, so weights are as 3 to 2.
    weights = effective_number_weights([1, 2], beta=0.5)
    assert weights.tolist() == pytest.approx([1.2, 0.8])
    assert weights.dtype == torch.float32


def test_effective_number_weights_at_the_published_beta() -> None:
    weights = effective_number_weights([432, 5935])
    raw = [(1 - 0.9999) / (1 - 0.9999**n) for n in (432, 5935)]
    assert weights.tolist() == pytest.approx([2 * w / sum(raw) for w in raw])
    assert effective_number_weights([10**9, 10**9]).tolist() == [1, 1]


def test_inverse_frequency_weights_by_hand() -> None:
    assert inverse_frequency_weights([1, 3]).tolist() == pytest.approx([1.5, 0.5])
    assert inverse_frequency_weights([1, 9], power=0.5).tolist() == pytest.approx([1.5, 0.5])


def test_ldam_margins_by_hand() -> None:
    # 16^(1/4) = 2 and 81^(1/4) = 3; the rarest class has the whole of max_m.
    assert ldam_margins([1, 16, 81]).tolist() == pytest.approx([0.5, 0.25, 0.5 / 3])
    assert ldam_margins([16, 256], max_m=1.0).tolist() == pytest.approx([1.0, 0.5])


@pytest.mark.parametrize("name", CLASS_WEIGHTS)
def test_class_weights_sum_to_the_number_of_classes(name: str) -> None:
    weights = make_class_weights(name, [5, 70, 900, 11_000])
    if name == "none":
        assert weights is None
    else:
        assert weights.sum().item() == pytest.approx(4)
        assert weights.diff().max() < 0, "rarer classes weigh more"


def test_ldam_by_hand() -> None:
    # Logits (ln 3 + 1/2, 0), true class 0, margin 1/2: p = 3/4. Class 1 with margin 1/4: p = 1/2.
    logits_BC = torch.tensor([[math.log(3) + 0.5, 0.0], [0.0, 0.25]])
    loss = ldam(logits_BC, torch.tensor([0, 1]), ldam_margins([1, 16]), torch.tensor([3.0, 1.0]))
    assert loss.item() == pytest.approx((3 * math.log(4 / 3) + math.log(2)) / 4)


def test_ldam_with_zero_margin_is_class_weighted_cross_entropy() -> None:
    logits_BC, labels_B = random_batch()
    weights_C = effective_number_weights([3, 30, 300]).double()
    torch.testing.assert_close(
        ldam(logits_BC, labels_B, torch.zeros(3), weights_C),
        F.cross_entropy(logits_BC, labels_B, weights_C),
    )
    torch.testing.assert_close(
        ldam(logits_BC, labels_B, torch.zeros(3), None, scale=30.0),
        F.cross_entropy(30 * logits_BC, labels_B),
    )


def test_ldam_is_cross_entropy_of_scaled_logits_with_the_true_one_lowered() -> None:
    logits_BC, labels_B = random_batch()
    margins_C = ldam_margins([3, 30, 300]).double()
    lowered_BC = logits_BC - F.one_hot(labels_B, 3) * margins_C
    torch.testing.assert_close(
        ldam(logits_BC, labels_B, margins_C, None, scale=4.0),
        F.cross_entropy(4.0 * lowered_BC, labels_B),
    )


def test_a_larger_margin_makes_a_larger_loss() -> None:
    logits_BC, labels_B = random_batch()
    losses = [ldam(logits_BC, labels_B, torch.full((3,), m)).item() for m in (0.0, 0.2, 0.5)]
    assert losses == sorted(losses)
    assert losses[0] < losses[2]


@pytest.mark.parametrize("weights", CLASS_WEIGHTS)
def test_every_loss_passes_gradcheck(weights: str) -> None:
    logits_BC, labels_B = random_batch()
    logits_BC.requires_grad_()
    weights_C, margins_C = make_class_weights(weights, [3, 30, 300]), ldam_margins([3, 30, 300])
    for loss in (
        partial(cross_entropy, class_weights_C=weights_C),
        partial(ldam, margins_C=margins_C, class_weights_C=weights_C, scale=2.0),
    ):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, labels_B), logits_BC)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_is_torchs_in_fp32_at_least(dtype: torch.dtype) -> None:
    logits_BC, labels_B = random_batch()
    logits_BC = logits_BC.to(dtype)
    precise_BC = logits_BC if dtype == torch.float64 else logits_BC.float()
    weights_C = effective_number_weights([3, 30, 300])
    for weight in (None, weights_C):
        ours = cross_entropy(logits_BC, labels_B, weight)
        expected_weight = None if weight is None else weight.to(precise_BC.dtype)
        torch.testing.assert_close(ours, F.cross_entropy(precise_BC, labels_B, expected_weight))
        torch.testing.assert_close(ldam(logits_BC, labels_B, torch.zeros(3), weight), ours)


def test_a_class_without_training_rows_is_named() -> None:
    for function in (effective_number_weights, inverse_frequency_weights, ldam_margins):
        with pytest.raises(DataError, match="class 1 has no training row"):
            function([5, 0, 2])


def test_unknown_class_weights_are_refused() -> None:
    with pytest.raises(UsageError, match="'balanced'"):
        make_class_weights("balanced", np.array([1, 2]).tolist())
