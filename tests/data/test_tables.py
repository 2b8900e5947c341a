"""Tables as people have them, and what is said about those that cannot be used."""

import csv
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostage.data.tables import Table, find_classes, read_table, write_table
from twostage.errors import DataError


def write(tmp_path: Path, content: str | bytes, name: str = "train.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ("text,label\nfine,1\nbad,0\n", "a.csv"),
        ("label,text\n1,fine\n0,bad\n", "a.csv"),
        ("org_ind,label,text\n4,1,fine\n9,0,bad\n", "a.csv"),
        ("text,label\r\nfine,1\r\nbad,0\r\n", "a.csv"),
        ("text,label\rfine,1\rbad,0", "a.csv"),
        ("\ufefftext,label\nfine,1\nbad,0", "a.csv"),
        ('"text","label"\n"fine","1"\n"bad","0"\n', "a.csv"),
        ("Text , Label\nfine, 1\nbad,0 \n", "a.csv"),
        ("text,label\n\nfine,1\n   \nbad,0\n\n", "a.csv"),
        ("sentence\tlabel\nfine\t1\nbad\t0\n", "a.tsv"),
        ("label\tsentence\r\n1\tfine\r\n0\tbad", "A.TSV"),
    ],
)
def test_dialects_that_mean_the_same_read_the_same(tmp_path: Path, content: str, name: str) -> None:
    table = read_table(write(tmp_path, content, name))
    assert list(table.texts) == ["fine", "bad"]
    assert list(table.labels) == ["1", "0"]


def test_quotes_commas_newlines_and_null_words_are_text(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        'text,label\n"a, ""b""\nc",1\nnull,0\nNA,1\n,0\nsay "hi",1\n  spaced  ,0\n',
    )
    table = read_table(path)
    assert list(table.texts) == ['a, "b"\nc', "null", "NA", "", 'say "hi"', "  spaced  "]
    assert list(table.lines) == [2, 4, 5, 6, 7, 8]
    expected = pd.read_csv(path, keep_default_na=False)["text"]
    assert list(table.texts) == list(expected)


def test_a_text_of_a_million_characters_is_read_and_the_csv_limit_is_put_back(
    tmp_path: Path,
) -> None:
    limit = csv.field_size_limit()
    table = read_table(write(tmp_path, f"text,label\n{'x' * 1_000_000},1\n"))
    assert len(table.texts[0]) == 1_000_000
    assert csv.field_size_limit() == limit


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
            st.integers(0, 9),
        ),
        min_size=1,
        max_size=8,
    ),
    st.sampled_from([".csv", ".tsv"]),
)
def test_what_is_written_is_read_back_and_pandas_agrees(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]], suffix: str
) -> None:
    path = tmp_path_factory.mktemp("t") / f"a{suffix}"
    write_table(path, ("text", "label"), rows)
    table = read_table(path)
    assert list(table.texts) == [text for text, _ in rows]
    assert [int(label) for label in table.labels] == [label for _, label in rows]
    if any("\r" in text for text, _ in rows):
        return  # pandas writes a bare carriage return that it then reads as the end of the row
    buffer = io.StringIO()
    separator = "," if suffix == ".csv" else "\t"
    frame = pd.DataFrame(rows, columns=["text", "label"])
    frame.to_csv(buffer, index=False, sep=separator, lineterminator="\n")
    assert path.read_bytes() == buffer.getvalue().encode()


def test_all_bad_rows_are_named_by_line_up_to_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path, "text,label\nfine,1\nno label\na,b,c\nempty,\nbad,0\n")
    with pytest.raises(DataError) as caught:
        read_table(path)
    message = str(caught.value)
    assert f"{path} has 3 bad rows" in message
    assert "line 3: 1 fields, but the header has 2" in message
    assert "line 4: 3 fields" in message
    assert "line 5: the label is empty" in message

    path = write(tmp_path, "text,label\n" + "x\n" * 25)
    with pytest.raises(
        DataError, match=r"25 bad rows: line 2: .*line 11: .*; and 15 more"
    ) as caught:
        read_table(path)
    assert "line 12" not in str(caught.value)


def test_a_quote_that_is_never_closed_is_named_by_the_line_where_it_opens(tmp_path: Path) -> None:
    path = write(tmp_path, 'text,label\nfine,1\n"open,0\nbad,0\n')
    with pytest.raises(DataError, match="line 3: a quote opens here and is never closed"):
        read_table(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\ufeff \n\n", "is empty"),
        ("text,label\n", "has a header but no rows"),
        ("a,b\n1,2\n", "line 1: expected columns 'text' and 'label'; the header is: a, b"),
        ("text,label,text\na,1,b\n", "column 'text' occurs twice"),
        (b"text,label\nfine,1\nna\xefve,0\n", "line 3: not valid UTF-8"),
    ],
)
def test_a_file_that_is_no_table_is_refused_in_one_sentence(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_table(write(tmp_path, content))
    assert str(tmp_path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*absent\.csv"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(DataError, match="cannot be read"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["1", "0", "1"], ("0", "1")),
        ([10, 9, 2], ("2", "9", "10")),
        (["10", "9", "+2", "-1"], ("-1", "2", "9", "10")),
        (["b", "a", "10"], ("10", "a", "b")),
        (["1.0", "2.0", "10."], ("1", "2", "10")),
        (["1.5", "10", "9"], ("1.5", "10", "9")),
    ],
)
def test_classes_sort_as_numbers_if_all_are_integers_else_as_text(
    labels: list[str], names: tuple[str, ...]
) -> None:
    classes = find_classes(Table(["x"] * len(labels), labels))
    assert classes.names == names


def test_a_label_without_training_row_is_named_with_its_place(tmp_path: Path) -> None:
    classes = find_classes(read_table(write(tmp_path, "text,label\na,0\nb,1\n")))
    test = read_table(write(tmp_path, "text,label\na,0\nb,2\nc,7\n", "test.csv"))
    with pytest.raises(
        DataError,
        match=r"2 bad rows: .*test\.csv, line 3: class '2'; .*line 4: class '7' \(no such row in .*"
        r"train\.csv, whose classes are 0, 1\)",
    ):
        classes.encode(test)


def test_one_class_is_refused() -> None:
    with pytest.raises(DataError, match="all 2 rows have class 'x'; at least two"):
        find_classes(Table(["a", "b"], ["x", "x"]))


def test_data_in_memory_is_checked() -> None:
    with pytest.raises(DataError, match="2 texts but 1 labels"):
        Table(["a", "b"], [1])
    with pytest.raises(DataError, match=r"row 1: the text is nan; .*row 2: the text is None"):
        Table(["a", float("nan"), None], [1, 0, 1])  # type: ignore[list-item]
    for label in (float("nan"), float("inf"), None, b"x", " ", np.array(1)):
        with pytest.raises(DataError, match=r"row 1: the label is .* expected a string or an int"):
            Table(["a", "b"], [1, label])  # type: ignore[list-item]


def test_labels_of_absurd_length_are_names() -> None:
    long = "9" * 5_000
    assert find_classes(Table(["a", "b"], ["1", long])).names == ("1", long)


def test_a_quote_opened_in_the_header_is_refused_without_printing_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: a quote opens in the header") as caught:
        read_table(write(tmp_path, 'text,"label\n' + "x,1\n" * 1_000))
    assert len(str(caught.value)) < 300
