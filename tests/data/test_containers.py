"""What can be taken for labelled texts without guessing, and how the rest is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch

from twostage.data.containers import Table, as_table
from twostage.errors import DataError

TEXTS, NAMES = ["good", "bad", "fine"], ["pos", "neg", "pos"]
ROWS = list(zip(TEXTS, NAMES, strict=True))


class Named(NamedTuple):
    label: list[str]
    text: list[str]


class Columns:
    """A data frame of an unknown library."""

    column_names = ("id", "sentence", "label")

    def __getitem__(self, name: str) -> list[Any]:
        columns: dict[str, list[Any]] = {"id": [1, 2, 3], "sentence": TEXTS, "label": NAMES}
        return columns[name]


class Lazy:
    """A frame of polars or Spark."""

    def collect(self) -> pd.DataFrame:
        raise AssertionError("a whole cluster may be behind it")

    @property
    def columns(self) -> list[str]:
        raise AssertionError("this asks for it")


@pytest.mark.parametrize(
    "data",
    [
        Table(TEXTS, NAMES),
        list(pd.DataFrame({"label": NAMES, "text": TEXTS}).itertuples(index=False)),
        Named(label=NAMES, text=TEXTS),
        pd.DataFrame({"label": NAMES, "text": TEXTS}).itertuples(),
        (TEXTS, NAMES),
        [TEXTS, NAMES],
        (tuple(TEXTS), tuple(NAMES)),
        (iter(TEXTS), (name for name in NAMES)),
        (np.array(TEXTS), np.array(NAMES)),
        np.array([TEXTS, NAMES]),
        (pd.Series(TEXTS, index=[5, 6, 7]), pd.Series(NAMES)),
        ROWS,
        tuple(ROWS),
        [list(row) for row in ROWS],
        iter(ROWS),
        zip(TEXTS, NAMES, strict=True),
        np.array(ROWS),
        {"text": TEXTS, "label": NAMES},
        {"Label ": NAMES, "sentence": TEXTS, "id": [1, 2, 3]},
        pd.DataFrame({"text": TEXTS, "label": NAMES}, index=[3, 1, 2]),
        pd.DataFrame({"label": NAMES, "Text": TEXTS}),
        Columns(),
    ],
)
def test_what_can_be_meant_in_one_way_works(data: Any) -> None:
    table = as_table(data, "train data")
    assert list(table.texts) == TEXTS
    assert list(table.labels) == NAMES


@pytest.mark.parametrize(
    "data",
    [
        (["good", "bad"], ["pos", "neg"]),
        (["good", "bad"], [1, 0]),
        [["good", "bad"], [1, 0]],
        [("good", "bad"), (1, 0)],
        (np.array(["good", "bad"]), np.array(["pos", "neg"])),
        (pd.Series(["good", "bad"]), torch.tensor([1, 0])),
        [("good", "pos"), ("bad", "neg")],
        [("good", 1), ("bad", 0)],
        [["good", 1], ["bad", 0]],
        (("good", 1), ("bad", 0)),
        (row for row in [("good", "pos"), ("bad", "neg")]),
    ],
)
def test_two_rows_are_never_transposed(data: Any) -> None:
    table = as_table(data, "train data")
    assert list(table.texts) == ["good", "bad"]
    assert [str(label) for label in table.labels] in (["pos", "neg"], ["1", "0"])


@pytest.mark.parametrize(
    "data",
    [
        [["good", "pos"], ["bad", "neg"]],
        (("good", "pos"), ("bad", "neg")),
        np.array([["good", "pos"], ["bad", "neg"]]),
    ],
)
def test_two_by_two_strings_that_could_be_either_are_refused(data: Any) -> None:
    with pytest.raises(DataError, match=r"two \(text, label\) pairs or two texts .*give a Table"):
        as_table(data, "train data")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ("train.csv", "is 'train.csv'; expected a Table, .*read_table reads a file"),
        (Path("train.csv"), "is PosixPath"),
        (None, "is NoneType"),
        (7, "is int"),
        ([{"text": "a", "label": 1}], "is a list of dicts"),
        (TEXTS, "is a list of strings"),
        ({"text": TEXTS}, "is a dict with the columns text"),
        ({"good": 1, "bad": 0}, "is a dict with the columns good, bad"),
        ({"text": TEXTS, "sentence": TEXTS, "label": NAMES}, "columns text, sentence, label"),
        (pd.DataFrame({"review": TEXTS, "label": NAMES}), "DataFrame with the columns review"),
        (pd.Series(TEXTS), "Series of strings"),
        ({"train": ROWS, "test": ROWS}, "columns train, test"),
        (("good", [1, 0, 1, 1]), "is a tuple of lists and strings"),
        ((TEXTS, "101"), "is a tuple of lists and strings"),
        ({"text": "good", "label": "1"}, "has 'good' where a list is expected"),
        ((TEXTS, NAMES, NAMES), "of 3 items, of which number 0 has 3 values"),
        ([*ROWS, ("x",)], "of 4 items, of which number 3 has 1 value"),
        ({("good", 1), ("bad", 0)}, "is set"),
        (torch.tensor(1), "is torch.Tensor"),
        (Lazy(), "Lazy, which has to be collected first"),
        ((TEXTS, torch.tensor(1)), "is a tuple of lists and torch.Tensors"),
    ],
)
def test_all_else_is_refused_with_the_form(data: Any, what: str) -> None:
    with pytest.raises(DataError, match=what) as caught:
        as_table(data, "train data")
    message = str(caught.value)
    assert message.startswith("train data ")
    assert "(texts, labels), a list of (text, label) pairs, or a mapping or data frame" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "what"),
    [
        ((["a", None], [1, 0]), "row 1: the text is None"),
        ([("a", 1), (float("nan"), 0), ("b", 1)], "row 1: the text is nan"),
        ((["a", "b"], [[1], [0]]), r"row 0: the label is \[1\]"),
        (([1, 2], ["a", "b"]), "row 0: the text is 1"),
        ((["a"], [1, 0]), "1 texts but 2 labels"),
        ([], "train data has no rows"),
        (([], []), "train data has no rows"),
        ([("text", "label"), ("good", 1), ("bad", 0)], "row 0: the names of the columns stand"),
        ([("label", "text"), ("1", "a"), ("0", "b")], "row 0: the names of the columns stand"),
        ([("Text ", "Label"), ("a", "1"), ("b", "0")], "row 0: the names of the columns stand"),
        ((["a", "b"], [1, 10**5_000]), "row 1: the label is a value of type int"),
    ],
)
def test_bad_rows_are_named(data: Any, what: str) -> None:
    with pytest.raises(DataError, match=what):
        as_table(data, "train data")


@pytest.mark.parametrize("make", [lambda: Table("ab", [1, 0]), lambda: Table(["a", "b"], "10")])
def test_letters_are_no_texts(make: Callable[[], Table]) -> None:
    with pytest.raises(DataError, match="where a list is expected"):
        make()


def test_a_frame_in_the_place_of_a_column_is_declined() -> None:
    labels = pd.DataFrame({"toxic": [0, 1], "rude": [1, 1]})
    with pytest.raises(DataError, match="of 2 columns where one is expected"):
        as_table((["x", "y"], labels), "train data")
