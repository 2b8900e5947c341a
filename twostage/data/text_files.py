"""A text file from outside: its lines, or one sentence on why it has none."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, UsageError

# First bytes of what is no text, what it is, and what to do.
_OTHER_FILES = (
    (b"PK\x03\x04", "an Excel workbook or another zip archive", "save its sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "save its sheet as CSV (UTF-8)"),
    (b"\x1f\x8b", "packed by gzip", "unpack it with gunzip"),
    (b"BZh", "packed by bzip2", "unpack it with bunzip2"),
    (b"\xfd7zXZ", "packed by xz", "unpack it with unxz"),
    (b"\x28\xb5\x2f\xfd", "packed by zstd", "unpack it with unzstd"),
    (b"PAR1", "a Parquet file", "write it as CSV, with pandas for example"),
    (b"ARROW1", "an Arrow file", "write it as CSV, with pandas for example"),
    (b"SQLite format 3", "an SQLite database", "write its table as CSV"),
    (b"%PDF", "a PDF document", "give a table"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"<?xml", "an XML document", "save the table as CSV"),
)


@dataclass(frozen=True)
class TextFile:
    """A file's bytes, which are decoded line by line as often as they are read.

    (A line is as small as its characters allow. One string of all would take four bytes for each
    as soon as one of them is an emoji.)
    """

    path: Path
    raw: bytes = field(repr=False)
    encoding: str

    def lines(self) -> Iterator[str]:
        """Each with its end (`\\n`, `\\r\\n` or `\\r`), the last one too; no byte order mark.

        Raises UnicodeDecodeError; see `explain`.
        """
        end = "\n"
        file = io.TextIOWrapper(io.BytesIO(self.raw), self.encoding, newline="")
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix("\ufeff")
            if line.endswith(("\n", "\r")):
                end = line[-1]
                yield line
            else:
                yield line + end

    def explain(self) -> DataError:
        """Why it is not text in this encoding, with the line where that shows."""
        remedy = (
            "save the file as UTF-8, or name its encoding with --encoding (often utf-16 or cp1252)"
        )
        try:
            content = self.raw.decode(self.encoding)
            before, problem = content.partition("\0")[0], "holds a NUL byte"
            if content.count("\0") < len(content) / 10:  # in UTF-16 it is every other byte
                remedy = f"remove it, or {remedy}"
        except UnicodeDecodeError as error:
            before = self.raw[: error.start].decode(self.encoding, errors="replace")
            problem = f"not valid {self.encoding.upper()} ({error.reason})"
            if self.raw.startswith((b"\xff\xfe", b"\xfe\xff")):
                remedy = "the file begins as UTF-16 does: give --encoding utf-16"
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        return DataError(f"{self.path}, line {line}: {problem}; {remedy}")


def open_text(path: Path, encoding: str) -> TextFile:
    """Raises DataError for a file that cannot be read or is known to be no text, and UsageError."""
    try:
        is_text = "".encode(encoding) is not None and isinstance(b"".decode(encoding), str)
    except (LookupError, ValueError):
        is_text = False
    if not is_text:
        raise UsageError(
            f"encoding is {encoding!r}; expected a name that Python knows, such as utf-8, utf-16 "
            "or cp1252"
        )
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file '{path}'") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    beginning = raw[:100].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for first, kind, remedy in _OTHER_FILES:
        if beginning.startswith(first.lower()):
            raise DataError(f"{path} is {kind}, not a table; {remedy}")
    return TextFile(path, raw, encoding)
