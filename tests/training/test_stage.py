"""The loop: what it trains, that it can be left and re-entered, and when it stops."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from twostage.data.samplers import epoch_batches
from twostage.data.token_store import StageData, TokenStore
from twostage.errors import NonFiniteError, UsageError
from twostage.fast import trunk
from twostage.fast.step import make_step
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.progress import StepReport
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import MakeStep, StageSettings, make_plain_step, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top

SETTINGS = StageSettings(epochs=2, learning_rate=1e-3, batch_size=8)


@pytest.fixture(params=[make_plain_step, make_step], ids=["plain", "fast"])
def make(request: pytest.FixtureRequest) -> MakeStep:
    """Each step in turn: what the loop promises holds for both."""
    made: MakeStep = request.param
    return made


def make_state(checkpoint: Checkpoint, stage: int = 2) -> TrainingState:
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0))
    if stage == 1:
        freeze_below_top(model, 1)
    return TrainingState(7, model, stage)


@pytest.fixture
def data(random_store: Any) -> StageData:
    """50 texts; the label is whether the text holds token 50."""
    store, labels_N = random_store(50, 19, 50), np.arange(50) % 2
    store.ids[store.offsets[:-1][torch.from_numpy(labels_N == 1)] + 1] = 50
    return StageData(store, labels_N)


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
    make: MakeStep,
    stage: int,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 200)  # two or three batches
    settings = replace(SETTINGS, sampler=sampler)
    how: Any = {"dtype": dtype, "make_step": make}
    whole = make_state(tiny_checkpoint, stage)
    train_stage(whole, data, cross_entropy, settings, **how)
    assert whole.step == 14 or sampler == "token-budget"

    for last_step in (1, 7, 9):  # in the first epoch, at its end, in the second

        def stop(report: StepReport, at: int = last_step) -> None:
            if report.step == at:
                raise Stop

        state = make_state(tiny_checkpoint, stage)
        with pytest.raises(Stop):
            train_stage(state, data, cross_entropy, settings, on_report=stop, **how)
        assert state.step == last_step
        later = copy.deepcopy(state)
        torch.randn(3)  # the process-wide generator plays no part
        train_stage(later, data, cross_entropy, settings, **how)
        assert later.step == whole.step
        for ours, expected in zip(weights(later), weights(whole), strict=True):
            assert torch.equal(ours, expected)


def test_training_learns_and_reports(
    tiny_checkpoint: Checkpoint, data: StageData, make: MakeStep
) -> None:
    reports: list[StepReport] = []
    state = make_state(tiny_checkpoint)
    train_stage(
        state,
        data,
        cross_entropy,
        replace(SETTINGS, epochs=20, learning_rate=5e-3),
        make_step=make,
        on_report=reports.append,
    )
    assert reports[-1].step == reports[-1].total_steps == state.step == 140
    assert [r.step for r in reports] == list(range(10, 141, 10))
    assert reports[-1].loss < 0.3 < reports[0].loss
    assert reports[0].learning_rate == pytest.approx(5e-3 * (1 - 9 / 140))
    assert all(r.examples_per_second > 0 and r.grad_norm > 0 for r in reports)


def test_frozen_parameters_do_not_move_and_the_others_do(
    tiny_checkpoint: Checkpoint, data: StageData, make: MakeStep
) -> None:
    state = make_state(tiny_checkpoint)
    freeze_below_top(state.model, 1)
    before = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    train_stage(state, data, cross_entropy, SETTINGS, make_step=make)
    for name, p in state.model.named_parameters():
        trained = name.startswith(("bert.layers.2.", "bert.pooler.", "classifier."))
        assert p.requires_grad == trained
        assert torch.equal(p, before[name]) != trained, name
        assert p.grad is None


def test_frozen_layers_keep_no_activations_for_backward(
    tiny_checkpoint: Checkpoint, data: StageData, make: MakeStep
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
            train_stage(state, data, cross_entropy, replace(SETTINGS, epochs=1), make_step=make)
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


def test_masks_differ_by_step_stage_and_seed_and_by_nothing_else(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    monkeypatch: pytest.MonkeyPatch,
    make: MakeStep,
) -> None:
    """One text, over and over, at a learning rate of next to nothing: only masks move the loss."""
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    one_text = StageData(
        TokenStore(data.store.ids[:12], torch.tensor([0, 12])), np.zeros(1, dtype=np.int64)
    )

    def losses(seed: int, stage: int) -> list[float]:
        state = TrainingState(seed, make_state(tiny_checkpoint).model, stage)
        seen: list[float] = []
        train_stage(
            state,
            one_text,
            cross_entropy,
            replace(SETTINGS, epochs=4, learning_rate=1e-30),
            make_step=make,
            on_report=lambda r: seen.append(r.loss),
        )
        return seen

    first = losses(7, 1)
    assert first == losses(7, 1)
    assert len({*first, *losses(7, 2), *losses(8, 1)}) == 12


def test_bf16_training_follows_fp32(
    tiny_checkpoint: Checkpoint, data: StageData, make: MakeStep
) -> None:
    """The same masks and batches, so that only rounding tells the two runs apart."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        state = make_state(tiny_checkpoint)
        train_stage(state, data, cross_entropy, SETTINGS, dtype=dtype, make_step=make)
        ends.append(torch.cat([p.flatten() for p in weights(state)]))
    start = torch.cat([p.flatten() for p in weights(make_state(tiny_checkpoint))])
    moved, difference = (ends[0] - start).norm(), (ends[1] - ends[0]).norm()
    assert 0 < difference < 0.35 * moved


def test_no_epochs_is_no_training(
    tiny_checkpoint: Checkpoint, data: StageData, make: MakeStep
) -> None:
    state = make_state(tiny_checkpoint)
    before = weights(state)
    train_stage(state, data, cross_entropy, replace(SETTINGS, epochs=0), make_step=make)
    assert all(torch.equal(a, b) for a, b in zip(weights(state), before, strict=True))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_non_finite_loss_stops_before_the_weights_change_and_names_the_rows(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    monkeypatch: pytest.MonkeyPatch,
    make: MakeStep,
    stage: int,
) -> None:
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 200)
    calls, bad_call = 0, 4

    def loss_function(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return cross_entropy(logits_BC, labels_B) * (float("nan") if calls == bad_call else 1.0)

    state = make_state(tiny_checkpoint, stage)
    with pytest.raises(NonFiniteError, match=f"seed 7, stage {stage}, step 4: ") as caught:
        train_stage(state, data, loss_function, SETTINGS, make_step=make)
    assert (calls, state.step) == (4, 3)
    rows = epoch_batches("random", data.labels_N, np.zeros(50), 8, (7, stage), 0)[3]
    assert f"(rows {', '.join(map(str, rows))} of the stage's data" in str(caught.value)

    train_stage(state, data, loss_function, SETTINGS, make_step=make)  # it can go on from there
    whole, bad_call = make_state(tiny_checkpoint, stage), 0
    train_stage(whole, data, loss_function, SETTINGS, make_step=make)
    for ours, uninterrupted in zip(weights(state), weights(whole), strict=True):
        assert torch.equal(ours, uninterrupted)


def test_an_infinite_gradient_stops_it_too(
    tiny_checkpoint: Checkpoint, data: StageData, make: MakeStep
) -> None:
    def steep(logits_BC: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        loss = cross_entropy(logits_BC, labels_B)
        return loss + (loss - loss.detach()) * float("inf")  # NaN behind a comparison

    state = make_state(tiny_checkpoint)
    before = weights(state)
    with pytest.raises(NonFiniteError, match="step 1: "):
        train_stage(state, data, steep, SETTINGS, make_step=make)
    assert all(map(torch.equal, weights(state), before))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_goes_on_by_the_step_that_it_began_with(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    monkeypatch: pytest.MonkeyPatch,
    make: MakeStep,
    stage: int,
) -> None:
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)

    def stop(report: StepReport) -> None:
        raise Stop

    state = make_state(tiny_checkpoint, stage)
    with pytest.raises(Stop):
        train_stage(state, data, cross_entropy, SETTINGS, make_step=make, on_report=stop)
    before = weights(state)
    began, other = ("plain", make_step) if make is make_plain_step else ("fast", make_plain_step)
    with pytest.raises(UsageError, match=f"was begun by the {began} step; go on with"):
        train_stage(state, data, cross_entropy, SETTINGS, make_step=other)
    assert all(map(torch.equal, weights(state), before))
    assert all(p.grad is None for p in state.model.parameters())
    train_stage(state, data, cross_entropy, SETTINGS, make_step=make)
