"""Text for people: tables, and names that came from outside."""

from collections.abc import Iterable, Sequence


def visible(text: str) -> str:
    """`text` with escapes for what a terminal would obey or not show: `\\x1b`, `\\u200b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(name: object) -> str:
    """A class or column as messages name it: in quotes, visible, at most 60 characters."""
    text = str(name)
    return f"'{visible(text if len(text) <= 60 else text[:60] + '…')}'"


def list_some(items: Sequence[str], limit: int, separator: str = "; ") -> str:
    """The first `limit` items, and how many more there are."""
    more = [f"and {len(items) - limit:,} more"] if len(items) > limit else []
    return separator.join([*items[:limit], *more])


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned to the right, the first to the left; floats with three digits."""
    cells = [
        [f"{x:.3f}" if isinstance(x, float) else visible(str(x)) for x in row]
        for row in (header, *rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )
