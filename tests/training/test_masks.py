"""Counted masks: the same text at the same place of the epoch has the same ones, however packed."""

import numpy as np
import pytest
import torch
from torch import Tensor

from twostage.data.packing import TokenStore, pack
from twostage.kernels.dropout import DropoutCounters
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training.masks import seed_masks
from twostage.training.state import TrainingState
from twostage.training.trunk import compute_features

STORE = TokenStore(torch.arange(1, 25).int(), torch.tensor([0, 7, 8, 14, 24]))


def state(checkpoint: Checkpoint, seed: int = 7) -> TrainingState:
    return TrainingState(seed, build_model(checkpoint, 2, torch.Generator().manual_seed(0)))


def counters(state: TrainingState, rows: list[int], first_draw: int) -> DropoutCounters:
    masks = seed_masks(state, 2, state.step, first_draw, torch.Generator(), "triton")
    randomness = masks.of_batch(pack(STORE, torch.tensor(rows), round_to=16))
    assert isinstance(randomness, DropoutCounters)
    return randomness


def test_rows_are_named_by_the_number_of_their_text_and_their_position(
    tiny_checkpoint: Checkpoint,
) -> None:
    found = counters(state(tiny_checkpoint), [2, 1, 2], 40)
    assert found.draws_T.tolist() == [40] * 6 + [41] + [42] * 6 + [0] * 3
    assert found.positions_T.tolist() == [*range(6), 0, *range(6), 0, 0, 0]
    assert found.draws_T.dtype == found.positions_T.dtype == torch.int32


def test_the_key_follows_from_seed_stage_and_epoch_and_from_no_step(
    tiny_checkpoint: Checkpoint,
) -> None:
    def key(**where: int) -> int:
        here = state(tiny_checkpoint)
        for name, value in where.items():
            setattr(here, name, value)
        return int(counters(here, [0], 0).key)

    keys = [key(), key(seed=8), key(stage=2), key(epoch=1)]
    assert len(set(keys)) == 4
    assert key(step=5, batch=5) == keys[0]


def test_without_the_kernels_masks_come_from_the_seeded_generator(
    tiny_checkpoint: Checkpoint,
) -> None:
    generator = torch.Generator()
    for impl in ("auto", "torch"):
        masks = seed_masks(state(tiny_checkpoint), 2, 0, 0, generator, impl)
        assert masks.of_batch(pack(STORE, torch.tensor([0]))) is generator


@pytest.mark.parametrize("num_layers", [0, 1, 3])
def test_the_trunk_drops_the_same_in_any_window(
    tiny_checkpoint: Checkpoint, num_layers: int
) -> None:
    where = state(tiny_checkpoint)
    model = where.model
    rows = np.array([3, 0, 2, 1, 3, 2])

    def features(rows: np.ndarray, first_draw: int) -> list[Tensor]:
        masks = seed_masks(where, 4, first_draw, first_draw, torch.Generator(), "triton")
        found = compute_features(model, STORE, rows, num_layers, masks)
        texts = found.store.ids.split(found.store.lengths.tolist())
        return [found.hidden_ED[text.long()] for text in texts]

    whole = features(rows, 10)
    parts = [*features(rows[:2], 10), *features(rows[2:3], 12), *features(rows[3:], 13)]
    for text, alone in zip(whole, parts, strict=True):
        torch.testing.assert_close(text, alone)
    assert not torch.allclose(whole[0], whole[4]), "one text drawn twice has two masks"
