"""The loop: what it trains, that it can be left and re-entered, and when it stops."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from twostage.data.packing import TokenStore
from twostage.data.samplers import epoch_batches
from twostage.errors import NonFiniteError
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training import loss_scale, trunk
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import StageData, StageSettings, StepReport, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top

SETTINGS = StageSettings(epochs=2, learning_rate=1e-3, batch_size=8)


def make_state(checkpoint: Checkpoint, stage: int = 2) -> TrainingState:
    state = TrainingState(7, build_model(checkpoint, 2, torch.Generator().manual_seed(0)))
    if stage == 1:
        freeze_below_top(state.model, 1)
    state.begin_stage(stage)
    return state


@pytest.fixture
def data() -> StageData:
    """50 texts; the label is whether the text holds token 50."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 20, (50,), generator=generator)
    ids = torch.randint(1, 50, (int(lengths.sum()),), generator=generator).int()
    offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    labels_N = np.arange(50) % 2
    ids[offsets[:-1][torch.from_numpy(labels_N == 1)] + 1] = 50
    return StageData(TokenStore(ids, offsets), labels_N)


def weights(state: TrainingState) -> list[torch.Tensor]:
    return [p.detach().clone() for p in state.model.parameters()]


class Stop(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["random", "class-balanced", "token-budget"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_left_after_any_step_ends_bit_for_bit_like_one_that_was_not(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    stage: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 200)  # two or three batches
    settings = replace(SETTINGS, sampler=sampler, dtype=dtype)
    whole = make_state(tiny_checkpoint, stage)
    train_stage(whole, data, cross_entropy, settings)
    assert whole.step == 14 or sampler == "token-budget"

    for last_step in (1, 7, 9):  # in the first epoch, at its end, in the second

        def stop(report: StepReport, at: int = last_step) -> None:
            if report.step == at:
                raise Stop

        state = make_state(tiny_checkpoint, stage)
        with pytest.raises(Stop):
            train_stage(state, data, cross_entropy, settings, on_report=stop)
        assert state.step == last_step
        later = copy.deepcopy(state)
        torch.randn(3)  # the process-wide generator plays no part
        train_stage(later, data, cross_entropy, settings)
        assert later.step == whole.step
        for ours, expected in zip(weights(later), weights(whole), strict=True):
            assert torch.equal(ours, expected)


@pytest.mark.slow
def test_fp16_leaves_out_the_steps_that_overflow_and_learns_all_the_same(
    tiny_checkpoint: Checkpoint, data: StageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    monkeypatch.setattr(loss_scale, "FIRST_FACTOR", 2.0**24)  # far above what fp16 can take
    state = make_state(tiny_checkpoint)
    before = weights(state)
    losses: list[float] = []
    overflows: list[bool] = []

    def look(report: StepReport) -> None:
        losses.append(report.loss)
        overflows.append(not np.isfinite(report.grad_norm))
        assert state.moments is not None
        # An update counts only if it happened.
        assert int(state.moments.updates) == overflows.count(False)
        moved = not all(map(torch.equal, weights(state)[-4:], before[-4:]))
        assert moved == (False in overflows)

    settings = replace(SETTINGS, epochs=20, learning_rate=5e-3, dtype=torch.float16)
    train_stage(state, data, cross_entropy, settings, on_report=look)
    assert overflows[:2] == [True, True]
    assert sum(overflows) < 24, "so many halvings bring the factor to 1, which ends a stage"
    assert state.loss_scale is not None
    assert state.loss_scale.factor == 2.0 ** (24 - sum(overflows))
    assert losses[-1] < 0.3 < losses[0]
    assert state.step == len(losses) == 140, "a step that is left out is a step of the schedule"


def test_fp16_stops_where_a_smaller_scale_cannot_help(
    tiny_checkpoint: Checkpoint, data: StageData
) -> None:
    def steep(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(logits_BC, labels_B)
        return loss + (loss - loss.detach()) * 1e30  # finite, with a gradient that is not

    state = make_state(tiny_checkpoint)
    before = weights(state)
    with pytest.raises(NonFiniteError, match="step 17: "):  # 16 halvings of 65,536 come to 1
        train_stage(state, data, steep, replace(SETTINGS, epochs=4, dtype=torch.float16))
    assert state.step == 16
    assert all(map(torch.equal, weights(state), before))


def test_training_learns_and_reports(tiny_checkpoint: Checkpoint, data: StageData) -> None:
    reports: list[StepReport] = []
    state = make_state(tiny_checkpoint)
    train_stage(
        state,
        data,
        cross_entropy,
        replace(SETTINGS, epochs=20, learning_rate=5e-3),
        on_report=reports.append,
    )
    assert reports[-1].step == reports[-1].total_steps == state.step == 140
    assert [r.step for r in reports] == list(range(10, 141, 10))
    assert reports[-1].loss < 0.3 < reports[0].loss
    assert reports[0].learning_rate == pytest.approx(5e-3 * (1 - 9 / 140))
    assert all(r.examples_per_second > 0 and r.grad_norm > 0 for r in reports)


def test_frozen_parameters_do_not_move_and_the_others_do(
    tiny_checkpoint: Checkpoint, data: StageData
) -> None:
    state = make_state(tiny_checkpoint)
    freeze_below_top(state.model, 1)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    train_stage(state, data, cross_entropy, SETTINGS)
    for name, p in state.model.named_parameters():
        trained = name.startswith(("bert.layers.2.", "bert.pooler.", "classifier."))
        assert p.requires_grad == trained
        assert torch.equal(p, before[name]) != trained, name
        assert p.grad is None


def test_frozen_layers_keep_no_activations_for_backward(
    tiny_checkpoint: Checkpoint, data: StageData
) -> None:
    saved: dict[bool, int] = {}
    for frozen in (False, True):
        state = make_state(tiny_checkpoint)
        if frozen:
            freeze_below_top(state.model, 1)
        sizes: list[int] = []

        def pack_hook(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
            train_stage(state, data, cross_entropy, replace(SETTINGS, epochs=1))
        saved[frozen] = sum(sizes)
    assert saved[True] < 0.5 * saved[False]  # one layer of three


def test_the_schedule_can_end_before_the_stage(
    tiny_checkpoint: Checkpoint, data: StageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    rates: list[float] = []
    train_stage(
        make_state(tiny_checkpoint),
        data,
        cross_entropy,
        replace(SETTINGS, schedule_steps=5),
        on_report=lambda report: rates.append(report.learning_rate),
    )
    assert rates == pytest.approx([1e-3 * f for f in (1, 0.8, 0.6, 0.4, 0.2)] + [0] * 9)


@pytest.mark.parametrize("check_every", [1, 10])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_non_finite_loss_stops_before_the_weights_change_and_names_the_rows(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    monkeypatch: pytest.MonkeyPatch,
    check_every: int,
    stage: int,
) -> None:
    """check_every 10 is how a GPU runs: the step is undone on the device, the host looks later."""
    calls = 0

    def loss_function(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(logits_BC, labels_B) * (float("nan") if calls == 4 else 1.0)

    original = stage_module.Monitor.__init__

    def patched(self: stage_module.Monitor, *args: Any) -> None:
        original(self, *args)
        self.check_every = check_every

    monkeypatch.setattr(stage_module.Monitor, "__init__", patched)
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 200)
    state = make_state(tiny_checkpoint, stage)
    with pytest.raises(NonFiniteError, match=f"seed 7, stage {stage}, step 4: ") as caught:
        train_stage(state, data, loss_function, SETTINGS)
    assert calls == (4 if check_every == 1 else 10)

    rows = epoch_batches("random", data.labels_N, np.zeros(50), 8, (7, stage), 0)[3]
    assert f"(rows {', '.join(map(str, rows))} of the stage's data" in str(caught.value)

    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    expected = make_state(tiny_checkpoint, stage)

    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise Stop

    with pytest.raises(Stop):
        train_stage(expected, data, cross_entropy, SETTINGS, on_report=stop)
    for ours, before in zip(weights(state), weights(expected), strict=True):
        assert torch.equal(ours, before)

    assert (state.step, state.epoch, state.batch) == (3, 0, 3)
    monkeypatch.undo()
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 200)
    train_stage(state, data, cross_entropy, SETTINGS)  # and can go on from there
    whole = make_state(tiny_checkpoint, stage)
    train_stage(whole, data, cross_entropy, SETTINGS)
    for ours, uninterrupted in zip(weights(state), weights(whole), strict=True):
        assert torch.equal(ours, uninterrupted)


def test_masks_differ_by_step_stage_and_seed_and_by_nothing_else(
    tiny_checkpoint: Checkpoint, data: StageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text, over and over, at a learning rate of next to nothing: only masks move the loss."""
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    one_text = StageData(
        TokenStore(data.store.ids[:12], torch.tensor([0, 12])), np.zeros(1, dtype=np.int64)
    )

    def losses(seed: int, stage: int) -> list[float]:
        state = make_state(tiny_checkpoint)
        state.seed = seed
        state.begin_stage(stage)
        seen: list[float] = []
        settings = replace(SETTINGS, epochs=4, learning_rate=1e-30)
        train_stage(
            state, one_text, cross_entropy, settings, on_report=lambda r: seen.append(r.loss)
        )
        return seen

    first = losses(7, 1)
    assert first == losses(7, 1)
    assert len({*first, *losses(7, 2), *losses(8, 1)}) == 12


def test_bf16_training_follows_fp32(tiny_checkpoint: Checkpoint, data: StageData) -> None:
    """The same masks and batches, so that only rounding tells the two runs apart."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        state = make_state(tiny_checkpoint)
        train_stage(state, data, cross_entropy, replace(SETTINGS, dtype=dtype))
        ends.append(torch.cat([p.flatten() for p in weights(state)]))
    start = torch.cat([p.flatten() for p in weights(make_state(tiny_checkpoint))])
    moved, difference = (ends[0] - start).norm(), (ends[1] - ends[0]).norm()
    assert 0 < difference < 0.35 * moved


def test_no_epochs_is_no_training(tiny_checkpoint: Checkpoint, data: StageData) -> None:
    state = make_state(tiny_checkpoint)
    before = weights(state)
    train_stage(state, data, cross_entropy, replace(SETTINGS, epochs=0))
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))
