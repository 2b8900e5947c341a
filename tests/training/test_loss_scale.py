"""The loss scale against torch's own GradScaler, and where it gives up."""

import pytest
import torch

from twostage.training import loss_scale
from twostage.training.loss_scale import LossScale, make_loss_scale


def test_it_grows_and_falls_as_torchs_scaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROW_AFTER", 3)
    ours = make_loss_scale(torch.float16, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], 0.0)
    norms = [1.0, float("inf"), 2.0, 2.0, 2.0, 2.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for norm in norms:
        scaler.scale(torch.ones(()))  # the scale comes to be with its first use
        parameter.grad = torch.tensor(norm)
        scaler.step(optimizer)
        scaler.update()
        assert ours.update(torch.tensor(norm)) == 0.0
        assert ours.factor.item() == scaler.get_scale()


def test_it_stays_within_its_bounds_and_says_when_it_can_fall_no_further() -> None:
    ours = make_loss_scale(torch.float16, torch.device("cpu"))
    factors = []
    for _ in range(17):
        hopeless = ours.update(torch.tensor(float("inf")))
        factors.append(ours.factor.item())
        assert hopeless == 0.0 or len(factors) == 17
    assert factors == [*(2.0**n for n in range(15, -1, -1)), 1.0]
    assert hopeless == 1.0
    top = LossScale(torch.tensor(2.0**24), torch.tensor(1_999.0), grows=True)
    top.update(torch.ones(()))
    assert top.factor == 2.0**24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precisions_that_need_none_keep_a_factor_of_one(dtype: torch.dtype) -> None:
    scale = make_loss_scale(dtype, torch.device("cpu"))
    for _ in range(2_001):
        assert scale.update(torch.ones(())) == 0.0
    assert scale.factor == 1.0
    assert scale.update(torch.tensor(float("inf"))) == 1.0
    assert scale.factor == 1.0
