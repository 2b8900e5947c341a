"""Labelled texts in CSV and TSV files.

A table has a header, with a text column (`text`, or `sentence` as in GLUE) and a `label` column in
any order; other columns are ignored. `.tsv` files are split at tabs, all others at commas. Quotes
follow the rules that spreadsheets, pandas and Python's csv module share. Every bad row is reported
with its file and line, up to a limit. Texts are kept as they are: `null`, `NA` or `None` is text,
and so is an empty field.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

import numpy as np

from ..errors import DataError, UsageError
from ..files import replacing

TEXT_COLUMNS = ("text", "sentence")
LABEL_COLUMN = "label"
MAX_REPORTED = 10
"""Bad rows that one error message names."""

_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
# A text that stands in its own row after the last line, unless a quote is still open there.
_END = "\0end of file"


@dataclass(frozen=True)
class Table:
    """Labelled texts, one label a text."""

    texts: Sequence[str]
    labels: Sequence[str | int]
    """As given: integers, or their text, or names."""
    source: str = "the data"
    """The file's path, for messages."""
    lines: Sequence[int] = field(default=(), repr=False)
    """The file's line on which each row begins; empty for data in memory."""

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.labels):
            raise DataError(
                f"{self.source} has {len(self.texts)} texts but {len(self.labels)} labels"
            )
        bad = [
            f"{self.where(row)}: the text is {text!r}; expected a string"
            for row, text in enumerate(self.texts)
            if not isinstance(text, str)
        ]
        bad += [
            f"{self.where(row)}: the label is {label!r}; expected a string or an integer"
            for row, label in enumerate(self.labels)
            if not isinstance(label, (str, Integral))
        ]
        if bad:
            raise DataError(_list_bad_rows(self.source, bad))

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        """`file, line 7`, or `the data, row 5` counted from 0."""
        if self.lines:
            return f"{self.source}, line {self.lines[row]}"
        return f"{self.source}, row {row}"


def read_table(path: str | Path, encoding: str = "utf-8") -> Table:
    """Read a CSV or TSV file. Raises DataError for what cannot be used, all bad rows at once.

    encoding: of the file, as Python names it; a byte order mark is dropped.
    """
    path = Path(path)
    try:
        content = _decode(path.read_bytes(), encoding, path).removeprefix("\ufeff")
    except FileNotFoundError:
        raise DataError(f"there is no file '{path}'") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not content.strip():
        raise DataError(f"{path} is empty; expected a header with 'text' and 'label', then rows")

    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = _read_rows(content, delimiter)
    header_line, header = next(rows)
    text_column, label_column = _find_columns(header, delimiter, f"{path}, line {header_line}")

    texts: list[str] = []
    labels: list[str | int] = []
    lines: list[int] = []
    bad: list[str] = []
    for line, row in rows:
        if row[-1].endswith(_END):
            bad.append(f"line {line}: a quote opens here and is never closed")
        elif len(row) != len(header):
            bad.append(f"line {line}: {len(row)} fields, but the header has {len(header)}")
        elif not row[label_column].strip():
            bad.append(f"line {line}: the label is empty")
        else:
            texts.append(row[text_column])
            labels.append(row[label_column].strip())
            lines.append(line)
    if bad:
        raise DataError(_list_bad_rows(str(path), bad))
    if not texts:
        raise DataError(f"{path} has a header but no rows")
    return Table(texts, labels, str(path), lines)


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


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their index 0 … C-1."""

    names: tuple[str, ...]
    source: str
    """What they are the classes of, for messages."""

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, table: Table) -> np.ndarray:
        """[N] int64 class indices. Raises DataError naming the rows with an unknown label."""
        index = {name: i for i, name in enumerate(self.names)}
        keys = [_class_name(label) for label in table.labels]
        unknown = [row for row, key in enumerate(keys) if key not in index]
        if unknown:
            bad = [f"{table.where(row)}: class '{table.labels[row]}'" for row in unknown]
            raise DataError(
                _list_bad_rows(table.source, bad)
                + f" (no such row in {self.source}, whose classes are {', '.join(self.names)})"
            )
        return np.array([index[key] for key in keys], dtype=np.int64)


def find_classes(train: Table) -> Classes:
    """The classes of the training data: sorted as numbers if all are integers, else as text."""
    if not len(train):
        raise DataError(f"{train.source} has no rows")
    names = {_class_name(label) for label in train.labels}
    if all(_INTEGER.fullmatch(name) for name in names):
        ordered = sorted(names, key=int)
    else:
        ordered = sorted(names)
    if len(ordered) < 2:
        raise DataError(
            f"{train.source}: all {len(train)} rows have class '{ordered[0]}'; "
            "at least two classes are needed"
        )
    return Classes(tuple(ordered), train.source)


def _class_name(label: object) -> str:
    """`1`, `"1"`, `"+1"` and `"01"` are the same class."""
    text = str(int(label) if isinstance(label, Integral) else label).strip()
    return str(int(text)) if _INTEGER.fullmatch(text) else text


def _decode(raw: bytes, encoding: str, path: Path) -> str:
    """The text of a file. Raises DataError naming the line that is not text in this encoding."""
    problem = ""
    try:
        content = raw.decode(encoding)
        before = content.partition("\0")[0]
        if len(before) < len(content):
            problem = "holds a NUL byte"
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode(encoding, errors="replace")
        problem = f"not valid {encoding.upper()} ({error.reason})"
    except (LookupError, ValueError):
        raise UsageError(
            f"encoding is {encoding!r}; expected a name that Python knows, such as utf-8, "
            "utf-16 or cp1252"
        ) from None
    if problem:
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        raise DataError(
            f"{path}, line {line}: {problem}; save the file as UTF-8, or name its encoding with "
            "--encoding (often utf-16 or cp1252)"
        )
    return content


def _read_rows(content: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line on which the row begins, fields); blank lines are skipped, as pandas skips them."""

    def lines() -> Iterator[str]:
        yield from io.StringIO(content, newline="")
        if not content.endswith(("\n", "\r")):
            yield "\n"
        yield _END

    # Texts may be long, and the csv module's limit on a field is one for the whole process.
    previous_limit = csv.field_size_limit(max(len(content) + len(_END), csv.field_size_limit()))
    try:
        reader = csv.reader(lines(), delimiter=delimiter)
        while True:
            line = reader.line_num + 1
            row = next(reader)
            if row == [_END]:
                return
            if len(row) > 1 or (row and row[0].strip()):
                yield line, row
            if row and row[-1].endswith(_END):
                return
    finally:
        csv.field_size_limit(previous_limit)


def _find_columns(header: list[str], delimiter: str, where: str) -> tuple[int, int]:
    if header[-1].endswith(_END):
        raise DataError(f"{where}: a quote opens in the header and is never closed")
    names = [name.strip().lower() for name in header]
    found = f"the header is: {', '.join(header)[:200]}"
    for column in (*TEXT_COLUMNS, LABEL_COLUMN):
        if names.count(column) > 1:
            raise DataError(f"{where}: column '{column}' occurs twice; {found}")
    text = [names.index(column) for column in TEXT_COLUMNS if column in names]
    if not text or LABEL_COLUMN not in names:
        hint = ""
        other = {",": ("\t", "tabs: name the file .tsv"), "\t": (",", "commas: name the file .csv")}
        if other[delimiter][0] in header[0]:
            hint = f" (it seems to be separated by {other[delimiter][1]})"
        elif ";" in header[0]:
            hint = " (it seems to be separated by semicolons; use commas)"
        raise DataError(f"{where}: expected columns 'text' and 'label'; {found}{hint}")
    return text[0], names.index(LABEL_COLUMN)


def _list_bad_rows(source: str, bad: list[str]) -> str:
    """One sentence that names up to MAX_REPORTED bad rows."""
    shown = "; ".join(bad[:MAX_REPORTED])
    more = f"; and {len(bad) - MAX_REPORTED} more" if len(bad) > MAX_REPORTED else ""
    plural = "1 bad row" if len(bad) == 1 else f"{len(bad)} bad rows"
    return f"{source} has {plural}: {shown}{more}"
