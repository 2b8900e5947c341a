"""Which columns of a table hold texts and labels: one rule for files and for data frames."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..printing import quoted, visible, without_invisible

TEXT_COLUMNS = ("text", "sentence")
"""The second is GLUE's."""
LABEL_COLUMN = "label"


@dataclass(frozen=True)
class Columns:
    """The names of the two columns, where a caller has given them; case does not count."""

    text: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.label_name in self.text_names:
            raise UsageError(
                f"text and label column are both {quoted(self.label_name)}; expected two columns"
            )

    @property
    def text_names(self) -> tuple[str, ...]:
        return TEXT_COLUMNS if self.text is None else (normalize(self.text),)

    @property
    def label_name(self) -> str:
        return LABEL_COLUMN if self.label is None else normalize(self.label)

    def find(self, header: Sequence[str]) -> tuple[int, int] | None:
        """The places of the text and the label column; None unless there is one of each."""
        names = [normalize(name) for name in header]
        texts = [place for place, name in enumerate(names) if name in self.text_names]
        labels = [place for place, name in enumerate(names) if name == self.label_name]
        return (texts[0], labels[0]) if len(texts) == len(labels) == 1 else None

    def explain(self, header: Sequence[str]) -> str:
        """Why `find` has found none."""
        names = [normalize(name) for name in header]
        shown = visible(", ".join(header)[:200])
        wanted = (*self.text_names, self.label_name)
        for name in names:
            if name not in wanted and without_invisible(name) in wanted:
                hidden = next(c for c in name if c != without_invisible(c))
                return (
                    f"column {quoted(name)} holds the invisible character U+{ord(hidden):04X} "
                    f"({unicodedata.name(hidden, 'a control character')}); remove it"
                )
        for name in wanted:
            if names.count(name) > 1:
                return f"column {quoted(name)} occurs twice; the header is: {shown}"
        found = [name for name in self.text_names if name in names]
        if len(found) > 1:
            both = " and ".join(map(quoted, found))
            return f"columns {both} could both be the text; name one with --text-column"
        return (
            f"expected columns {quoted(self.text_names[0])} and {quoted(self.label_name)}; the "
            f"header is: {shown}; other names need --text-column and --label-column, and a file "
            "without a header needs one"
        )

    def is_header(self, row: Sequence[str], header: Sequence[str]) -> bool:
        """Whether a row repeats the names of columns, these or GLUE's, in any order."""
        values = [normalize(without_invisible(value).strip().strip('"')) for value in row]
        if sorted(values) == sorted(map(normalize, header)):
            return True
        texts = (*self.text_names, *TEXT_COLUMNS)
        return LABEL_COLUMN in values and any(value in texts for value in values)


def normalize(name: str) -> str:
    return name.strip().lower()
