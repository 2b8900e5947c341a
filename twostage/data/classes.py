"""What a class is: one rule for labels from files and from Python.

    a label               its class
    ' spam '              spam                 white space at the ends is dropped, nothing else
    '1', 1, '+1', 1.0     1                    a whole number without leading zeros is an integer,
                                               with or without a plus or `.0`
    '012', '1e3', '1.5'   012, 1e3, 1.5        all else is the text that it is: codes keep zeros
    True, 'True'          True                 other values from Python are what `str` makes of them
    None, NaN, ''         (none)               an error that names the row

Classes that are all integers sort as numbers, others as text. Names that differ only in case, white
space, Unicode form, invisible characters, letters that look alike or the form of a number stay
apart, and are pointed out before anything is trained.
"""

import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np

from ..errors import DataError, TwoStageWarning
from ..printing import (
    MAX_REPORTED,
    count,
    list_bad_rows,
    list_some,
    quoted,
    visible,
    without_invisible,
)

if TYPE_CHECKING:
    from .containers import Table

_WHOLE = re.compile(r"([+-]?(?:0|[1-9][0-9]{0,999}))(?:\.0*)?")
_LIST = re.compile(
    r"""[\[({]\s*(['"]).*\1\s*,?\s*[\])}]"""  # of quoted names
    r"|\[\s*(?:[0-9.]+|True|False)(?:[ ,]+(?:[0-9.]+|True|False))*\s*\]"
)
_VECTOR = re.compile(r"[01](?: [01])+|\(?[01](?:, ?[01]){2,}\)?")
_NUMBER = re.compile(r"[+-]?[0-9]+(?:,[0-9]+)?")
_HALF = re.compile(r"[+-]?[0-9]+,(?:00?|50?|25|75)")
# Cyrillic and Greek letters, dashes and apostrophes that print as Latin ones do.
_LOOK_ALIKE = str.maketrans(
    "аеорсухіјѕԁһԛԝкмтвнАВЕКМНОРСТУХІЈЅαονρτυικΑΒΕΖΗΙΚΜΝΟΡΤΥΧ‐‑‒–—−’‘ʼ",
    "aeopcyxijsdhqwkmtbhABEKMHOPCTYXIJSaovptuikABEZHIKMNOPTYX------'''",
)


def is_label(label: object) -> bool:
    """Whether a value can name a class: a string, an integer, a bool or a finite float."""
    if isinstance(label, str):
        return bool(without_invisible(label).strip())
    if isinstance(label, (float, np.floating)):
        return math.isfinite(label)
    if isinstance(label, np.bool_):
        return True
    return isinstance(label, Integral) and abs(int(label)) < 10**1_000  # Python prints no longer


def class_name(label: object) -> str:
    """The name of the class that a label means; see the rule above."""
    text = str(label).strip()
    whole = _WHOLE.fullmatch(text)
    return str(int(whole[1])) if whole else text


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, in the order of their index 0 … C-1."""

    names: tuple[str, ...]
    source: str
    """The data set's name, for messages."""

    def __len__(self) -> int:
        return len(self.names)

    def encode(self, table: "Table") -> np.ndarray:
        """[N] int64 class indices. Raises DataError naming the rows with an unknown label."""
        index = {class_name(name): i for i, name in enumerate(self.names)}
        labels_N = np.array([index.get(n, -1) for n in _class_names(table.labels)], dtype=np.int64)
        unknown = np.flatnonzero(labels_N < 0).tolist()
        if unknown:
            raise DataError(self._explain(table, unknown))
        return labels_N

    def _explain(self, table: "Table", unknown: list[int]) -> str:
        """One sentence on rows whose class is none of these; first what may be a slip."""
        rows_of: dict[str, list[int]] = {}
        for row in unknown:
            rows_of.setdefault(class_name(table.labels[row]), []).append(row)
        known = {_fold(name): name for name in self.names}
        slips = []
        for name, rows in rows_of.items():
            if _fold(name) in known:
                kinds, (mine, its) = _difference([name, known[_fold(name)]])
                slips.append(
                    f"{table.where(rows[0])}: class {mine} differs only in {kinds} from class "
                    f"{its} of {self.source}; write both alike ({count(len(rows), 'such row')})"
                )
        if slips:
            return list_some(slips, MAX_REPORTED)
        bad = [f"{table.where(row)}: class {quoted(table.labels[row])}" for row in unknown]
        names = list_some([visible(name) for name in self.names], 2 * MAX_REPORTED, ", ")
        return (
            list_bad_rows(table.source, bad)
            + f" (no such row in {self.source}, whose classes are {names})"
        )


def find_classes(train: "Table") -> Classes:
    """The classes of the training data: sorted as numbers if all are integers, else as text."""
    if not len(train):
        raise DataError(f"{train.source} has no rows")
    names = set(_class_names(train.labels))
    several = [quoted(name) for name in sorted(_find_lists(names))]
    if several:
        raise DataError(
            f"{train.source}: labels such as {list_some(several, 3, ', ')} seem to list several "
            "classes of one text; multi-label data are not supported: give each text one class, or "
            "write the names of classes without such marks"
        )
    are_integers = all(_WHOLE.fullmatch(name) for name in names)
    ordered = sorted(names, key=int if are_integers else str)
    if len(ordered) < 2:
        raise DataError(
            f"{train.source}: all {len(train)} rows have class {quoted(ordered[0])}; "
            "at least two classes are needed"
        )
    return Classes(tuple(ordered), train.source)


def _find_lists(names: set[str]) -> set[str]:
    """Names that list classes: `['a', 'b']`, `[3, 10]`, `a|b` where there are `a` and `b` too."""
    found = {name for name in names if _LIST.fullmatch(name)}
    if all(_VECTOR.fullmatch(name) for name in names):
        found |= names
    if all(name[0] + name[-1] == "[]" for name in names):
        found |= {name for name in names if set("|;,") & {*name}}
    found |= _find_combinations(names, "|") | _find_combinations(names, ";")
    with_commas = _find_combinations(names, ",")
    if all(_NUMBER.fullmatch(name) for name in names):
        # `2,27` lists classes where 2 and 27 are classes; `0,5` may be a half all the same.
        with_commas = {name for name in with_commas if {*name.split(",")} <= names}
        is_list = not all(_HALF.fullmatch(name) for name in with_commas)
    else:
        is_list = len(with_commas) > 1  # commas also stand in names, where one is no sign yet
    return found | with_commas if is_list else found


def _find_combinations(names: set[str], mark: str) -> set[str]:
    """Names of which each part is in other names too, one of them alone or at another place.

    In `News|Sport`, `News|Art` and `Shop|Art` no part is: there the mark tells levels apart.
    """
    parts_of = {name: [p for p in map(str.strip, name.split(mark)) if p] for name in names}
    alone = {parts[0] for parts in parts_of.values() if len(parts) == 1}
    names_with = Counter(part for parts in parts_of.values() for part in {*parts})
    places: dict[str, set[int]] = {}
    for parts in parts_of.values():
        for place, part in enumerate(parts):
            places.setdefault(part, set()).add(place)
    return {
        name
        for name, parts in parts_of.items()
        if len({*parts}) > 1
        and all(names_with[part] > 1 for part in parts)
        and any(part in alone or len(places[part]) > 1 for part in parts)
    }


def warn_of_twins(classes: Classes, train: "Table") -> None:
    """Warn (TwoStageWarning), in one line, of classes that may be one, and of one written in
    several ways, with their rows."""
    spellings: dict[str, Counter[str]] = {name: Counter() for name in classes.names}
    for label, rows in Counter(map(str, train.labels)).items():
        spellings[class_name(label)][label.strip()] += rows
    groups: dict[str, list[str]] = {}
    for name in classes.names:
        groups.setdefault(_fold(name), []).append(name)
    notes = []
    for group in groups.values():
        if len(group) > 1:
            kinds, shown = _difference(group)
            ways = [
                f"{way} ({count(spellings[name].total(), 'row')})"
                for way, name in zip(shown, group, strict=True)
            ]
            notes.append(
                f"classes {' and '.join(ways)} differ only in {kinds}; if they are one, write them "
                "alike"
            )
    for name, rows_of in spellings.items():
        if len(rows_of) > 1:
            ways = [f"{quoted(way)} ({count(rows, 'row')})" for way, rows in rows_of.items()]
            notes.append(f"class {quoted(name)} is written as {' and '.join(ways)}")
    if notes:
        warnings.warn(
            f"{classes.source}: {list_some(notes, MAX_REPORTED)}", TwoStageWarning, stacklevel=3
        )


def _class_names(labels: Iterable[object]) -> list[str]:
    """The class of each label. (True, 1 and 1.0 are one key to a dict, hence the types.)"""
    names: dict[tuple[type, object], str] = {}
    found = []
    for label in labels:
        key = (type(label), label)
        if key not in names:
            names[key] = class_name(label)
        found.append(names[key])
    return found


def _as_number(name: str) -> str:
    """`01`, `1.0`, `1e0` → `1.0`; all else as it is."""
    try:
        number = float(name)
    except ValueError:
        return name
    return repr(number) if math.isfinite(number) else name


_FOLDS: dict[str, Callable[[str], str]] = {
    "invisible characters": without_invisible,
    "Unicode form": lambda name: unicodedata.normalize("NFKC", name),
    "case": lambda name: name.casefold().replace("\u0307", ""),  # of the Turkish İ
    "white space": lambda name: "".join(name.split()),
    "letters that look alike": lambda name: name.translate(_LOOK_ALIKE),
    "quotation marks": lambda name: name.strip("\"'“”"),
    "the form of a number": _as_number,
}


def _fold(name: str, kinds: Iterable[str] = tuple(_FOLDS)) -> str:
    """A form that names have in common when they differ only in these ways."""
    for kind in kinds:
        name = _FOLDS[kind](name)
    return name


def _difference(names: Sequence[str]) -> tuple[str, list[str]]:
    """(in what names of one fold differ, the names as a message shows them).

    The fewest kinds that explain it. Names that print alike are shown in ASCII, with escapes.
    """
    kinds = next(
        some
        for size in range(1, len(_FOLDS) + 1)
        for some in combinations(_FOLDS, size)
        if len({_fold(name, some) for name in names}) == 1
    )
    print_alike = {"invisible characters", "Unicode form", "letters that look alike"}
    show = ascii if print_alike & {*kinds} else quoted
    return " and ".join(kinds), [show(name) for name in names]
