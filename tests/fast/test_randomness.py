"""Counted masks: the same text at the same place of the epoch has the same ones, however packed."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from twostage.data.packing import PackedBatch
from twostage.data.token_store import StageData, TokenStore
from twostage.fast.randomness import counted_masks, counters_of
from twostage.fast.step import Step, epoch_key, make_step
from twostage.fast.trunk import compute_features
from twostage.kernels.dropout import DropoutCounters
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import make_plain_step
from twostage.training.state import TrainingState

CPU = torch.device("cpu")
STORE = TokenStore(torch.arange(1, 25).int(), torch.tensor([0, 7, 8, 14, 24]))
EPOCHS = [[np.array([3, 0]), np.array([2, 1, 2])]] * 2


@contextmanager
def steps(
    checkpoint: Checkpoint, seed: int = 7, stage: int = 2, impl: str = "triton"
) -> Iterator[Step]:
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0))
    data = StageData(STORE, np.array([0, 1, 0, 1]))
    state = TrainingState(seed, model, stage)
    with make_step(state, data, cross_entropy, EPOCHS, torch.float32, impl=impl) as step:
        yield step


def counters_at(step: Step, number: int) -> DropoutCounters:
    randomness = step.read_inputs(step.places[number].rows_B, number, 1.0).randomness
    assert isinstance(randomness, DropoutCounters)
    return randomness


def test_rows_are_named_by_the_number_of_their_text_and_their_position(
    tiny_checkpoint: Checkpoint,
) -> None:
    with steps(tiny_checkpoint) as step:
        found = counters_at(step, 1)
    assert found.draws_T[:13].tolist() == [2] * 6 + [3] + [4] * 6
    assert found.positions_T[:13].tolist() == [*range(6), 0, *range(6)]
    assert not found.draws_T[13:].any()
    assert found.draws_T.dtype == found.positions_T.dtype == torch.int32


def test_the_key_follows_from_seed_stage_and_epoch_and_from_no_step(
    tiny_checkpoint: Checkpoint,
) -> None:
    def key(number: int = 0, seed: int = 7, stage: int = 2) -> int:
        with steps(tiny_checkpoint, seed, stage) as step:
            return int(counters_at(step, number).key)

    keys = [key(), key(seed=8), key(stage=1), key(number=2)]
    assert len(set(keys)) == 4
    assert key(number=1) == keys[0]


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_without_the_kernels_masks_come_from_a_seeded_generator(
    tiny_checkpoint: Checkpoint, impl: str
) -> None:
    with steps(tiny_checkpoint, impl=impl) as step:
        inputs = step.read_inputs(step.places[0].rows_B, 0, 1.0)
    assert isinstance(inputs.randomness, torch.Generator)


def test_with_counted_masks_losses_are_the_plain_steps(
    tiny_checkpoint: Checkpoint, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain step is handed the same masks."""
    without = train(tiny_checkpoint, 2, make_plain_step, epochs=1).losses
    monkeypatch.setattr(
        "twostage.fast.randomness.count_masks",
        lambda step: setattr(step, "make_masks", partial(counted_masks, step)),
    )
    ours = train(tiny_checkpoint, 2, make_step, dropout=0.3, epochs=1).losses
    drawn = 0

    def call(model: Any, weights: Any, arguments: Any) -> Tensor:
        nonlocal drawn
        *batch, generator = arguments
        packed = PackedBatch(*batch)
        counters = counters_of(epoch_key(7, 2, 0, CPU), generator, drawn, packed, None)
        drawn += len(packed.cu_seqlens) - 1
        return functional_call(model, weights, (*batch, counters))

    monkeypatch.setattr(stage_module, "functional_call", call)
    plain = train(tiny_checkpoint, 2, make_plain_step, dropout=0.3, epochs=1).losses
    assert ours == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert plain != pytest.approx(without, rel=1e-3)


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_the_trunk_drops_the_same_in_any_window(
    tiny_checkpoint: Checkpoint, num_layers: int
) -> None:
    model = build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0))
    rows = np.array([3, 0, 2, 1, 3, 2])

    def features(rows: np.ndarray, first_draw: int) -> list[Tensor]:
        masks = partial(counters_of, epoch_key(7, 1, 0, CPU), torch.Generator(), first_draw)
        found = compute_features(model, STORE, rows, num_layers, masks)
        texts = found.store.ids.split(found.store.lengths.tolist())
        return [found.hidden_ED[text.long()] for text in texts]

    whole = features(rows, 10)
    parts = [*features(rows[:2], 10), *features(rows[2:3], 12), *features(rows[3:], 13)]
    for text, alone in zip(whole, parts, strict=True):
        torch.testing.assert_close(text, alone)
    assert not torch.allclose(whole[0], whole[4]), "one text drawn twice has two masks"
