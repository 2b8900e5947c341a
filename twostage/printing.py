"""Text for people: tables, and names that came from outside."""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

SHOWN_CLASSES = 20
"""The most classes that a table for people has."""
MAX_REPORTED = 10
"""The most bad rows, or classes, that one message names."""

# Fillers, blanks and selectors that Unicode does not count among its format characters.
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def without_invisible(text: str) -> str:
    """`text` without what prints as nothing: zero-width and control characters, fillers."""
    if text.isascii() and text.isprintable():
        return text
    shown = [c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\t\n\r"]
    return _BLANK.sub("", "".join(shown))


def visible(text: str) -> str:
    """`text` with escapes for what a terminal would obey or not show: `\\x1b`, `\\u200b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(name: object) -> str:
    """A class or column as messages name it: in quotes, visible, at most 60 characters."""
    return f"'{_cut(str(name))}'"


def shorten(value: object) -> str:
    """A value of any type as a message shows it, in at most 60 characters."""
    try:
        shown = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        shown = f"a value of type {type(value).__name__}"
    return _cut(shown)


def as_json(value: object) -> str:
    """A value as JSON has it, in at most 60 characters."""
    return _cut(json.dumps(value, ensure_ascii=False))


def _cut(text: str) -> str:
    return visible(text if len(text) <= 60 else text[:60] + "…")


def list_some(items: Sequence[str], limit: int, separator: str = "; ") -> str:
    """The first `limit` items, and how many more there are."""
    more = [f"and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def list_bad_rows(source: str, bad: Sequence[str]) -> str:
    """One sentence that names up to MAX_REPORTED bad rows."""
    return f"{source} has {count(len(bad), 'bad row')}: {list_some(bad, MAX_REPORTED)}"


def count(number: int, noun: str) -> str:
    """`1 row`, `1,000 rows`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned to the right, the first to the left; floats with three digits, NaN as -."""
    cells = [[_format_cell(x) for x in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )


def _format_cell(value: object) -> str:
    if not isinstance(value, float):
        return visible(str(value))
    return "-" if math.isnan(value) else f"{value:.3f}"
