"""How is a delimited file written? Nothing in it says so; the evidence decides.

The file is read in each way in which it could have been written (`QUOTINGS`). A way fails at a
closing quote with neither a delimiter nor a line end behind it, at a quote that is never closed,
and at a row without the header's number of fields. The way that is left is the right one, and ways
that give the same rows are the same. Where two are left that differ:

- Quotes join lines, of which one has a known label where a row would have it: the number of rows
  is in doubt. (This holds where one way is left, too.)
- Quotes stand around fields between commas: they enclose the fields.
- Quotes stand around fields between tabs: their places show whether a program wrote them. A program
  that encloses fields encloses each that holds a quote, and doubles the quote; Excel does so for
  commas too. GLUE's files (`sentence<TAB>label`) have no quoting at all.
- Each backslash stands before something that it could escape, or each apostrophe where it could
  enclose a field: the file is in doubt.

What is in doubt is refused, with the line and the values of `quoting` that settle it.
"""

import csv
import re
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import DataError
from .classes import class_name
from .columns import LABEL_COLUMN, normalize

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
QUOTINGS: dict[str, dict[str, Any]] = {
    "standard": {},
    "none": {"quoting": csv.QUOTE_NONE},
    "single": {"quotechar": "'"},
    "escaped": {"escapechar": "\\"},
    "escaped-none": {"escapechar": "\\", "quoting": csv.QUOTE_NONE},
    "spaced": {"skipinitialspace": True},
}
"""Ways of writing fields, as the csv module is told of them."""
MEANING = {
    "standard": "quotes enclose fields",
    "none": "quotes belong to the text",
    "single": "apostrophes enclose fields",
    "escaped": "a backslash escapes what follows it",
    "escaped-none": "a backslash escapes what follows it and quotes belong to the text",
    "spaced": "white space behind a delimiter does not count",
}
NEVER_CLOSED = (
    "a quote opens here and is never closed; close it, or give --quoting none if quotes belong to "
    "the text"
)
BEHIND_QUOTE = (
    "a closing quote is followed by neither a delimiter nor a line end; double it, or give "
    "--quoting none if quotes belong to the text"
)
MIN_DOUBLED = 3
"""Enclosed fields with doubled quotes that prove a program's quoting in a file of GLUE's shape,
which should have none; fewer may be the texts' own."""


@dataclass
class Rows:
    """What a file holds if it is written in one way."""

    quoting: str
    texts: list[str] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    lines: "array[int]" = field(default_factory=lambda: array("q"))
    """The line on which each row begins."""
    bad: list[str] = field(default_factory=list)
    """What cannot be a row: `line 7: the label is empty`."""
    inner_labels: list[tuple[int, str]] = field(default_factory=list)
    """(line, what stands where its label would) for lines that quotes join with others."""
    notes: list[str] = field(default_factory=list)
    """What is unusual in how the file is written, to follow its name."""

    @property
    def works(self) -> bool:
        return not self.bad and bool(self.texts)

    def add(self, line: int, text: str, label: Any) -> None:
        self.lines.append(line)
        self.texts.append(text)
        self.labels.append(label)

    def equal(self, other: "Rows") -> bool:
        return self.texts == other.texts and self.labels == other.labels


@dataclass
class Signs:
    """Whether a file has characters that could mean something other than themselves."""

    quotes: bool = False
    enclosed: bool = False
    """A field with a quote at each end."""
    apostrophes: bool = False
    escapes: bool = False
    """Whether there are backslashes and each could escape something."""
    mixed_ends: bool = False
    """Whether only some lines end in a bare `\\r`; unusual quotings are then ruled out."""


def find_signs(lines: Iterable[str], delimiter: str) -> Signs:
    """lines: all of the file, with their ends"""
    d = re.escape(delimiter)
    escape = re.compile(rf"\\(?:[\\\"'\r\n]|{d}|(.|\Z))")
    enclosed = re.compile(rf'(?:\A|{d})"[^{d}]*"(?={d}|[\r\n])')
    signs, has_backslash, has_literal = Signs(), False, False
    ends = set()
    for line in lines:
        ends.add(line[-1:])
        if '"' in line:
            signs.quotes = True
            signs.enclosed = signs.enclosed or enclosed.search(line) is not None
        signs.apostrophes = signs.apostrophes or "'" in line
        if not has_literal and "\\" in line:
            has_backslash = True
            has_literal = any(match[1] is not None for match in escape.finditer(line))
    signs.escapes = has_backslash and not has_literal
    signs.mixed_ends = len(ends) > 1
    return signs


def is_glue(delimiter: str, header: list[str]) -> bool:
    """Whether a file has the shape of GLUE's SST-2."""
    return delimiter == "\t" and sorted(map(normalize, header)) == [LABEL_COLUMN, "sentence"]


def choose_quoting(
    attempt: Callable[[str], Rows],
    signs: Signs,
    delimiter: str,
    header: list[str],
    header_quoting: str,
) -> Rows:
    """The rows of a file in the way in which it is written.

    attempt: reads the file in one of QUOTINGS. header_quoting: one in which its header reads well.
    Raises DataError where it is in doubt: `line 7: …`.
    """
    rows = attempt(header_quoting)
    if signs.quotes and header_quoting == "standard":
        rows = _weigh_quotes(rows, attempt("none"), delimiter == "\t", is_glue(delimiter, header))
        is_spaced = delimiter != "\t" and all(name[:1] == " " for name in header[1:])
        if is_spaced and not rows.works and attempt("spaced").works:
            rows = attempt("spaced")
    if signs.escapes:
        # A program that escapes and never encloses would have escaped the quotes of such a field.
        names = ["escaped"] if signs.enclosed else ["escaped", "escaped-none"]
        ways = [way for way in map(attempt, names) if way.works]
        if ways and rows.works:
            _refuse(rows, ways[0])
        if len(ways) > 1 and not ways[0].equal(ways[1]):
            _refuse(*ways)
        if ways and not signs.mixed_ends:
            rows = ways[0]
    if signs.apostrophes:
        single = attempt("single")
        if single.works and not rows.works and not signs.mixed_ends:
            rows = single
        elif single.works and rows.works and _may_be_single(rows, single):
            _refuse(rows, single)
    if signs.escapes and rows.works and rows.quoting == "single":
        raise DataError(
            "line 1: apostrophes enclose fields here, and backslashes could escape what follows "
            "them; give --quoting single if they are only themselves"
        )
    if line := _find_joined_row(rows):
        raise DataError(
            f"line {line}: quotes join this line with another, though it has a label; close the "
            f"quote, or give --quoting {rows.quoting} if the lines are one text, or --quoting none "
            f"if {MEANING['none']}"
        )
    return rows


def _weigh_quotes(standard: Rows, plain: Rows, is_tab: bool, is_glue: bool) -> Rows:
    """Do quotes enclose fields (`standard`), or do they belong to the texts (`plain`)?"""
    if not plain.works:
        return plain if is_glue and not standard.works else standard
    if not standard.works:
        # Without a delimiter or a line end behind it, it was no closing quote.
        was_text = is_tab or (standard.bad and standard.bad[-1].endswith(BEHIND_QUOTE))
        return plain if was_text and not _encloses(plain, is_tab) else standard
    if standard.equal(plain):
        return standard
    if len(standard.texts) != len(plain.texts):
        if is_tab or _find_joined_row(standard):
            _refuse(standard, plain)
        return standard
    if not is_tab or standard.labels != plain.labels:
        return standard
    enclosed: list[str] = []
    others: list[str] = []
    for text, as_it_stands in zip(standard.texts, plain.texts, strict=True):
        (others if text == as_it_stands else enclosed).append(text)
    if is_glue:
        if not _encloses_all_with('"', enclosed, others):
            return plain
        if len(enclosed) < MIN_DOUBLED:
            _refuse(standard, plain)
        return standard
    if not others or any(_encloses_all_with(these, enclosed, others) for these in ('"', '",')):
        return standard
    if not any('"' in text for text in others):
        _refuse(standard, plain)
    return plain


def _encloses_all_with(characters: str, enclosed: list[str], others: list[str]) -> bool:
    """Whether exactly the texts that hold one of these characters are enclosed."""
    needs_it = re.compile(f"[{characters}]").search
    return all(map(needs_it, enclosed)) and not any(map(needs_it, others))


def _encloses(plain: Rows, is_tab: bool) -> bool:
    """Whether quotes stand around labels or texts, or at least, with tabs, are doubled there."""
    enclosed = re.compile('".*""+.*"' if is_tab else '".*"').fullmatch
    return any(map(enclosed, plain.texts)) or any(label[:1] == '"' for label in plain.labels)


def _find_joined_row(rows: Rows) -> int:
    """The first line that quotes join with others although it has a label; 0 if none does.

    Where all rows are of one class, any word may be the label of another. White space before it is
    prose: `well, 1`.
    """
    if not rows.inner_labels:
        return 0
    known = {class_name(label).casefold() for label in rows.labels}
    for line, label in rows.inner_labels:
        name = class_name(label.strip().strip('"')).casefold()
        is_word = len(known) < 2 and re.fullmatch(r"[^\s\"]{1,30}", label)
        if (name in known and not label[:1].isspace()) or is_word:
            return line
    return 0


def _may_be_single(rows: Rows, single: Rows) -> bool:
    """Whether apostrophes join lines, or are doubled in one text, or stand around all of them.

    A program that encloses with them would have enclosed every text that holds one: `it's`.
    """
    if any("'" in text for text in {*rows.texts} & {*single.texts}):
        return False
    if len(rows.texts) != len(single.texts):
        return True
    enclosed = [b for a, b in zip(rows.texts, single.texts, strict=True) if a != b]
    return len(enclosed) == len(rows.texts) or any("'" in text for text in enclosed)


def _refuse(one: Rows, other: Rows) -> NoReturn:
    pairs = (zip(way.texts, way.labels, way.lines, strict=True) for way in (one, other))
    line = max(one.lines[-1], other.lines[-1])  # where one of them has rows beyond the other's
    for (*ours, our_line), (*theirs, their_line) in zip(*pairs, strict=False):
        if ours != theirs:
            line = min(our_line, their_line)
            break
    raise DataError(
        f"line {line}: two ways of reading differ from here on; give --quoting {one.quoting} if "
        f"{MEANING[one.quoting]}, or --quoting {other.quoting} if {MEANING[other.quoting]}"
    )
