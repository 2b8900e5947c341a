"""Tables for people, in plain text."""


def format_table(header: list[str], rows: list[list[object]]) -> str:
    """Columns aligned to the right, the first to the left; floats with three digits."""
    cells = [
        header,
        *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )
