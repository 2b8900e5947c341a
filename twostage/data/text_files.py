"""A text file from outside: its lines, or one sentence on why it has none."""

import codecs
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError, UsageError

_REMEDY = "save the file as UTF-8, or name its encoding with --encoding (often utf-16 or cp1252)"
_UTF_8 = ("utf-8", "utf-8-sig")
_UTF_STARTS = ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
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

        Raises DataError at what is no text in this encoding.
        """
        end = "\n"
        file = io.TextIOWrapper(io.BytesIO(self.raw), self.encoding, newline="")
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise self._explain(None)
                if number == 1:
                    line = line.removeprefix("\ufeff")
                if line.endswith(("\n", "\r")):
                    end = line[-2:] if line.endswith("\r\n") else line[-1]
                    yield line
                else:
                    yield line + end
        except UnicodeError as error:
            raise self._explain(error) from None

    def _explain(self, error: UnicodeError | None) -> DataError:
        """Why it is no text, with the line where that shows. error: None where a line has a NUL."""
        before, remedy = "", _REMEDY
        if error is None:
            content = self.raw.decode(self.encoding)
            before, problem = content.partition("\0")[0], "holds a NUL byte"
            if content.count("\0") < len(content) / 10:  # in UTF-16 it is every other byte
                remedy = f"remove it, or {_REMEDY}"
        else:
            problem = f"not valid {self.encoding.upper()} ({getattr(error, 'reason', error)})"
            try:
                self.raw.decode(self.encoding)
            except UnicodeDecodeError as of_all:  # the other's place is one in a part of the file
                before = self.raw[: of_all.start].decode(self.encoding, errors="replace")
        if (likely := _guess_encoding(self.raw)) and likely != self.encoding.lower():
            remedy = f"it looks like {likely.upper()}: give --encoding {likely}"
        line = len(re.findall(r"\r\n|\r|\n", before)) + 1
        return DataError(f"{self.path}, line {line}: {problem}; {remedy}")


def _guess_encoding(raw: bytes) -> str:
    """The likely encoding of a file with NUL bytes, or an empty string."""
    for start, encoding in _UTF_STARTS:
        if raw.startswith(start):
            return encoding
    odd, even = raw[1:400:2], raw[0:400:2]
    if odd.count(0) > len(odd) / 2 or even.count(0) > len(even) / 2:
        return "utf-16-le" if odd.count(0) > even.count(0) else "utf-16-be"
    return ""


def open_text(path: Path, encoding: str) -> TextFile:
    """Read a text file.

    Raises DataError for one that cannot be read or is known to be no text, and UsageError for an
    encoding that Python does not know.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding)
    except (LookupError, ValueError):
        raise UsageError(
            f"encoding is {encoding!r}; expected a name that Python knows, such as utf-8, utf-16 "
            "or cp1252"
        ) from None
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"there is no file '{path}'") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    beginning = raw[:100].removeprefix(codecs.BOM_UTF8)
    for first, kind, remedy in _OTHER_FILES:
        if beginning.startswith(first) or beginning.lstrip().lower().startswith(first):
            raise DataError(f"{path} is {kind}, not a table; {remedy}")
    if raw.startswith(codecs.BOM_UTF8) and codecs.lookup(encoding).name not in _UTF_8:
        raise DataError(f"{path} begins as UTF-8 does; leave out --encoding {encoding}")
    return TextFile(path, raw, encoding)
