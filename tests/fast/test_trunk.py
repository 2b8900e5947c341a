"""Frozen layers computed ahead give each step the hidden states that it would compute itself."""

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twostage.data.packing import pack
from twostage.data.token_store import StageData, TokenStore
from twostage.fast import trunk as trunk_module
from twostage.fast.randomness import counters_of
from twostage.fast.step import drawn_from, make_step
from twostage.fast.trunk import cache_features, compute_features, count_frozen_layers
from twostage.kernels.attention import packed_layout
from twostage.model.bert import Bert
from twostage.model.checkpoint import Checkpoint
from twostage.progress import StepReport
from twostage.training.losses import cross_entropy
from twostage.training.stage import StageSettings, make_plain_step, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top


@pytest.fixture(params=[40, 200, 32_768], ids=["small windows", "some steps", "one window"])
def window_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(trunk_module, "WINDOW_TOKENS", request.param)
    return int(request.param)


@pytest.mark.usefixtures("window_tokens")
@pytest.mark.parametrize("sampler", ["random", "class-balanced", "token-budget"])
def test_stage_1_has_the_plain_losses_in_any_window(
    tiny_checkpoint: Checkpoint, train: Any, sampler: str
) -> None:
    plain, fast = (
        train(tiny_checkpoint, 1, make, sampler=sampler).losses
        for make in (make_plain_step, make_step)
    )
    assert max(plain) - min(plain) > 0.1
    assert fast == pytest.approx(plain, rel=1e-5, abs=1e-5)


def test_stage_1_does_not_keep_or_repeat_the_trunk(
    tiny_checkpoint: Checkpoint, data: StageData, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text goes through the frozen layers once an epoch, together and without a graph."""
    passes: list[int] = []
    original = Bert.forward

    def spy(self: Bert, input_ids_T: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        passes.append(len(input_ids_T))
        return original(self, input_ids_T, *args, **kwargs)

    monkeypatch.setattr(Bert, "forward", spy)
    train(tiny_checkpoint, 1, make_step, dropout=0.1, epochs=3)
    assert len(passes) == 3
    assert sum(passes) < 3 * (len(data.store.ids) + 64)


@pytest.mark.parametrize(("trained", "expected"), [(0, 2), (1, 2), (2, 1), (3, 0)])
def test_all_frozen_layers_but_the_last_are_computed_ahead(
    tiny_checkpoint: Checkpoint, start: Any, trained: int, expected: int
) -> None:
    model = start(tiny_checkpoint, 1).model
    freeze_below_top(model, trained)
    assert count_frozen_layers(model) == expected


def test_windows_have_masks_of_their_own(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One text at each step, in one epoch and in the next."""
    monkeypatch.setattr(trunk_module, "WINDOW_TOKENS", 1)
    state, rows_B = start(tiny_checkpoint, 1, dropout=0.3), np.array([3])
    epochs = [[rows_B, rows_B], [rows_B]]
    with make_step(state, data, cross_entropy, epochs, torch.float32) as step:
        hidden = [step.read_inputs(rows_B, n, 0.0).hidden_TD.clone() for n in (0, 1, 2, 0)]
    assert torch.equal(hidden[0], hidden[3])
    for one, other in pairwise(hidden):
        assert not torch.equal(one, other)


def test_a_text_drawn_twice_has_two_masks_and_the_same_seed_draws_them_again(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any
) -> None:
    model = start(tiny_checkpoint, 1, dropout=0.3).model

    def features(rows: list[int], seed: int | None) -> list[Tensor]:
        masks = None
        if seed is not None:
            masks = drawn_from(torch.Generator().manual_seed(seed))
        computed = compute_features(model, data.store, np.array(rows), 2, masks)
        offsets = computed.store.offsets
        return [computed.hidden_ED[computed.store.ids[a:b].long()] for a, b in pairwise(offsets)]

    first, second, other = features([3, 3, 9], seed=1)
    assert first.shape == second.shape
    assert not torch.equal(first, second)
    assert all(map(torch.equal, features([3, 3, 9], seed=1), (first, second, other)))
    assert not torch.equal(features([3, 3, 9], seed=2)[0], first)
    without, again, _ = features([3, 3, 9], seed=None)
    torch.testing.assert_close(without, again)


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, torch.tensor([3])], ids=["drawn", "counted"])
def test_features_with_dropout_average_to_what_the_layers_give_text_by_text(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, key: Tensor | None
) -> None:
    """Mean and spread over many draws, against the encoder run on the one text alone."""
    model = start(tiny_checkpoint, 1, dropout=0.1).model
    rows = np.full(4_000, 5)
    alone = pack(data.store, torch.tensor([5]), round_to=1)
    generator = torch.Generator().manual_seed(1)
    seeded = torch.Generator().manual_seed(2)
    masks = drawn_from(seeded) if key is None else partial(counters_of, key, seeded, 70)
    computed = compute_features(model, data.store, rows, 2, masks)
    streamed_NTD = computed.hidden_ED[computed.store.ids.long()].view(4_000, alone.num_tokens, -1)
    inputs = (alone.input_ids_T, alone.position_ids_T, packed_layout(alone.cu_seqlens))
    with torch.no_grad():
        draws = [model.bert(*inputs, num_layers=2, randomness=generator) for _ in range(4_000)]
    plain_NTD = torch.stack(draws)
    spread_TD = plain_NTD.std(0)
    z_TD = (streamed_NTD.mean(0) - plain_NTD.mean(0)) / (spread_TD * (2 / 4_000) ** 0.5)
    assert 0.5 < z_TD.square().mean().sqrt() < 1.5  # features are correlated
    torch.testing.assert_close(streamed_NTD.std(0), spread_TD, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_cached_features_train_as_the_recipe_does_without_dropout(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, num_layers: int
) -> None:
    losses = []
    for cached in (False, True):
        state = start(tiny_checkpoint, 1)
        freeze_below_top(state.model, num_layers)
        features = cache_features(state.model, data.store, torch.float32) if cached else ()
        reports: list[StepReport] = []
        train_stage(
            state,
            data,
            cross_entropy,
            StageSettings(2, 2e-3, 8),
            make_step=partial(make_step, features=features),
            on_report=reports.append,
        )
        losses.append([report.loss for report in reports])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_shared_features_are_drawn_anew_for_each_epoch_and_given_to_its_steps(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, impl: str
) -> None:
    state = start(tiny_checkpoint, 1, dropout=0.3)
    few = TokenStore(data.store.ids[: data.store.offsets[2]], data.store.offsets[:3])
    given = cache_features(state.model, few, torch.float32, impl, num_epochs=3)
    assert not torch.equal(given[0].hidden_ED, given[1].hidden_ED)
    epochs = [[np.array([0]), np.array([1])]] * 3
    labelled = StageData(few, np.array([0, 1]))
    make = partial(make_step, impl=impl, features=given)
    with make(state, labelled, cross_entropy, epochs, torch.float32) as step:
        for epoch, theirs in enumerate(given):
            inputs = step.read_inputs(np.array([1]), 2 * epoch + 1, 0.0)
            rows = theirs.store.ids[theirs.store.offsets[1] :].long()
            hidden_TD = inputs.hidden_TD[: len(rows)]
            torch.testing.assert_close(hidden_TD, theirs.hidden_ED[rows])
            assert inputs.labels_B.tolist() == [1]


def test_nothing_is_cached_where_nothing_is_frozen(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any
) -> None:
    model = start(tiny_checkpoint, 1).model
    freeze_below_top(model, 3)
    assert cache_features(model, data.store, torch.float32) == []


@pytest.mark.usefixtures("window_tokens")
def test_a_step_of_stage_1_can_be_replayed_alone(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, train: Any
) -> None:
    """Entered in the middle of a window, the very same features are computed again."""

    class Stop(Exception):
        pass

    def losses(from_step: int) -> list[float]:
        model = start(tiny_checkpoint, 1, dropout=0.1).model
        state = TrainingState(7, model, stage=1, step=from_step)
        seen: list[float] = []

        def report(report: StepReport) -> None:
            seen.append(report.loss)
            if report.step == 6:
                raise Stop

        settings = StageSettings(2, 1e-30, 8)
        with pytest.raises(Stop):
            train_stage(state, data, cross_entropy, settings, make_step=make_step, on_report=report)
        return seen

    whole = losses(0)
    assert len(set(whole)) == 6
    assert losses(4) == whole[4:]
