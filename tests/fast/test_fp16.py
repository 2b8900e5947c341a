"""The loss scale against the plain step, against torch's GradScaler, and where it gives up."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twostage.data.token_store import StageData
from twostage.errors import NonFiniteError
from twostage.fast import fp16
from twostage.fast.fp16 import LossScale
from twostage.fast.step import make_step
from twostage.model.checkpoint import Checkpoint
from twostage.progress import StepReport
from twostage.training.losses import cross_entropy
from twostage.training.stage import StageSettings, make_plain_step, train_stage

NO_SKIP = torch.tensor(False)


@pytest.mark.parametrize("stage", [1, 2])
def test_in_fp16_losses_are_the_plain_steps(
    tiny_checkpoint: Checkpoint, train: Any, stage: int
) -> None:
    plain, fast = (
        train(tiny_checkpoint, stage, make, dtype=torch.float16)
        for make in (make_plain_step, make_step)
    )
    assert max(plain.losses) - min(plain.losses) > 0.1
    assert fast.losses == pytest.approx(plain.losses, rel=5e-3)
    # AdamW does not see a factor that all gradients have in common; their norm does.
    norms = [[report.grad_norm for report in trained.reports] for trained in (plain, fast)]
    assert norms[0] == pytest.approx(norms[1], rel=0.05)


def new_scale(factor: float, calm_steps: float = 0.0) -> LossScale:
    memory = {"loss_factor": torch.tensor(factor), "calm_steps": torch.tensor(calm_steps)}
    return LossScale(memory, torch.device("cpu"))


def test_it_grows_and_falls_as_torchs_scaler_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp16, "GROW_AFTER", 3)
    ours = LossScale({}, torch.device("cpu"))
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], 0.0)
    norms = [1.0, float("inf"), 2.0, 2.0, 2.0, 2.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    for norm in norms:
        scaler.scale(torch.ones(()))  # the scale comes to be with its first use
        parameter.grad = torch.tensor(norm)
        scaler.step(optimizer)
        scaler.update()
        skipped = ours.update(torch.ones(()), torch.tensor(norm), NO_SKIP)
        assert bool(skipped) == (not np.isfinite(norm))
        assert ours.factor.item() == scaler.get_scale()


def test_it_stays_within_its_bounds() -> None:
    low, top = new_scale(2.0), new_scale(2.0**24, 1_999.0)
    for _ in range(3):
        low.update(torch.ones(()), torch.tensor(float("inf")), NO_SKIP)
    top.update(torch.ones(()), torch.ones(()), NO_SKIP)
    assert (float(low.factor), float(top.factor)) == (1.0, 2.0**24)


def test_a_step_that_is_left_out_anyway_changes_nothing() -> None:
    scale = new_scale(8.0, 5.0)
    for norm in (1.0, float("inf")):
        assert scale.update(torch.ones(()), torch.tensor(norm), torch.tensor(True))
        assert (float(scale.factor), float(scale.calm_steps)) == (8.0, 5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_only_fp16_has_a_factor(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, dtype: torch.dtype
) -> None:
    state = start(tiny_checkpoint, 2)
    with make_step(state, data, cross_entropy, [], dtype) as step:
        assert step.loss_factor == (2.0**16 if dtype == torch.float16 else 1.0)
        assert ("loss_factor" in state.optimizer) == (dtype == torch.float16)


def weights(model: torch.nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.slow
def test_steps_that_overflow_are_left_out_and_training_learns(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, train: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fp16, "FIRST_FACTOR", 2.0**24)  # far above what fp16 can take
    state = start(tiny_checkpoint, 2, dropout=0.1)
    before = weights(state.model)
    losses: list[float] = []
    overflows: list[bool] = []

    def look(report: StepReport) -> None:
        losses.append(report.loss)
        overflows.append(not np.isfinite(report.grad_norm))
        # An update counts only if it happened.
        assert int(state.optimizer["updates"]) == overflows.count(False)
        moved = not all(map(torch.equal, weights(state.model)[-4:], before[-4:]))
        assert moved == (False in overflows)

    settings = StageSettings(epochs=20, learning_rate=5e-3, batch_size=8)
    train_stage(
        state,
        data,
        cross_entropy,
        settings,
        dtype=torch.float16,
        make_step=make_step,
        on_report=look,
    )
    assert overflows[:2] == [True, True]
    assert sum(overflows) < 24, "so many halvings bring the factor to 1, which ends a stage"
    assert state.optimizer["loss_factor"] == 2.0 ** (24 - sum(overflows))
    assert losses[-1] < 0.5 * losses[0]
    assert state.step == len(losses) == 140, "a step that is left out is a step of the schedule"


def test_it_stops_where_a_smaller_scale_cannot_help(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any
) -> None:
    def steep(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        loss = cross_entropy(logits_BC, labels_B)
        return loss + (loss - loss.detach()) * 1e30  # finite, with a gradient that is not

    state = start(tiny_checkpoint, 2)
    before = weights(state.model)
    settings = StageSettings(epochs=4, learning_rate=1e-3, batch_size=8)
    with pytest.raises(NonFiniteError, match="step 17: "):  # 16 halvings of 65,536 come to 1
        train_stage(state, data, steep, settings, dtype=torch.float16, make_step=make_step)
    assert state.step == 16
    assert all(map(torch.equal, weights(state.model), before))
