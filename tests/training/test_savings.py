"""Nothing that is saved changes what is trained: each step against the plain path.

The plain path is written out here: fp32 (or torch's bf16 autocast), every layer for every token,
the whole word table, the frozen layers run at every step, torch's unfused AdamW and its clipping.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twostage.data.packing import TokenStore, pack, renumber_tokens
from twostage.data.samplers import random_batches
from twostage.model.bert import Bert, BertClassifier
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training import stage as stage_module
from twostage.training import trunk as trunk_module
from twostage.training.losses import Loss, cross_entropy, make_loss
from twostage.training.masks import Masks
from twostage.training.optim import linear_decay
from twostage.training.stage import StageData, StageSettings, train_stage
from twostage.training.state import TrainingState
from twostage.training.trunk import FrozenTrunk, cache_features, compute_features
from twostage.two_stage import freeze_below_top

EPOCHS, RATE, BATCH = 2, 2e-3, 8
NEVER_USED = torch.arange(80, 101)
"""Tokens that no text of the data has."""


@pytest.fixture
def data() -> StageData:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 20, (50,), generator=generator)
    ids = torch.randint(1, 80, (int(lengths.sum()),), generator=generator).int()
    offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    return StageData(TokenStore(ids, offsets), np.arange(50) % 2)


def make_model(checkpoint: Checkpoint, stage: int, dropout: float = 0.0) -> BertClassifier:
    config = replace(
        checkpoint.config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    checkpoint = replace(checkpoint, config=config)
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0))
    if stage == 1:
        freeze_below_top(model, 1)
    return model


def loss_of(stage: int, data: StageData) -> Loss:
    counts_C = data.class_counts(2)
    cpu = torch.device("cpu")
    return make_loss("ldam", "effective", counts_C, cpu) if stage == 1 else cross_entropy


def train_plainly(
    model: BertClassifier, stage: int, data: StageData, *, autocast: bool = False
) -> list[float]:
    """The loss of each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=False, foreach=False)
    batches = [b for epoch in range(EPOCHS) for b in random_batches(50, BATCH, (7, stage), epoch)]
    losses = []
    for step, rows_B in enumerate(batches):
        batch = pack(data.store, torch.from_numpy(rows_B), round_to=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden_TD = model.bert(batch.input_ids_T, batch.position_ids_T, batch.layout)
            first_BD = hidden_TD[batch.cu_seqlens[:-1].long()]
            logits_BC = model.classifier(torch.tanh(model.bert.pooler(first_BD)))
        loss = loss_of(stage, data)(logits_BC.float(), torch.from_numpy(data.labels_N[rows_B]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = RATE * linear_decay(step, len(batches))
        optimizer.step()
    return losses


def train_ours(
    model: BertClassifier, stage: int, data: StageData, **settings: object
) -> list[float]:
    """The loss of each step, by `train_stage`."""
    losses = []
    plain_loss = loss_of(stage, data)

    def watched(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        loss = plain_loss(logits_BC, labels_B)
        losses.append(loss.item())
        return loss

    state = TrainingState(7, model, stage=stage)
    train_stage(state, data, watched, StageSettings(EPOCHS, RATE, BATCH, **settings))  # type: ignore[arg-type]
    return losses


@pytest.fixture(params=[40, 32_768], ids=["small windows", "one window"])
def window_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(trunk_module, "WINDOW_TOKENS", request.param)
    return int(request.param)


@pytest.mark.parametrize("stage", [1, 2])
def test_in_fp32_each_step_has_the_plain_paths_loss(
    tiny_checkpoint: Checkpoint, data: StageData, stage: int, window_tokens: int
) -> None:
    ours_model, plain_model = (make_model(tiny_checkpoint, stage) for _ in range(2))
    ours, plain = train_ours(ours_model, stage, data), train_plainly(plain_model, stage, data)
    assert len(ours) == len(plain) == 14
    assert max(plain) - min(plain) > 0.1, "a rate at which the steps differ"
    assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5)
    for (name, p), expected in zip(
        ours_model.named_parameters(), plain_model.parameters(), strict=True
    ):
        # AdamW moves a weight whose gradient is nothing but rounding by its whole rate.
        torch.testing.assert_close(p, expected, rtol=1e-3, atol=2 * RATE, msg=name)


@pytest.mark.parametrize("stage", [1, 2])
def test_in_bf16_each_step_is_as_near_the_fp32_path_as_autocast_is(
    tiny_checkpoint: Checkpoint, data: StageData, stage: int
) -> None:
    """The rule: over the steps, the losses' root mean square distance from the plain fp32 path is
    at most twice that of the plain path under torch's bf16 autocast, plus 1e-3."""
    exact = np.array(train_plainly(make_model(tiny_checkpoint, stage), stage, data))
    theirs = train_plainly(make_model(tiny_checkpoint, stage), stage, data, autocast=True)
    ours = train_ours(make_model(tiny_checkpoint, stage), stage, data, dtype=torch.bfloat16)
    error, allowed = (np.sqrt(np.mean((np.array(x) - exact) ** 2)) for x in (ours, theirs))
    assert 0 < error <= 2 * allowed + 1e-3


def test_unseen_word_rows_stay_and_the_others_are_a_dense_trainings(
    tiny_checkpoint: Checkpoint, data: StageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loop on the compact and on the whole table."""
    tables, losses = [], []
    for renumber in (renumber_tokens, lambda store: (store, None)):
        monkeypatch.setattr(stage_module, "renumber_tokens", renumber)
        model = make_model(tiny_checkpoint, 2, dropout=0.1)
        before = model.bert.embeddings.word.weight.detach().clone()
        losses.append(train_ours(model, 2, data))
        tables.append(model.bert.embeddings.word.weight.detach())
        assert torch.equal(tables[-1][NEVER_USED], before[NEVER_USED])
        assert not torch.equal(tables[-1], before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


def test_stage_1_does_not_keep_or_repeat_the_trunk(
    tiny_checkpoint: Checkpoint, data: StageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every text goes through the frozen layers once an epoch, together and without a graph."""
    passes: list[int] = []
    model = make_model(tiny_checkpoint, 1, dropout=0.1)
    original = type(model.bert).forward

    def spy(self: Bert, input_ids_T: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not torch.is_grad_enabled()
        passes.append(len(input_ids_T))
        return original(self, input_ids_T, *args, **kwargs)

    monkeypatch.setattr(type(model.bert), "forward", spy)
    train_ours(model, 1, data)
    assert len(passes) == EPOCHS
    assert sum(passes) < EPOCHS * (len(data.store.ids) + 64)


def test_a_text_drawn_twice_has_two_masks_and_the_same_seed_draws_them_again(
    tiny_checkpoint: Checkpoint, data: StageData
) -> None:
    model = make_model(tiny_checkpoint, 1, dropout=0.3)

    def features(rows: list[int], seed: int | None) -> list[Tensor]:
        masks = None
        if seed is not None:
            masks = Masks(torch.Generator().manual_seed(seed), key=None, first_draw=0)
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
    tiny_checkpoint: Checkpoint, data: StageData, key: Tensor | None
) -> None:
    """Mean and spread over many draws, against the encoder run on the one text alone."""
    model = make_model(tiny_checkpoint, 1, dropout=0.1)
    rows = np.full(4_000, 5)
    alone = pack(data.store, torch.tensor([5]), round_to=1)
    generator = torch.Generator().manual_seed(1)
    masks = Masks(torch.Generator().manual_seed(2), key, first_draw=70)
    computed = compute_features(model, data.store, rows, 2, masks)
    streamed_NTD = computed.hidden_ED[computed.store.ids.long()].view(4_000, alone.num_tokens, -1)
    inputs = (alone.input_ids_T, alone.position_ids_T, alone.layout)
    with torch.no_grad():
        draws = [model.bert(*inputs, num_layers=2, randomness=generator) for _ in range(4_000)]
    plain_NTD = torch.stack(draws)
    spread_TD = plain_NTD.std(0)
    z_TD = (streamed_NTD.mean(0) - plain_NTD.mean(0)) / (spread_TD * (2 / 4_000) ** 0.5)
    assert 0.5 < z_TD.square().mean().sqrt() < 1.5  # features are correlated
    torch.testing.assert_close(streamed_NTD.std(0), spread_TD, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_cached_features_train_as_the_recipe_does_without_dropout(
    tiny_checkpoint: Checkpoint, data: StageData, num_layers: int
) -> None:
    losses = []
    for cached in (False, True):
        model = make_model(tiny_checkpoint, 1)
        freeze_below_top(model, num_layers)
        features = cache_features(model, data.store, torch.float32) if cached else ()
        seen: list[float] = []
        train_stage(
            TrainingState(7, model),
            data,
            cross_entropy,
            StageSettings(EPOCHS, RATE, BATCH),
            features=features,
            on_report=lambda report, seen=seen: seen.append(report.loss),  # type: ignore[misc]
        )
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_shared_features_are_drawn_anew_for_each_epoch_and_given_to_its_steps(
    tiny_checkpoint: Checkpoint, data: StageData, impl: str
) -> None:
    model = make_model(tiny_checkpoint, 1, dropout=0.3)
    few = TokenStore(data.store.ids[: data.store.offsets[2]], data.store.offsets[:3])
    first, second, *_ = epochs = cache_features(model, few, torch.float32, impl, num_epochs=3)
    assert not torch.equal(first.hidden_ED, second.hidden_ED)
    feed = FrozenTrunk(model, few, 2, epochs, impl)
    for epoch in (0, 1, 2):
        state = TrainingState(7, model, epoch=epoch, batch=0, step=epoch)
        hidden_TD, batch = feed.take_batch(state, [np.array([1])])
        theirs = epochs[epoch]
        rows = theirs.store.ids[theirs.store.offsets[1] :].long()
        torch.testing.assert_close(hidden_TD[: batch.num_tokens], theirs.hidden_ED[rows])


def test_nothing_is_cached_where_nothing_is_frozen(
    tiny_checkpoint: Checkpoint, data: StageData
) -> None:
    model = make_model(tiny_checkpoint, 1)
    freeze_below_top(model, 3)
    assert cache_features(model, data.store, torch.float32) == []


def test_a_step_of_stage_1_can_be_replayed_alone(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    monkeypatch: pytest.MonkeyPatch,
    window_tokens: int,
) -> None:
    """Entered in the middle of a window, the trunk computes the very same features again."""
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)

    class Stop(Exception):
        pass

    def losses(from_step: int) -> list[float]:
        model = make_model(tiny_checkpoint, 1, dropout=0.1)
        state = TrainingState(7, model, stage=1, batch=from_step, step=from_step)
        seen: list[float] = []

        def report(report: stage_module.StepReport) -> None:
            seen.append(report.loss)
            if report.step == 6:
                raise Stop

        settings = StageSettings(EPOCHS, 1e-30, BATCH)
        with pytest.raises(Stop):
            train_stage(state, data, cross_entropy, settings, on_report=report)
        return seen

    whole = losses(0)
    assert len(set(whole)) == 6
    assert losses(4) == whole[4:]
