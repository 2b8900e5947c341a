"""The published walk and the published choice of rows, against both written out literally."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostage.augmentation.balancing import Walk, choose_rows, count_draws
from twostage.augmentation.folder import choose_table
from twostage.augmentation.paraphrase import Paraphrase, Pool
from twostage.data.classes import Classes
from twostage.data.tables import AUGMENTED_COLUMNS, Table, write_table


def literal_walk(labels: list[int], num_classes: int) -> list[tuple[int, int]]:
    """(pass, row) of each paraphrase, as the published loop comes to them."""
    wanted = 1.01 * max(labels.count(c) for c in range(num_classes))
    have = [0] * num_classes
    drawn = []
    pass_ = 0
    while min(have) < wanted:
        for row, label in enumerate(labels):
            if have[label] > wanted:
                continue
            have[label] += 1
            drawn.append((pass_, row))
        pass_ += 1
    return drawn


@st.composite
def label_lists(draw: st.DrawFn) -> list[int]:
    num_classes = draw(st.integers(2, 4))
    others = draw(st.lists(st.integers(0, num_classes - 1), max_size=150))
    return draw(st.permutations([*range(num_classes), *others]))


def deal_all(labels: list[int]) -> list[tuple[int, int]]:
    counts_C = np.bincount(labels).tolist()
    walk = Walk([f"text {row}" for row in range(len(labels))], np.array(labels))
    return [(draw.pass_, draw.row) for draw in walk.deal(count_draws(counts_C))]


@given(label_lists())
def test_the_walk_is_the_published_one(labels: list[int]) -> None:
    assert deal_all(labels) == literal_walk(labels, max(labels) + 1)


@pytest.mark.parametrize("majority", [1, 99, 100, 101, 200, 1_000])
@pytest.mark.parametrize("tail", [1, 7, 101])
def test_the_walk_is_the_published_one_where_the_surplus_is_a_whole_number(
    majority: int, tail: int
) -> None:
    labels = [1] * majority + [0] * min(tail, majority)
    assert deal_all(labels) == literal_walk(labels, 2)


def test_sst_2_at_rate_0_2_takes_about_76_000_calls() -> None:
    assert sum(count_draws([7_513, 37_569])) == 2 * 37_945


def test_one_tail_row_beside_100_000_others_is_planned_in_no_time() -> None:
    assert count_draws([1, 100_000]) == [101_000, 101_001]


def test_a_class_goes_on_where_it_stopped() -> None:
    labels = np.array([0, 1, 1, 0, 1])
    whole = Walk(list("abcde"), labels).deal([7, 4])
    walk = Walk(list("abcde"), labels)
    in_parts = [*walk.deal([3, 0]), *walk.deal([2, 4]), *walk.deal([2, 0])]
    assert sorted(in_parts) == sorted(whole)


def test_a_text_that_stands_in_two_rows_is_never_asked_for_the_same_draw() -> None:
    draws = Walk(["same", "other", "same"], np.array([0, 1, 0])).deal([5, 2])
    repeats = [draw.repeat for draw in draws if draw.row != 1]
    assert repeats == [0, 1, 2, 3, 4]
    assert [draw.pass_ for draw in draws if draw.row != 1] == [0, 0, 1, 1, 2]


@given(label_lists(), st.integers(0, 5))
def test_aug_csv_is_what_pandas_makes_of_the_pool(labels: list[int], surplus: int) -> None:
    labels_N = np.array(labels)
    counts_C = np.bincount(labels_N)
    num_majority = int(counts_C.max())
    pool = Pool(Table([f"text {row}" for row in range(len(labels))], labels), labels_N)
    for c in range(len(counts_C)):
        rows = np.flatnonzero(labels_N == c)
        for k in range(num_majority + surplus):
            pass_, at = divmod(k, len(rows))
            text = f'a "text", {rows[at]}.{pass_}'
            pool.paraphrases.append(Paraphrase(int(rows[at]), pass_, text))
    # In the order of the answers, whichever that was.
    order = np.random.default_rng(0).permutation(len(pool.paraphrases))
    pool.paraphrases[:] = [pool.paraphrases[i] for i in order]

    frame = pd.DataFrame(sorted(pool.paraphrases), columns=["org_ind", "pass", "text"])
    frame["label"] = labels_N[frame["org_ind"]]
    chosen = [
        group.sample(num_majority, random_state=42)
        for _, group in frame.groupby("label", sort=True)
    ]
    expected = pd.concat(chosen).sample(frac=1, random_state=42)[["org_ind", "text", "label"]]
    ours = choose_table(pool, Classes(tuple(map(str, range(len(counts_C)))), "these"))
    got = pd.DataFrame(ours, columns=["org_ind", "text", "label"])
    assert got.to_csv(index=False) == expected.to_csv(index=False)


def test_a_class_with_too_few_gives_all_it_has() -> None:
    labels = np.array([0, 0, 0, 1])
    rows = choose_rows(labels, 2, 3)
    assert sorted(labels[rows].tolist()) == [0, 0, 0, 1]


def test_the_file_is_written_as_pandas_writes_it(tmp_path: Path) -> None:
    rows = [(3, 'said "no", twice', "0"), (0, "two\nlines", "1"), (12, "", "0")]
    write_table(tmp_path / "aug.csv", AUGMENTED_COLUMNS, rows)
    frame = pd.DataFrame(rows, columns=list(AUGMENTED_COLUMNS))
    assert (tmp_path / "aug.csv").read_text() == frame.to_csv(index=False)
