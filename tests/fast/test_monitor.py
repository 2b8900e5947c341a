"""A step that is not finite ends training as in the plain step, however late the host looks."""

from typing import Any

import pytest
import torch
from torch import Tensor

from twostage.data.token_store import StageData
from twostage.errors import NonFiniteError
from twostage.fast import monitor, trunk
from twostage.fast.step import make_step
from twostage.model.checkpoint import Checkpoint
from twostage.progress import StepReport
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import MakeStep, StageSettings, make_plain_step, train_stage
from twostage.training.state import TrainingState

SETTINGS = StageSettings(epochs=2, learning_rate=1e-3, batch_size=8)


class Stop(Exception):
    pass


@pytest.fixture(params=[1, 10], ids=["as on a CPU", "as on a GPU"])
def check_every(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Steps between two looks of the host."""
    original = monitor.Monitor.__init__

    def patched(self: monitor.Monitor, *arguments: Any) -> None:
        original(self, *arguments)
        self.check_every = request.param

    monkeypatch.setattr(monitor.Monitor, "__init__", patched)
    return int(request.param)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad_step", [1, 4, 14])
@pytest.mark.parametrize("stage", [1, 2])
def test_it_ends_where_and_as_the_plain_step_does(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    start: Any,
    monkeypatch: pytest.MonkeyPatch,
    check_every: int,
    stage: int,
    bad_step: int,
    what: str,
) -> None:
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 200)

    def run(make: MakeStep) -> tuple[TrainingState, str, int]:
        calls = 0

        def loss_function(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            loss = cross_entropy(logits_BC, labels_B)
            if calls != bad_step:
                return loss
            if what == "loss":
                return loss * float("nan")
            return loss + torch.where(loss > 0, 0.0, loss / 0 * loss)  # its gradient is NaN

        state = start(tiny_checkpoint, stage, dropout=0.0)
        with pytest.raises(NonFiniteError) as caught:
            train_stage(state, data, loss_function, SETTINGS, make_step=make)
        return state, str(caught.value), calls

    plain, message, _ = run(make_plain_step)
    ours, our_message, calls = run(make_step)
    assert f"seed 7, stage {stage}, step {bad_step}: " in message
    assert our_message == message
    assert ours.step == plain.step == bad_step - 1
    assert calls == min(14, -(-bad_step // check_every) * check_every)
    assert int(ours.optimizer["updates"]) == bad_step - 1

    # The weights are those of a training that stopped there by itself, and it can go on.
    def stop(report: StepReport) -> None:
        if report.step == bad_step - 1:
            raise Stop

    def unfused(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return cross_entropy(logits_BC, labels_B)

    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    stopped, whole = (start(tiny_checkpoint, stage) for _ in range(2))
    if bad_step > 1:
        with pytest.raises(Stop):
            train_stage(stopped, data, unfused, SETTINGS, make_step=make_step, on_report=stop)
    assert all(map(torch.equal, ours.model.parameters(), stopped.model.parameters()))
    for state in (ours, whole):
        train_stage(state, data, unfused, SETTINGS, make_step=make_step)
    assert all(map(torch.equal, ours.model.parameters(), whole.model.parameters()))


@pytest.mark.usefixtures("check_every")
def test_finite_steps_are_the_plain_steps(tiny_checkpoint: Checkpoint, train: Any) -> None:
    plain, ours = (train(tiny_checkpoint, 2, make) for make in (make_plain_step, make_step))
    assert ours.losses == pytest.approx(plain.losses, rel=1e-5, abs=1e-5)
    assert ours.state.step == 14
