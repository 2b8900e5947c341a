"""Each sampler as a pure function of (seed, epoch), and what its batches hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostage.data.samplers import (
    SAMPLERS,
    class_balanced_batches,
    epoch_batches,
    length_sorted_batches,
    random_batches,
    token_budget_batches,
)
from twostage.errors import DataError, UsageError

LABELS = np.array([0] * 5 + [1] * 90 + [2] * 25)
LENGTHS = np.random.default_rng(0).integers(3, 60, len(LABELS))


def draw(name: str, seed: int, epoch: int) -> list[np.ndarray]:
    return epoch_batches(name, LABELS, LENGTHS, 16, (seed, 1), epoch)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_is_a_function_of_seed_and_epoch_alone(name: str) -> None:
    first = draw(name, 7, 3)
    np.random.seed(0)
    draw(name, 7, 2)
    again = draw(name, 7, 3)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (draw(name, 7, 4), draw(name, 8, 3)):
        assert not np.array_equal(np.concatenate(first), np.concatenate(other))


@pytest.mark.parametrize("name", ["random", "token-budget"])
def test_every_row_comes_once(name: str) -> None:
    assert sorted(np.concatenate(draw(name, 1, 0))) == list(range(len(LABELS)))


@given(st.integers(0, 50), st.integers(1, 20), st.integers(0, 5))
def test_random_batches_are_full_but_the_last(rows: int, batch: int, epoch: int) -> None:
    sizes = [len(b) for b in random_batches(rows, batch, (1,), epoch)]
    assert sum(sizes) == rows
    assert all(size == batch for size in sizes[:-1])


def test_the_random_order_is_uniform() -> None:
    first = [random_batches(4, 1, (s,), 0)[0][0] for s in range(4_000)]
    counts = np.bincount(first, minlength=4)
    assert abs(counts - 1_000).max() < 5 * (4_000 * 0.25 * 0.75) ** 0.5


def test_class_balanced_batches_give_each_class_its_share_and_repeat_rows_evenly() -> None:
    drawn = np.concatenate(class_balanced_batches(LABELS, 16, (7,), 0))
    assert len(drawn) == len(LABELS)
    assert np.bincount(LABELS[drawn]).tolist() == [40, 40, 40]
    for c in range(3):
        times = np.bincount(drawn, minlength=len(LABELS))[c == LABELS]
        assert times.max() - times.min() <= 1
    # Classes alternate: no batch is without a class.
    assert all(len(set(LABELS[b])) == 3 for b in class_balanced_batches(LABELS, 16, (7,), 0))


def test_class_balanced_needs_a_row_of_each_class() -> None:
    with pytest.raises(DataError, match="class 1 of 3 has no training row"):
        class_balanced_batches(np.array([0, 2]), 4, (1,), 0)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60), st.integers(0, 3))
def test_token_budget_is_kept_and_no_batch_could_take_the_next_text(
    lengths: list[int], budget: int, epoch: int
) -> None:
    lengths_N = np.array(lengths, dtype=np.int64)
    batches = token_budget_batches(lengths_N, budget, (1,), epoch)
    assert sorted(np.concatenate([*batches, []])) == list(range(len(lengths)))
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        tokens = lengths_N[batch].sum()
        assert tokens <= budget or len(batch) == 1
        if following is not None:
            assert tokens + lengths_N[following[0]] > budget


def test_the_token_budget_sampler_aims_at_the_batch_size() -> None:
    batches = draw("token-budget", 1, 0)
    budget = round(16 * LENGTHS.mean())
    assert all(LENGTHS[b].sum() <= budget for b in batches)
    assert 12 < np.mean([len(b) for b in batches]) <= 17


def test_evaluation_batches_are_sorted_and_whole() -> None:
    batches = length_sorted_batches(LENGTHS, 200)
    order = np.concatenate(batches)
    assert sorted(order) == list(range(len(LENGTHS)))
    assert (np.diff(LENGTHS[order]) <= 0).all()
    assert all(LENGTHS[b].sum() <= 200 for b in batches)


def test_an_unknown_sampler_is_refused() -> None:
    with pytest.raises(UsageError, match="'sorted'; expected one of random"):
        draw("sorted", 1, 0)
