"""What a class is: the same for labels from files, from JSON and from Python."""

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twostage.data.classes import Classes, class_name, find_classes, is_label, warn_of_twins
from twostage.data.containers import Table, as_table
from twostage.data.tables import read_table, write_table
from twostage.errors import DataError, TwoStageWarning


def names(*labels: Any) -> tuple[str, ...]:
    return find_classes(Table(["x"] * len(labels), list(labels))).names


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("1", "1"),
        (1, "1"),
        (1.0, "1"),
        ("1.0", "1"),
        ("+1", "1"),
        (np.int64(1), "1"),
        (np.float32(1), "1"),
        ("-0", "0"),
        (" spam\u00a0", "spam"),
        ("012", "012"),
        ("00", "00"),
        ("1.5", "1.5"),
        (1.5, "1.5"),
        ("1e3", "1e3"),
        (1e16, "1e+16"),
        ("true", "true"),
        (True, "True"),
        (np.bool_(True), "True"),
        ("NA", "NA"),
        ("nan", "nan"),
        ("١", "١"),
    ],
)
def test_a_label_means_one_class(label: object, name: str) -> None:
    assert is_label(label)
    assert class_name(label) == name


@pytest.mark.parametrize("label", [None, math.nan, math.inf, pd.NA, pd.NaT, "", " ", b"1", [1], 1j])
def test_what_is_missing_names_no_class(label: object) -> None:
    assert not is_label(label)


def test_whole_floats_are_integers_and_sort_as_numbers() -> None:
    assert names("10.0", "9", 2.0) == ("2", "9", "10")
    assert names("012", "12", "9") == ("012", "12", "9"), "one code makes all of them text"
    assert names(True, 1, 1.0, False) == ("1", "False", "True"), "True is no 1"


def test_train_and_test_may_write_numbers_differently(tmp_path: Path) -> None:
    train = find_classes(Table(["a", "b"], ["0", "1"]))
    assert train.encode(Table(["a", "b", "c"], ["1.0", "+0", 1])).tolist() == [1, 0, 1]
    earlier = Classes(("1.0", "2.0"), "a model of an earlier version")
    assert earlier.encode(Table(["a", "b"], ["2", "1.0"])).tolist() == [1, 0]


LABELS = st.one_of(
    st.integers(-3, 12),
    st.booleans(),
    st.floats(allow_nan=False, allow_infinity=False),
    # Quotes and backslashes are the reader's matter.
    st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1).filter(
        lambda name: not set(name) & {'"', "'", "\\"}
    ),
    st.sampled_from([1.0, -0.0, 12.0, "1.0", "01", "+1", "TRUE", "True", "a b", "é", "nan"]),
)


@given(st.lists(LABELS, min_size=1, max_size=8))
def test_every_door_gives_the_same_classes(
    tmp_path_factory: pytest.TempPathFactory, labels: list[Any]
) -> None:
    texts = [f"text {i}" for i in range(len(labels))]
    folder = tmp_path_factory.mktemp("t")
    rows = list(zip(texts, labels, strict=True))
    write_table(folder / "a.csv", ("text", "label"), rows)
    pd.DataFrame(rows, columns=["text", "label"], dtype=object).to_csv(folder / "b.csv")
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (folder / "a.jsonl").write_text("\n".join(lines))
    tables = [
        Table(texts, labels),
        read_table(folder / "a.csv"),
        read_table(folder / "b.csv"),
        read_table(folder / "a.jsonl"),
        as_table((texts, labels), "x"),
        as_table(rows, "x"),
        as_table((row for row in rows), "x"),
        as_table({"text": texts, "label": labels}, "x"),
        as_table(pd.DataFrame(rows, columns=["text", "label"], dtype=object), "x"),
    ]
    wanted = [class_name(label) for label in labels]
    for table in tables:
        assert list(table.texts) == texts
        assert [class_name(label) for label in table.labels] == wanted


@pytest.mark.parametrize("missing", [None, math.nan, ""])
def test_every_door_refuses_a_missing_label(tmp_path: Path, missing: Any) -> None:
    rows = [("a", "x"), ("b", missing), ("c", "y")]
    frame = pd.DataFrame(rows, columns=["text", "label"], dtype=object)
    frame.to_csv(tmp_path / "a.csv", index=False)
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    doors: list[Callable[[], Table]] = [
        lambda: read_table(tmp_path / "a.csv"),
        lambda: read_table(tmp_path / "a.jsonl"),
        lambda: Table([text for text, _ in rows], [label for _, label in rows]),
        lambda: as_table(rows, "x"),
        lambda: as_table(frame, "x"),
    ]
    for door in doors:
        with pytest.raises(DataError, match=r"(line (3|2)|row 1): the label is .*") as caught:
            door()
        assert "1 bad row:" in str(caught.value)


def test_arrays_and_tensors_of_labels_work() -> None:
    texts = np.array(["a", "b", "c"])
    for labels in (
        np.array([1, 0, 1]),
        np.array([1.0, 0.0, 1.0]),
        torch.tensor([1, 0, 1]),
        torch.tensor([1.0, 0.0, 1.0], dtype=torch.bfloat16),
        list(torch.tensor([1, 0, 1])),
        pd.Series([1, 0, 1], index=[7, 8, 9]),
        pd.Series([1, 0, 1], dtype="Int64"),
        pd.Categorical([1, 0, 1]),
        np.array(["1", "0", "1"]),
    ):
        table = as_table((texts, labels), "x")
        assert find_classes(table).names == ("0", "1")
        assert find_classes(table).encode(table).tolist() == [1, 0, 1]
    for ratings in (
        np.array([4.7, 5, 4.7], dtype=np.float32),
        torch.tensor([4.7, 5, 4.7]),
        torch.tensor([4.7, 5, 4.7], requires_grad=True),
        list(torch.tensor([4.7, 5, 4.7])),
        torch.tensor([4.7, 5, 4.7]).half(),
        pd.Series([4.7, 5, 4.7], dtype="float32"),
    ):
        assert find_classes(as_table((texts, ratings), "x")).names == ("4.7", "5")
    for bools in (np.array([True, False]), torch.tensor([True, False]), ["True", "False"]):
        assert find_classes(as_table((["a", "b"], bools), "x")).names == ("False", "True")


def test_one_nan_among_integers_names_its_row_alone() -> None:
    frame = pd.DataFrame({"text": ["a", "b", "c", "d"], "label": [1, 0, None, 1]})
    with pytest.raises(DataError, match=r"^x has 1 bad row: x, row 2: the label is nan; expected"):
        as_table(frame, "x")


@pytest.mark.parametrize(
    ("other", "kind"),
    [
        ("SPAM", "case"),
        ("sp am", "white space"),
        ("spam\u200b", "invisible characters"),
        ("s\u200bpam", "invisible characters"),
        ("\uff53pam", "Unicode form"),
        ("sp\u0430m", "letters that look alike"),
        ("Sp am", "case and white space"),
    ],
)
def test_near_twins_are_named_with_what_they_differ_in(other: str, kind: str) -> None:
    train = Table(["x"] * 41, ["spam"] * 30 + ["ham"] * 9 + [other] * 2)
    classes = find_classes(train)
    assert len(classes) == 3
    with pytest.warns(TwoStageWarning) as caught:
        warn_of_twins(classes, train)
    (message,) = {str(warning.message) for warning in caught}
    assert "'spam' (30 rows)" in message
    assert "(2 rows)" in message
    assert f"differ only in {kind}; if they are one, write them alike" in message
    assert "ham'" not in message.replace("spam'", "")
    assert "\n" not in message
    assert message.isprintable(), "what is invisible is shown escaped"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["01", "1", "2"], r"'01' \(1 row\) and '1' .* the form of a number"),
        (["cafe\u0301", "café"], r"'cafe\\u0301' .*'caf\\xe9' .* differ only in Unicode form"),
        (['"1"', "1", "0"], "differ only in quotation marks"),
        (["İyi", "iyi"], "differ only in case"),
        (["a\u3164", "a"], "differ only in invisible characters"),
        (["250", "250.0", "250", "9"], r"class '250' is written as '250' \(2 rows\) and '250.0'"),
    ],
)
def test_what_may_be_a_slip_is_named(labels: list[str], message: str) -> None:
    train = Table(["x"] * len(labels), labels)
    classes = find_classes(train)
    with pytest.warns(TwoStageWarning, match=message):
        warn_of_twins(classes, train)


@pytest.mark.parametrize(
    "labels",
    [
        ["0", "1", "10", "-1", "a", "b", "ab"],
        [1, "1", 0, np.int64(0)],
        ["comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware", "talk.politics.misc"],
        ["joy", "sadness", "anger", "fear", "love", "surprise"],
        ["1.0", "2.0", "3.0", "4.0", "5.0"],
        ["A00.0", "A00.1", "A01.00", "U07.1"],
        ["en", "en-GB", "pt", "pt-BR", "zh-Hans", "zh-Hant"],
    ],
    ids=str,
)
def test_ordinary_classes_have_no_twins(labels: list[Any]) -> None:
    train = Table(["x"] * len(labels), labels)
    classes = find_classes(train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_twins(classes, train)


def test_a_slip_in_the_test_data_is_said_first(tmp_path: Path) -> None:
    classes = find_classes(Table(["a", "b"], ["True", "False"], "train.csv"))
    table = Table(["x"] * 40, ["TRUE"] * 20 + ["FALSE"] * 20, "test.csv", range(2, 42))
    with pytest.raises(DataError) as caught:
        classes.encode(table)
    message = str(caught.value)
    assert message.startswith(
        "test.csv, line 2: class 'TRUE' differs only in case from class 'True' of train.csv"
    )
    assert "(20 such rows)" in message
    assert len(message) < 300


def test_an_unknown_class_among_a_thousand_is_one_readable_sentence() -> None:
    classes = Classes(tuple(map(str, range(1_000))), "train.csv")
    with pytest.raises(DataError, match=r"whose classes are 0, 1, .*and 980 more\)") as caught:
        classes.encode(Table(["a"], ["x\x1b[31m\n"]))
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["a", "b", "a|b"], r"'a\|b' seem"),
        (["news", "sport", "news; sport"], "'news; sport' seem"),
        (["a", "b", "a, b", "b, a"], "'a, b', 'b, a' seem"),
        (["1", "2", "1,2", "2,1", "1,2,3", "3"], "'1,2', '1,2,3', '2,1' seem"),
        (["a|b", "b|c", "a|c"], r"'a\|b', 'b\|c' seem"),
        (["['a', 'b']", "['a']"], r"'\['a', 'b'\]', '\['a'\]' seem"),
        (['["a"]', "b"], r"'\[\"a\"\]' seem"),
        (["[1, 0]", "[0, 1]", "[1, 1]"], r"'\[0, 1\]', '\[1, 0\]', '\[1, 1\]' seem"),
        (["[1 0 0]", "[0 1 0]"], r"'\[0 1 0\]', '\[1 0 0\]' seem"),
        (["1 0 0", "0 1 1"], "'0 1 1', '1 0 0' seem"),
        (["[27]", "[3, 10]", "[ 3 10]"], r"'\[ 3 10\]', '\[27\]', '\[3, 10\]' seem"),
        (["[1.0, 0.0]", "[0.0, 1.0]"], r"'\[0.0, 1.0\]', '\[1.0, 0.0\]' seem"),
        (["[0. 1.]", "[1. 0.]"], r"'\[0. 1.\]', '\[1. 0.\]' seem"),
        (["[True, False]", "[False, True]"], r"'\[False, True\]', '\[True, False\]' seem"),
        (["(1, 0, 1)", "(0, 0, 1)"], r"'\(0, 0, 1\)', '\(1, 0, 1\)' seem"),
        (["[joy, fear]", "[joy]"], r"'\[joy, fear\]' seem"),
        (["a||b", "a", "b"], r"'a\|\|b' seem"),
        (["joy;fear;", "joy;", "fear;"], "'joy;fear;' seem"),
        (["2", "27", "2,27"], "'2,27' seem"),
        (["3,10", "0,10", "3", "10", "0"], "'0,10', '3,10' seem"),
        ([f"a|{c}" for c in "bcdefgh"] + list("abcdefgh"), r"'a\|b', .*'a\|d', and 4 more seem"),
    ],
)
def test_several_classes_in_one_label_are_declined(labels: list[str], shown: str) -> None:
    table = Table(["x"] * len(labels), labels, "a.csv")
    with pytest.raises(DataError, match=rf"a\.csv: labels such as {shown}.*not supported"):
        find_classes(table)


@pytest.mark.parametrize(
    "labels",
    [
        ["a|b", "c|d"],
        ["R&D; Sales", "Legal"],
        ["Paris, Texas", "Paris, France", "Rome"],
        ["sport;football", "sport;tennis", "news;local"],
        ["(0, 10]", "(10, 20]"],
        ["[spam]", "[ham]"],
        ["1.5", "2.5"],
        ["C++", "C|", "C"],
        ["a,", ",a"],
        ["0,5", "1,0", "1,5", "2,5", "5,1"],
        ["0", "5", "0,5"],
        ["0", "0,5", "1", "1,5", "2", "2,5", "5"],
        ["News|Sports", "News|Politics", "Arts|Music", "Arts|Politics"],
        ["Portland, OR", "Salem, OR", "Portland, ME", "Salem, MA"],
        ["A;1", "A;2", "B;1", "B;2"],
        ["cpu|intel", "cpu|amd", "gpu|intel", "gpu|amd"],
        ["Food", "Drink", "Food, Drink"],
        ["0", "1"],
        ["1,0", "0,1"],
    ],
)
def test_names_with_marks_in_them_are_names(labels: list[str]) -> None:
    assert len(find_classes(Table(["x"] * len(labels), labels))) == len(labels)


@pytest.mark.parametrize("label", [["a", "b"], ("a",), {"a"}, np.array([0, 1]), {"a": 1}])
def test_a_list_for_a_label_is_declined(label: Any) -> None:
    with pytest.raises(DataError, match=r"row 1: the label is .*multi-label data are not"):
        Table(["x", "y"], ["a", label])
