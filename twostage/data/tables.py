"""Labelled texts in CSV, TSV and JSONL files: the one place where a table is read.

A delimited table has a header, with a text column (`text`, or `sentence` as in GLUE) and a `label`
column in any order; other columns are ignored. A line of JSONL is an object with the same keys.
Texts are kept as they are: `null`, `NA` or `None` is text, and so is an empty field.

What a file does not say is found out: the delimiter is the one that splits the header into names
with a text and a label column; for the quoting see dialects.py. What is unusual is said
(TwoStageWarning). What cannot be known is refused with its line and the option that settles it, and
so is the junk that spreadsheets and joined files leave. Every bad row is reported with its line, up
to a limit.
"""

import csv
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypedDict, Unpack

from ..errors import DataError, TwoStageWarning, UsageError
from ..files import replacing
from ..printing import list_bad_rows, quoted, shorten, without_invisible
from .classes import Classes as Classes
from .classes import find_classes as find_classes
from .classes import is_label
from .columns import LABEL_COLUMN, Columns, normalize
from .containers import Table as Table
from .containers import explain_label, explain_text
from .dialects import (
    BEHIND_QUOTE,
    DELIMITERS,
    MEANING,
    NEVER_CLOSED,
    QUOTINGS,
    Rows,
    choose_quoting,
    find_signs,
    is_glue,
)
from .text_files import TextFile, open_text

AUGMENTED_COLUMNS = ("org_ind", "text", "label")
"""Header of `aug.csv`; `org_ind` is the training row that the text paraphrases."""
SUFFIXES = (".csv", ".tsv", ".jsonl")
"""File name endings of a data folder's tables."""

_RULE = re.compile(r":?-{2,}:?").fullmatch  # of a table in Markdown
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_SYNONYMS = {"minimal": "standard", "all": "standard", "nonnumeric": "standard"}  # csv's own names


class TableOptions(TypedDict, total=False):
    """Settings that a file does not state; those left out are found out."""

    encoding: str
    """As Python names it; utf-8 if not given. A byte order mark is dropped."""
    delimiter: str | None
    """One character, or `tab`, `comma`, `semicolon`."""
    quoting: str | None
    """A name in QUOTINGS; the csv module's `minimal`, `all` and `nonnumeric` mean `standard`."""
    text_column: str | None
    label_column: str | None


def read_table(
    path: str | Path,
    encoding: str = "utf-8",
    *,
    delimiter: str | None = None,
    quoting: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
) -> Table:
    """Read a CSV, TSV or JSONL file; for the arguments see TableOptions.

    Raises DataError for what cannot be used or known, all bad rows at once, and UsageError for an
    argument that cannot be. Warns (TwoStageWarning) where a file is written in an unusual way.
    Messages name the command line's flags; the arguments of the same names do the same.
    """
    columns = Columns(text_column, label_column)
    delimiter, quoting = _check_delimiter(delimiter), _check_quoting(quoting)
    return _read_file(open_text(Path(path), encoding), columns, delimiter, quoting)


def read_augmented(path: Path, **options: Unpack[TableOptions]) -> Table:
    """Read `aug.csv`, whatever way the other tables are written in.

    The one that `augment` writes, or the published code, is known by its header: commas, standard
    quoting, and UTF-8 unless it is none. `options` hold for another one.
    """
    file = open_text(path, "utf-8")
    if file.raw.partition(b"\n")[0].rstrip() != ",".join(AUGMENTED_COLUMNS).encode():
        return read_table(path, **options)
    try:
        file.raw.decode()
    except UnicodeDecodeError:
        file = replace(file, encoding=options.get("encoding", "utf-8"))
    return _read_file(file, Columns(), None, "standard")


def find_table(folder: Path, *stems: str, who: str = "") -> Path:
    """The one table of a data folder with one of these names: `train.csv`, `train.tsv` …

    who: what needs the table, for the message
    Raises DataError when there is none, or more than one.
    """
    names = [stem + suffix for stem in stems for suffix in SUFFIXES]
    paths = folder.iterdir() if folder.is_dir() else ()
    found = sorted(path for path in paths if path.name.lower() in names)
    if len(found) > 1:
        shown = " and ".join(quoted(path.name) for path in found)
        raise DataError(f"'{folder}' holds {shown}, and each could be meant; leave one of them")
    if not found:
        first, others = folder / names[0], ", ".join(names[1:])
        if who:
            raise DataError(f"{who} reads '{first}', which does not exist, nor does {others}")
        raise DataError(f"there is no file '{first}', nor any of {others}")
    return found[0]


def read_records(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a comma-separated file that is known, by the names in its header."""
    yield from csv.DictReader(lines)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table: quotes only where needed, `\\n` line ends; tabs between fields for `.tsv`.

    Raises UsageError when the file cannot be written.
    """
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with replacing(path) as file:
        writer = csv.writer(file, delimiter=delimiter, lineterminator="\n")
        # Python below 3.13 leaves a bare carriage return unquoted, though readers end a row at it.
        quoting_writer = csv.writer(
            file, delimiter=delimiter, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
        )
        writer.writerow(header)
        for row in rows:
            has_return = any("\r" in value for value in row if isinstance(value, str))
            (quoting_writer if has_return else writer).writerow(row)


def _read_file(
    file: TextFile, columns: Columns, delimiter: str | None, quoting: str | None
) -> Table:
    """The table in a file. Raises DataError; warns in the name of its caller's caller."""
    first_line = next((line.strip() for line in file.lines() if line.strip()), "")
    if not first_line:
        raise DataError(
            f"{file.path} is empty; expected a header with 'text' and 'label', then rows"
        )
    is_json = file.path.suffix.lower() in _JSON_SUFFIXES
    if is_json or (first_line.startswith("{") and not delimiter and not quoting):
        rows = _read_json(file, columns)
        if not is_json:
            rows.notes.append("is read as JSONL, one object a line")
    elif re.fullmatch(r'"?sep=.?"?', first_line, re.IGNORECASE):
        raise DataError(f"{file.path}, line 1: 'sep=' is meant for Excel alone; remove the line")
    else:
        with _long_fields(len(file.raw)):
            rows = _read_delimited(file, columns, delimiter, quoting)
    if rows.bad:
        raise DataError(list_bad_rows(str(file.path), rows.bad))
    if not rows.texts:
        raise DataError(f"{file.path} has a header but no rows")
    for note in rows.notes:
        warnings.warn(f"{file.path} {note}", TwoStageWarning, stacklevel=3)
    return Table(rows.texts, rows.labels, str(file.path), rows.lines)


def _read_delimited(
    file: TextFile, columns: Columns, delimiter: str | None, quoting: str | None
) -> Rows:
    """The rows of a CSV or TSV file. Raises DataError where it is in doubt how it is written."""
    usual = "\t" if file.path.suffix.lower() in (".tsv", ".tab") else ","
    found, header, header_quoting = _choose_delimiter(file, columns, usual, delimiter, quoting)
    notes = []
    if found != usual and delimiter is None:
        notes.append(f"is read with {DELIMITERS[found]} between its fields")

    @cache
    def attempt(quoting: str) -> Rows:
        return _read_rows(file, columns, found, quoting, only_try=True)

    if quoting is None:
        signs = find_signs(file.lines(), found)
        try:
            rows = choose_quoting(attempt, signs, found, header, header_quoting)
        except DataError as error:
            raise DataError(f"{file.path}, {error}") from None
        quoting = rows.quoting
        is_usual = quoting == "standard" or (quoting == "none" and is_glue(found, header))
        if not is_usual and not rows.equal(attempt("standard")):
            notes.append(f"is read so that {MEANING[quoting]} (--quoting {quoting})")
    rows = attempt(quoting)
    if not rows.works:
        rows = _read_rows(file, columns, found, quoting)
    rows.notes += notes
    return rows


def _choose_delimiter(
    file: TextFile, columns: Columns, usual: str, delimiter: str | None, quoting: str | None
) -> tuple[str, list[str], str]:
    """(delimiter, header, quoting in which it reads well). Raises DataError."""
    headers, problem = [], ""
    for some_quoting in (quoting,) if quoting else ("standard", "single"):
        for candidate in (delimiter,) if delimiter else dict.fromkeys((usual, *DELIMITERS)):
            try:
                line, _, header = next(_iterate_records(file, candidate, some_quoting), (1, [], []))
            except _Breakdown as breakdown:
                problem = problem or breakdown.what
                continue
            if columns.find(header) is not None:
                return candidate, header, some_quoting
            headers.append((line, header))
    if problem == NEVER_CLOSED:
        raise DataError(f"{file.path}, line 1: {problem.replace('here', 'in the header')}")
    line, header = max(headers, key=lambda found: len(found[1]), default=(1, []))
    if len(header) < 2:
        raise DataError(
            f"{file.path}, line {line}: nothing splits the header {shorten(''.join(header))} into "
            "columns; give --delimiter"
        )
    raise DataError(f"{file.path}, line {line}: {columns.explain(header)}")


def _read_rows(
    file: TextFile, columns: Columns, delimiter: str, quoting: str, *, only_try: bool = False
) -> Rows:
    """The rows of a delimited file in one way. only_try: up to the first that is bad."""
    rows = Rows(quoting)
    records = _iterate_records(file, delimiter, quoting)
    try:
        line, _, header = next(records)
        places = columns.find(header)
        if places is None:
            rows.bad.append(f"line {line}: {columns.explain(header)}")
            return rows
        text_place, label_place = places
        words = {*map(normalize, header), LABEL_COLUMN}
        may_be_spaced = quoting == "standard" and delimiter != "\t"
        is_text_last, end = text_place == len(header) - 1, ""
        for line, of_record, record in records:
            last_line, problem = of_record[-1], ""
            end = end or last_line[-2:]
            if len(record) != len(header) or not is_label(label := record[label_place].strip()):
                problem = _explain_record(record, len(header))
            elif _bare(label) in words and columns.is_header(record, header):
                problem = "the header stands here again; remove the line"
            elif _RULE(label) and _RULE(record[text_place].strip()):
                problem = "a line of dashes is no row; remove it"
            elif is_text_last and (last_line[-2:] == "\r\n") != (end == "\r\n"):
                # A writer that ends lines in `\n` may have left a `\r` that belongs to the text.
                problem = r"some lines end in \n and some in \r\n; save with one kind"
            elif may_be_spaced and _has_space_before_quote(record, last_line, delimiter):
                problem = (
                    f"white space stands before a quote; give --quoting spaced if "
                    f"{MEANING['spaced']}, or --quoting none if {MEANING['none']}"
                )
            if len(of_record) > 1:
                rows.inner_labels += _find_inner_labels(
                    line, of_record, delimiter, len(header), label_place, text_place
                )
            if not problem:
                rows.add(line, record[text_place], label)
                continue
            rows.bad.append(f"line {line}: {problem}")
            if only_try:
                return rows
    except _Breakdown as breakdown:
        rows.bad.append(str(breakdown))
    return rows


def _find_inner_labels(
    first: int,
    of_record: list[str],
    delimiter: str,
    num_columns: int,
    label_place: int,
    text_place: int,
) -> Iterator[tuple[int, str]]:
    """(line, what stands where its label would) for the lines of a record that may be rows.

    One of them has the record's own label: its first line, or its last.
    """
    lines = list(enumerate(of_record, first))
    for number, line in lines[1:] if label_place < text_place else lines[:-1]:
        fields = line.rstrip("\r\n").split(delimiter)
        if label_place in (0, num_columns - 1) and len(fields) > 1:
            yield number, fields[0 if label_place == 0 else -1]
        elif len(fields) == num_columns:
            yield number, fields[label_place]


def _explain_record(record: list[str], num_columns: int) -> str:
    """Why a record with another number of fields, or without a label, is no row."""
    if not any(value.strip() for value in record):
        return "the row is empty but for its delimiters; remove it"
    if len(record) == num_columns:
        return "the label is empty"
    return f"{len(record)} fields, but the header has {num_columns}"


def _bare(label: str) -> str:
    """A label as a header would have it."""
    return label.lower() if label.isascii() else normalize(without_invisible(label))


def _has_space_before_quote(record: list[str], last_line: str, delimiter: str) -> bool:
    """` "so"`, as it stands in the line; a writer of tables would have enclosed it."""
    return ' "' in last_line and any(
        value[:1] == " "
        and value.strip()[:1] == value.strip()[-1:] == '"'
        and (delimiter + value in last_line or last_line.startswith(value))
        for value in record
    )


class _Breakdown(Exception):
    """A way of reading that cannot go on."""

    def __init__(self, line: int, what: str) -> None:
        super().__init__(f"line {line}: {what}")
        self.what = what


def _iterate_records(
    file: TextFile, delimiter: str, quoting: str
) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line on which a record begins, its lines as they stand, its fields); no blank lines.

    Raises _Breakdown. The csv module does it, strictly: else it would read `"a"b` as `ab`.
    """
    number = 0
    of_record: list[str] = []

    def count() -> Iterator[str]:
        nonlocal number
        for line in file.lines():
            number += 1
            of_record.append(line)
            yield line

    reader = csv.reader(count(), delimiter=delimiter, strict=True, **QUOTINGS[quoting])
    are_returns: bool | None = None
    while True:
        first = number + 1
        of_record.clear()
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            is_open = "unexpected end" in str(error)
            where, what = (first, NEVER_CLOSED) if is_open else (number, BEHIND_QUOTE)
            raise _Breakdown(where, what) from None
        is_blank = len(record) < 2 and not "".join(record).strip()
        is_return = of_record[-1].endswith("\r")
        if are_returns is None:
            are_returns = is_return
        elif is_return != are_returns and of_record != ["\r\n"]:  # left by `\r\r\n`
            raise _Breakdown(number, r"some lines end in \r and some in \n; save with one kind")
        if not is_blank:
            yield first, of_record, record


def _read_json(file: TextFile, columns: Columns) -> Rows:
    """The rows of a JSONL file."""
    rows = Rows("none")
    for number, line in enumerate(file.lines(), 1):
        if not (line := line.strip()):
            continue
        try:
            rows.add(number, *_read_object(line, columns))
        except DataError as error:
            rows.bad.append(f"line {number}: {error}")
            if line.startswith("["):
                rows.bad[-1] += ", one to a line and without brackets around them"
                break
    return rows


def _read_object(line: str, columns: Columns) -> tuple[str, Any]:
    """(text, label) of one line of JSONL. Raises DataError."""
    if not line.startswith("{"):
        raise DataError(f'{shorten(line)} is not an object like {{"text": "fine", "label": 1}}')
    try:
        pairs = json.loads(line, object_pairs_hook=list)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shorten(line)} is not JSON ({error})") from None
    names = [name for name, _ in pairs]
    places = columns.find(names)
    if places is None:
        raise DataError(columns.explain(names))
    text, label = (pairs[place][1] for place in places)
    if not isinstance(text, str):
        raise DataError(explain_text(text))
    if not is_label(label):
        raise DataError(explain_label(label))
    if columns.is_header([text, str(label)], [names[place] for place in places]):
        raise DataError("the names of the columns stand here as values; remove the line")
    for value in (text, str(label)):
        if not value.isascii() and re.search("[\ud800-\udfff]", value):
            raise DataError(f"{shorten(value)} holds half of a character (a surrogate)")
    return text, label.strip() if isinstance(label, str) else label


def _check_delimiter(delimiter: str | None) -> str | None:
    names = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";"}
    found = names.get(delimiter, delimiter) if delimiter is not None else None
    if found is not None and (len(found) != 1 or found in '"\r\n\\'):
        raise UsageError(f"delimiter is {delimiter!r}; expected one character, or tab")
    return found


def _check_quoting(quoting: str | None) -> str | None:
    found = _SYNONYMS.get(quoting, quoting) if quoting is not None else None
    if found is not None and found not in QUOTINGS:
        raise UsageError(f"quoting is {quoting!r}; expected one of {', '.join(QUOTINGS)}")
    return found


@contextmanager
def _long_fields(longest: int) -> Iterator[None]:
    """Let the csv module read fields of any length; its limit is one for the whole process."""
    previous = csv.field_size_limit(max(longest, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(previous)
