"""Files as programs and people write them: read as they were meant, or refused."""

import csv
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from twostage.data.tables import Table, read_table
from twostage.errors import DataError, TwoStageWarning, UsageError

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(content: str, name: str = "a.csv") -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode())
        return path

    return write_file


def pairs(table: Table) -> list[tuple[str, object]]:
    return list(zip(table.texts, table.labels, strict=True))


# Everything that a dialect gives a meaning to, and little else.
CELLS = st.text(st.sampled_from("ab01 \",'\t\n\r\\;|"), max_size=10)
ROWS = st.lists(st.tuples(CELLS, st.sampled_from(["0", "1", "ham"])), min_size=1, max_size=6)
HEADERS = st.sampled_from([("text", "label"), ("label", "text"), ("sentence", "label")])
SUFFIXES = st.sampled_from([".csv", ".tsv", ".txt"])


class Semicolons(csv.excel):
    """As a spreadsheet writes where the comma is the decimal sign."""

    delimiter = ";"


class Enclosed(csv.excel_tab):
    quoting = csv.QUOTE_ALL


class Named(csv.unix_dialect):
    """As pandas writes with `quoting=csv.QUOTE_NONNUMERIC`."""

    quoting = csv.QUOTE_NONNUMERIC
    delimiter = "|"


class Apostrophes(csv.excel):
    quotechar = "'"
    quoting = csv.QUOTE_ALL


class Escaped(csv.excel):
    """As MySQL and Spark write."""

    doublequote = False
    escapechar = "\\"


DIALECTS = [*csv.list_dialects(), Semicolons, Enclosed, Named, Apostrophes, Escaped]


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, header=HEADERS, suffix=SUFFIXES)
def test_what_the_csv_module_writes_is_read_back_or_refused(
    tmp_path: Path,
    dialect: Any,
    rows: list[tuple[str, str]],
    header: tuple[str, str],
    suffix: str,
) -> None:
    path = tmp_path / f"a{suffix}"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, dialect)
        writer.writerow(header)
        writer.writerows([row if header[1] == "label" else row[::-1] for row in rows])
    assert_equal_or_refused(path, rows)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS)
def test_glues_plain_files_are_read_back_or_refused(
    tmp_path: Path, rows: list[tuple[str, str]]
) -> None:
    rows = [(text.translate(dict.fromkeys(map(ord, "\t\n\r"))), label) for text, label in rows]
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f"{t}\t{n}\n" for t, n in rows), "utf-8")
    assert_equal_or_refused(path, rows)


def assert_equal_or_refused(path: Path, rows: list[tuple[str, str]]) -> None:
    found, message = read_or_refuse(path)
    assert found == rows or ("line " in message and str(path) in message)
    assert "no rows" not in message


def read_or_refuse(path: Path) -> tuple[list[tuple[str, object]], str]:
    """(rows, "") or ([], the reason)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TwoStageWarning)
        try:
            return pairs(read_table(path)), ""
        except DataError as error:
            return [], str(error)


ORDINARY = st.text(st.sampled_from("abcde \"',.\n"), min_size=1, max_size=30)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(ORDINARY, min_size=1, max_size=20), suffix=st.sampled_from([".csv", ".tsv"]))
def test_tables_of_pandas_are_read(tmp_path: Path, texts: list[str], suffix: str) -> None:
    frame = pd.DataFrame({"text": ["it's fine", *texts], "label": [0, *[1] * len(texts)]})
    path = tmp_path / f"a{suffix}"
    frame.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    found, message = read_or_refuse(path)
    if any("\n" in text for text in texts) and "two ways of reading" in message:
        return  # the lines of a text may be rows
    assert found == list(zip(frame["text"], frame["label"].astype(str), strict=True))


def test_quotes_of_a_plain_file_join_no_rows(write: Write) -> None:
    content = 'sentence\tlabel\n"great fun\t1\na dull film\t0\n"very good\t1\n'
    path = write(content, "a.tsv")
    assert list(read_table(path).texts) == ['"great fun', "a dull film", '"very good']
    assert list(read_table(path).lines) == [2, 3, 4]
    oracle = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)
    assert list(read_table(path).texts) == list(oracle["sentence"])
    with pytest.warns(TwoStageWarning, match=r"a\.tsv is read so that quotes belong to the text"):
        table = read_table(write(content.replace("sentence", "text"), "a.tsv"))
    assert list(table.texts) == list(oracle["sentence"])


@pytest.mark.parametrize("quoted", ['"good fun"', '"so" they say', 'say "hi"', '""', '"', '"a, b"'])
def test_in_glues_shape_quotes_are_text(write: Write, quoted: str) -> None:
    path = write(f"sentence\tlabel\n{quoted}\t1\ndull\t0\nso it goes\t1\n", "a.tsv")
    oracle = pd.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False)
    assert list(read_table(path).texts) == list(oracle["sentence"])


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt"])
@pytest.mark.parametrize(("delimiter", "word"), [(";", "semicolons"), ("\t", "tabs"), (",", "com")])
def test_the_header_shows_the_delimiter_and_the_unusual_is_said(
    write: Write, name: str, delimiter: str, word: str
) -> None:
    path = write(f"label{delimiter}text\n1{delimiter}good\n0{delimiter}bad\n", name)
    usual = "\t" if name == "a.tsv" else ","
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = read_table(path)
    assert list(table.texts) == list(pd.read_csv(path, sep=delimiter)["text"])
    assert [word in str(warning.message) for warning in caught] == [True] * (delimiter != usual)


def test_semicolons_leave_commas_in_texts(write: Write) -> None:
    path = write('text;label\n"a; b";1\nc, d;0\n')
    with pytest.warns(TwoStageWarning, match="semicolons"):
        assert list(read_table(path).texts) == list(pd.read_csv(path, sep=";")["text"])


def test_white_space_before_a_quote_is_dropped_where_the_header_has_it(write: Write) -> None:
    path = write('label, text\n1, "good fun"\n0, "dull, long"\n0, bad\n')
    with pytest.warns(TwoStageWarning, match="white space behind a delimiter does not count"):
        table = read_table(path)
    oracle = pd.read_csv(path, skipinitialspace=True)
    assert list(table.texts) == list(oracle["text"]) == ["good fun", "dull, long", "bad"]
    with pytest.raises(DataError, match=r"line 2: white space stands before a quote; .*spaced"):
        read_table(write('label,text\n1, "good fun"\n0,bad\n'))
    # nothing of it where a program has enclosed such a text
    assert read_table(write('label, text\n1," ""so"""\n0, b\n')).texts == [' "so"', " b"]


def test_a_sign_behind_a_closing_quote_shows_that_it_closes_nothing(write: Write) -> None:
    path = write('text,label\n"great" fun,1\ndull,0\n')
    with pytest.warns(TwoStageWarning, match="quotes belong to the text"):
        table = read_table(path)
    assert list(table.texts) == ['"great" fun', "dull"]
    with pytest.raises(DataError, match=r"line 2: a closing quote is followed by neither .*none"):
        read_table(write('text,label\n"great" fun,1\n"dull",0\n'))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.tsv", 'text\tlabel\nfine\t0\n"great\t1\nfun"\t0\n', 3),
        ("a.tsv", 'sentence\tlabel\n"great\t1\nfun"\t0\n', 2),
        ("a.csv", 'text,label\nfine,0\nbad,1\n"great,1\nfun",0\n', 4),
        ("a.tsv", 'sentence\tlabel\nfine\t1\n"say ""hi"""\t0\n', 3),
        ("a.tsv", 'text\tlabel\n"good fun"\t1\ndull\t0\n', 2),
    ],
)
def test_what_cannot_be_known_is_refused_with_line_and_flag(
    write: Write, name: str, content: str, line: int
) -> None:
    path = write(content, name)
    with pytest.raises(DataError, match=rf"line {line}: two ways of reading .*--quoting standard"):
        read_table(path)
    delimiter = "\t" if name == "a.tsv" else ","
    for quoting, number in (("standard", csv.QUOTE_MINIMAL), ("none", csv.QUOTE_NONE)):
        oracle = pd.read_csv(path, sep=delimiter, quoting=number)
        table = read_table(path, quoting=quoting)
        assert list(table.texts) == list(oracle.drop(columns="label").iloc[:, 0])


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", 'text,label\nfine,1\n"a, b",0\n"great fun,1\ndull,0\nvery good",1\n', 4),
        ("a.csv", 'text;label\n"a; b";0\n"great fun;1.0\nvery good";1\n', 3),
        ("a.csv", 'label,text\n1,"great, fun\n0,dull\n1,very good"\n0,so\n', 3),
        ("a.csv", 'text,label\n"a, b",0\n"great, fun,1\nx,y,0\nvery good, so",1\nfine,0\n', 3),
        ("a.csv", 'text,label\nfine,no\n"great fun,yes\nvery good",no\nz,no\n"b, c",no\n', 3),
        ("a.csv", 'title,text,label\n"a,b",c,ham\n"it,is,Ham\nso",it,ham\nx,y,spam\n', 3),
        ("a.tsv", 'sentence\tlabel\n"a\nb"\t0\n"great fun\t1\nso it is"\t0\nx\t1\n', 4),
        ("a.csv", 'text,label\n"a, b",0\nfine,"1\ndull,0\nx,1"\nso,1\n', 3),
    ],
)
def test_quotes_that_join_rows_are_found_beside_others_that_do_not(
    write: Write, name: str, content: str, line: int
) -> None:
    path = write(content, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TwoStageWarning)
        with pytest.raises(DataError, match=rf"line {line}: quotes join this line with another"):
            read_table(path)
        assert read_table(path, quoting="standard").texts, "unless it is told to"


@pytest.mark.parametrize("columns", [["text", "label"], ["label", "text"], ["label", "i", "text"]])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_lines_of_a_text_are_no_rows(tmp_path: Path, suffix: str, columns: list[str]) -> None:
    reviews = ["Well, hello\nthere", "a\n\nb, c\nd", "Dear Sir, 1\nso", "x, y, 1\nz", "Hi\nyou"]
    frame = pd.DataFrame({"text": reviews, "label": [0, 1, 0, 1, 0], "i": range(5)})
    path = tmp_path / f"a{suffix}"
    frame.to_csv(path, columns=columns, index=False, sep="," if suffix == ".csv" else "\t")
    assert list(read_table(path).texts) == reviews


def test_one_faulty_row_does_not_change_how_the_others_are_read(write: Write) -> None:
    rows = '"line, ""0"""\t1\n' * 50
    for header in ("text\tlabel\n", "sentence\tlabel\n"):
        with pytest.raises(DataError, match="line 52: a closing quote is followed by neither"):
            read_table(write(header + rows + '"bad" one\t0\n', "a.tsv"))
    with pytest.raises(DataError, match="line 3: a closing quote is followed by neither"):
        read_table(write('text,label\nfine,"1"\n"great" fun,"0"\n'))
    table = read_table(write('sentence\tlabel\nfine\t1\nso\t"0"\nit\t0\n', "a.tsv"))
    assert list(table.labels) == ["1", "0", "0"]


@pytest.mark.parametrize(
    "content",
    [
        'text,label\n"{""a"": ""say \\""hi\\""""}",1\nb,0\n',
        'text,label\n"D:\\",0\n"/\\",1\n',
        "text,label\na \\| b,1\nb,0\n",
        "text,label\n$\\alpha$ \\\\ so,1\nb,0\n",
        'text,label\n"\\\\server\\dir, it is",1\nb,0\n',
        "text,label\nit's,1\n'so',0\n",
    ],
    ids=ascii,
)
def test_ordinary_backslashes_and_apostrophes_are_themselves(write: Write, content: str) -> None:
    path = write(content)
    assert list(read_table(path).texts) == list(pd.read_csv(path)["text"])


@pytest.mark.parametrize("enclosed", [r'"a, \"b\""', r'"\\, \"c"'])
def test_backslashes_that_escape_are_found_where_nothing_else_works(
    write: Write, enclosed: str
) -> None:
    path = write(f"text,label\n{enclosed},1\n")
    with pytest.warns(TwoStageWarning, match="a backslash escapes"):
        table = read_table(path)
    oracle = pd.read_csv(path, escapechar="\\", doublequote=False)
    assert list(table.texts) == list(oracle["text"])


def test_backslashes_that_could_be_either_are_refused(write: Write) -> None:
    path = write("text,label\nfine,0\na\\\\b,1\n")
    with pytest.raises(DataError, match=r"line 3: .*--quoting standard .*--quoting escaped"):
        read_table(path)
    assert read_table(path, quoting="standard").texts[1] == r"a\\b"
    assert read_table(path, quoting="escaped").texts[1] == r"a\b"
    # one that can escape nothing shows that none of them does
    assert read_table(write("text,label\n¯\\_(ツ)_/¯,0\na\\\\b,1\n")).texts[1] == r"a\\b"


def test_apostrophes_around_fields(write: Write) -> None:
    path = write("'text','label'\n'it''s, well','1'\n'so','0'\n")
    with pytest.warns(TwoStageWarning, match="apostrophes enclose fields"):
        table = read_table(path)
    assert list(table.texts) == list(pd.read_csv(path, quotechar="'")["text"])
    with pytest.raises(DataError, match=r"line 2: .*--quoting single"):
        read_table(write("text,label\n'it''s',1\nso,0\n"))
    assert read_table(write("text,label\n'tis it,1\n'so',0\n")).texts == ["'tis it", "'so'"]


def test_what_is_given_is_not_guessed(write: Write) -> None:
    path = write('Review|Stars\na, b|5\n"c|1\n', "a.dat")
    options: dict[str, Any] = {"text_column": "review", "label_column": "Stars"}
    table = read_table(path, delimiter="|", quoting="none", **options)
    assert pairs(table) == [("a, b", "5"), ('"c', "1")]
    for bad in ({"delimiter": "ab"}, {"delimiter": "\n"}, {"quoting": "loud"}):
        with pytest.raises(UsageError, match="expected"):
            read_table(path, **bad)
    with pytest.raises(DataError, match="expected columns 'x' and 'label'; the header is: Review"):
        read_table(path, delimiter="|", text_column="x")


def test_a_file_may_end_its_lines_in_one_way_only(write: Write) -> None:
    with pytest.raises(DataError, match=r"line 3: some lines end in \\r and some in \\n; save"):
        read_table(write("text,label\nfine,1\n\rbad,0\n"))
    with pytest.raises(DataError, match=r"line 3: some lines end in \\n and some in \\r\\n; save"):
        read_table(write("label,text\n1,fine\r\n0,bad\n"))
    assert read_table(write("text,label\nfine,1\r\nbad,0\n")).labels == ["1", "0"]
    assert read_table(write("label,text\n1,fine\r\n0,bad\r\n")).texts == ["fine", "bad"]
    # Python's csv module on Windows, without newline=""
    assert read_table(write("text,label\r\r\nfine,1\r\r\nbad,0\r\r\n")).labels == ["1", "0"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04\x14\0", "is an Excel workbook or another zip archive, not a table; save"),
        (b"\x1f\x8b\x08\0", r"is packed by gzip, not a table; unpack it"),
        (b"<!DOCTYPE html><html>", "is a web page, not a table"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"sep=,\ntext,label\na,1\n", r"line 1: 'sep=' is meant for Excel alone; remove"),
        (b'"sep=;"\ntext;label\na;1\n', r"line 1: 'sep=' is meant for Excel alone; remove"),
        (b"text,label\na,1\n,\nb,0\n", "line 3: the row is empty but for its delimiters; remove"),
        (b"text,label\na,1\n,,,,\nb,0\n", "line 3: the row is empty but for its delimiters"),
        (b"text,label\na,1\ntext,label\nb,0\n", "line 3: the header stands here again"),
        (b"text,label\na,1\nSentence, Label\nb,0\n", "line 3: the header stands here again"),
        (b"text,label\na,1\nlabel,text\nb,0\n", "line 3: the header stands here again"),
        ("text,label\na,1\n\ufefftext,label\nb,0\n".encode(), "line 3: the header stands here"),
        ("text,label\na,1\n\ufefflabel,text\nb,0\n".encode(), "line 3: the header stands here"),
        ("text,label\na,1\ntext\u200b,label\u200b\nb,0\n".encode(), "line 3: the header stands"),
        ("text,label\na,1\nb,\u200b\n".encode(), "line 3: the label is empty"),
        (b'""\n', "line 1: nothing splits the header .* into columns; give --delimiter"),
        (b"text|label\n---|---\na|1\n", "line 2: a line of dashes is no row"),
        ("\u200btext,label\na,1\n".encode(), r"line 1: column '\\u200btext' holds the invisible"),
        ("text,la\u00adbel\na,1\n".encode(), r"line 1: column .* U\+00AD \(SOFT HYPHEN\); remove"),
        ("\ufeff\ufefftext,label\na,1\n".encode(), r"U\+FEFF"),
        (b"text,label\na\0b,1\n", "line 2: holds a NUL byte; remove it"),
        ("text,label\na,1\n".encode("utf-16"), "it looks like UTF-16: give --encoding utf-16"),
        (b"text,sentence,label\na,b,1\n", "'text' and 'sentence' could both be the text"),
        (b"great fun,1\ndull,0\n", "is: great fun, 1; other names .* without a header needs one"),
        (b"text:label\na:1\n", "nothing splits the header 'text:label' into .*give --delimiter"),
        (b'"text" "label"\n"a" "1"\n', "nothing splits the header .* give --delimiter"),
        (
            "text,label\na,1\n".encode("utf-16-le"),
            "line 1: holds a NUL byte; .*--encoding utf-16-le",
        ),
        (
            "text,label\na,1\n".encode("utf-16-be"),
            "line 1: holds a NUL byte; .*--encoding utf-16-be",
        ),
        ("text,label\na,1\n".encode("utf-32"), "it looks like UTF-32: give --encoding utf-32"),
    ],
)
def test_junk_is_told_for_what_it_is(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TwoStageWarning)
        with pytest.raises(DataError, match=message) as caught:
            read_table(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("encoding", "content", "message"),
    [
        ("utf-16", "text,label\na,1\n".encode("utf-16-le"), "BOM.*give --encoding utf-16-le"),
        ("utf-16", b"text,label\na,1\n", "line 1: not valid UTF-16 .*save the file as UTF-8"),
        ("utf-16", "text,label\na,1\n".encode("utf-16")[:-1], "not valid UTF-16 .*truncated"),
        ("cp1252", "\ufefftext,label\na,1\n".encode(), "begins as UTF-8 does; leave out --enc"),
    ],
)
def test_a_wrong_encoding_is_one_sentence(
    tmp_path: Path, encoding: str, content: bytes, message: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_table(path, encoding)
    assert str(path) in str(caught.value)


def test_one_column_is_not_both(write: Write) -> None:
    for options in ({"text_column": "label"}, {"label_column": "Text"}):
        with pytest.raises(UsageError, match="expected two columns"):
            read_table(write("text,label\na,1\n"), **options)


def test_jsonl_is_read_wherever_csv_is(write: Write) -> None:
    lines = '{"text": "a\\tfine\\nfilm", "label": 1}\n\n{"label": " bad ", "x": [], "Text": "é"}'
    for name in ("a.jsonl", "a.JSON"):
        table = read_table(write(lines, name))
        assert pairs(table) == [("a\tfine\nfilm", 1), ("é", "bad")]
        assert list(table.lines) == [1, 3]
    with pytest.warns(TwoStageWarning, match="is read as JSONL"):
        assert len(read_table(write(lines, "a.txt"))) == 2
    path = write('{"text": "a", "label": "x"}\n{"label": "y", "text": "b"}\n', "a.jsonl")
    oracle = pd.read_json(path, lines=True)
    assert pairs(read_table(path)) == list(zip(oracle["text"], oracle["label"], strict=True))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}', "line 2: expected columns 'text' and 'label'; the header is: text"),
        ('{"text": "a", "label": null}', "line 2: the label is None; expected"),
        ('{"text": "a", "label": NaN}', "line 2: the label is nan; expected"),
        ('{"text": "a", "label": [1]}', r"line 2: the label is \[1\]; expected"),
        ('{"text": 5, "label": 1}', "line 2: the text is 5; expected a string"),
        ('{"text": "a", "text": "b", "label": 1}', "line 2: column 'text' occurs twice"),
        ('{"text": "a", "label": 1', "line 2: .* is not JSON"),
        ('{"text": "text", "label": "label"}', "line 2: the names of the columns stand here"),
        ('["a", 1]', r"line 2: .* is not an object like {\"text\": \"fine\", \"label\": 1}"),
        ('{"text": "\\ud800", "label": 1}', "line 2: .* half of a character"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(write: Write, line: str, message: str) -> None:
    path = write('{"text": "fine", "label": 0}\n' + line + "\n", "a.jsonl")
    with pytest.raises(DataError, match=message):
        read_table(path)
