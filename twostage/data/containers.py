"""Labelled texts in memory: `Table`, and what else can be taken for one without guessing.

    Table(texts, labels)                      as `tables.read_table` gives it
    (texts, labels)                           two lists, arrays, columns or tensors of one length
    [(text, label), (text, label), …]         any iterable of pairs
    {"text": texts, "label": labels}          a mapping or data frame with these two columns

All else is refused with this list. (A string is no list of texts, though it is one of letters.)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, TypeGuard

import numpy as np

from ..errors import DataError
from ..printing import list_bad_rows, shorten, visible
from .classes import is_label
from .columns import LABEL_COLUMN, TEXT_COLUMNS, Columns, normalize

_NAMES = (*TEXT_COLUMNS, LABEL_COLUMN)

FORM = (
    "expected a Table, (texts, labels), a list of (text, label) pairs, or a mapping or data frame "
    "with the columns 'text' and 'label'"
)


@dataclass(frozen=True)
class Table:
    """Labelled texts, one label a text.

    >>> Table(["a fine film", "dull"], ["fresh", "rotten"]).where(1)
    'the data, row 1'
    """

    texts: Sequence[str]
    labels: Sequence[str | int | float]
    """As given; `classes.class_name` says which class each of them means."""
    source: str = "the data"
    """The file's path, for messages."""
    lines: Sequence[int] = field(default=(), repr=False)
    """The file's line on which each row begins; empty for data in memory."""

    def __post_init__(self) -> None:
        for name in ("texts", "labels"):
            object.__setattr__(self, name, _as_list(getattr(self, name), self.source))
        if len(self.texts) != len(self.labels):
            raise DataError(
                f"{self.source} has {len(self.texts)} texts but {len(self.labels)} labels"
            )
        bad = [
            f"{self.where(row)}: {explain_text(text)}"
            for row, text in enumerate(self.texts)
            if not isinstance(text, str)
        ]
        bad += [
            f"{self.where(row)}: {explain_label(label)}"
            for row, label in enumerate(self.labels)
            if not is_label(label)
        ]
        bad += [
            f"{self.where(row)}: the names of the columns stand among the rows; remove them"
            for row, label in enumerate(self.labels)
            if isinstance(label, str)
            and normalize(label) in _NAMES
            and Columns().is_header([self.texts[row], label], [])
        ]
        if bad:
            raise DataError(list_bad_rows(self.source, bad))

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, row: int) -> str:
        """`file, line 7`, or `the data, row 5` counted from 0."""
        return f"{visible(self.source)}, {self.place(row)}"

    def place(self, row: int) -> str:
        """`line 7`, or `row 5` counted from 0."""
        return f"line {self.lines[row]}" if self.lines else f"row {row}"


def explain_text(text: object) -> str:
    """Why this cannot be a text."""
    return f"the text is {shorten(text)}; expected a string"


def explain_label(label: object) -> str:
    """Why this names no class."""
    several = ""
    if _is_column(label) or isinstance(label, (set, Mapping)):
        several = ": a text has one class here, multi-label data are not supported"
    return f"the label is {shorten(label)}; expected a string or an integer{several}"


LabelledTexts = Table | Iterable[Any]
"""What `as_table` takes."""


def as_table(data: LabelledTexts, name: str) -> Table:
    """Labelled texts in any of the forms above, as a Table.

    name: of the data, for messages. Raises DataError for other forms, and for data without rows.
    """
    table = data if isinstance(data, Table) else Table(*_split_columns(data, name), name)
    if not len(table):
        raise DataError(f"{table.source} has no rows")
    return table


def _split_columns(data: object, name: str) -> tuple[Any, Any]:
    """(texts, labels). Raises DataError."""
    if isinstance(data, (str, bytes, PurePath)):
        raise DataError(f"{name} is {shorten(data)}; {FORM} (read_table reads a file)")
    if hasattr(data, "collect"):  # a frame of polars or Spark that is not there yet
        raise DataError(f"{name} is {_describe(data)}, which has to be collected first; {FORM}")
    if hasattr(data, "_asdict"):  # a named tuple
        data = data._asdict()
    columns = _column_names(data)
    if columns is not None:
        return _take_columns(data, columns, name)
    if not _is_column(data):
        raise DataError(f"{name} is {_describe(data)}; {FORM}")
    items = list(data)
    if not items:
        return [], []
    if not all(map(_is_column, items)):
        kinds = " and ".join(sorted({f"{_kind(item)}s" for item in items}))
        raise DataError(f"{name} is {_describe(data)} of {kinds}; {FORM}")
    if all(hasattr(item, "_fields") for item in items):  # named tuples, as of `itertuples`
        places = Columns().find(items[0]._fields)
        if places is None:
            shown = ", ".join(items[0]._fields)
            raise DataError(f"{name} has tuples with the fields {visible(shown)}; {FORM}")
        return [item[places[0]] for item in items], [item[places[1]] for item in items]
    if _are_pairs(data, items, name):
        return [item[0] for item in items], [item[1] for item in items]
    if len(items) == 2:
        return items[0], items[1]
    row = next((r for r, item in enumerate(items) if len(list(item)) != 2), 0)
    raise DataError(
        f"{name} is {_describe(data)} of {len(items)} items, of which number {row} has "
        f"{len(list(items[row]))} values; {FORM}"
    )


def _are_pairs(data: object, items: list[Any], name: str) -> bool:
    """Whether the items are (text, label) pairs, and not a column of texts and one of labels."""
    if not all(hasattr(item, "__len__") and len(item) == 2 for item in items):
        return False
    if len(items) != 2:
        return True
    # Two by two: (texts, labels) is a tuple of lists; else the strings tell, or a list of tuples.
    is_tuple, of_tuples = type(data) is tuple, {type(item) for item in items} == {tuple}
    if is_tuple and not any(isinstance(item, tuple) for item in items):
        return False
    (a, b), (c, _) = items
    may_be_pairs, may_be_columns = (isinstance(a, str) and isinstance(x, str) for x in (c, b))
    if may_be_pairs != may_be_columns:
        return may_be_pairs
    if of_tuples and not is_tuple:
        return True
    raise DataError(
        f"{name} could be two (text, label) pairs or two texts and two labels: "
        f"{shorten(data)}; give a Table"
    )


def _column_names(data: object) -> list[Any] | None:
    """The names of the columns of a mapping or a frame; None for what has none."""
    if isinstance(data, Mapping):
        return list(data)
    for attribute in ("column_names", "columns"):
        names = getattr(data, attribute, None)
        if names is not None and not callable(names):
            return list(names)
    return None


def _take_columns(data: Any, columns: list[Any], name: str) -> tuple[Any, Any]:
    places = Columns().find(list(map(str, columns)))
    if places is None:
        shown = visible(", ".join(map(str, columns))[:200])
        raise DataError(f"{name} is {_describe(data)} with the columns {shown}; {FORM}")
    return data[columns[places[0]]], data[columns[places[1]]]


def _as_list(column: Any, name: str) -> list[Any] | tuple[Any, ...]:
    """A column's values by position, whatever index it has."""
    if isinstance(column, (list, tuple)):
        if any(map(_is_scalar_tensor, column)):
            return [_to_python(value) if _is_scalar_tensor(value) else value for value in column]
        return column
    if getattr(column, "ndim", 1) > 1 and hasattr(column, "columns"):
        raise DataError(
            f"{name} has a {_kind(column)} of {len(column.columns)} columns where one is expected "
            f"(multi-label data are not supported); {FORM}"
        )
    if not _is_column(column):
        raise DataError(f"{name} has {shorten(column)} where a list is expected; {FORM}")
    return list(_to_python(column))


def _to_python(values: Any) -> Any:
    """Values of an array or column of any library, or the value of a tensor without axes.

    Those of 32 or 16 bits stay so: Python's floats would print 4.7 as 4.699999809265137.
    """
    if isinstance(values, np.ndarray):
        return values
    kind = str(getattr(values, "dtype", getattr(values, "type", ""))).rpartition(".")[2].lower()
    width = {"float32": np.float32, "float": np.float32, "float16": np.float16}.get(kind)
    for method in ("to_pylist", "to_list", "tolist"):  # Arrow, polars, torch
        if hasattr(values, method):
            values = getattr(values, method)()
            break
    if width is None:
        return values
    if not isinstance(values, list):
        return width(values)
    return [value if value is None else width(value) for value in values]


def _is_column(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether it is a row of values; a string is none, and neither is a tensor without axes."""
    return (
        isinstance(value, Iterable)
        and not isinstance(value, (str, bytes, Mapping, set, frozenset))
        and getattr(value, "ndim", 1) > 0
    )


def _is_scalar_tensor(value: object) -> bool:
    """Whether it is a tensor without axes, of another library than numpy."""
    return (
        hasattr(value, "tolist")
        and not isinstance(value, (np.ndarray, np.generic))
        and (getattr(value, "ndim", None) == 0)
    )


def _describe(data: object) -> str:
    kind = _kind(data)
    return f"a {kind}" if isinstance(data, (list, tuple, dict)) else kind


def _kind(data: object) -> str:
    """The type's name, `string` for a string."""
    name = f"{type(data).__module__}.{type(data).__qualname__}".removeprefix("builtins.")
    return "string" if name == "str" else name
