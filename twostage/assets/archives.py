"""A few named files out of a zip archive, and nothing else of it.

An archive from the network may be made to do harm: to write outside its folder (`../x`, `/x`,
`C:\\x`, symbolic links), to fill the disk (a bomb: 4 GB of zeros in 4 MB), or to show two readers
two contents (one name twice). Only the members that are asked for are ever read, to paths that the
caller chose; still, the whole table of contents is judged first, and an archive with one hostile
entry is refused as a whole: nothing else in it deserves trust.
"""

import os
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ..errors import DownloadError, UsageError, writing_to

MAX_MEMBERS = 10_000
MAX_RATIO = 200
"""Unpacked over packed size, of a member above a megabyte. Text reaches 10, deflate's limit is 1032
and that is what bombs use."""

_CHUNK = 1 << 20
_ADVICE = "delete it and download it again"
# What zipfile raises for damage depends on where the damage is.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
)
_ENCRYPTED = 0x1 | 0x40 | 0x2000  # flag bits: encrypted, strongly, table of contents too


def extract(archive: Path, members: Mapping[str, Path], *, max_bytes: int) -> None:
    """Write each member, by its name in the archive, to its path; all of them or none.

    max_bytes: of everything in the archive, unpacked

    Raises DownloadError for an archive that is damaged, hostile or without one of the members, and
    UsageError when a path cannot be written.
    """
    partials: dict[Path, Path] = {}
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = _check_entries(opened, archive, max_bytes)
            for name, path in members.items():
                if name not in entries or entries[name].is_dir():
                    raise DownloadError(f"'{archive}' holds no file '{name}'; {_ADVICE}")
                if path.is_dir():
                    raise UsageError(f"cannot write '{path}': it is a folder")
                partials[path] = path.with_name(path.name + ".partial")
                _copy_member(opened, entries[name], partials[path])
        for path, partial in partials.items():
            with writing_to(path):
                partial.replace(path)
    except OSError as error:
        raise DownloadError(f"'{archive}' cannot be read: {error.strerror or error}") from error
    except _DAMAGE as error:
        raise DownloadError(f"'{archive}' is not a whole zip archive; {_ADVICE}") from error
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()


def _check_entries(
    opened: zipfile.ZipFile, archive: Path, max_bytes: int
) -> dict[str, zipfile.ZipInfo]:
    """The table of contents by name. Raises DownloadError for the first thing that is wrong."""

    def refuse(problem: str) -> DownloadError:
        return DownloadError(f"'{archive}' {problem}; nothing was taken out of it, {_ADVICE}")

    entries: dict[str, zipfile.ZipInfo] = {}
    if len(opened.infolist()) > MAX_MEMBERS:
        raise refuse(f"holds {len(opened.infolist()):,} files, more than {MAX_MEMBERS:,}")
    for entry in opened.infolist():
        name = entry.orig_filename  # as it stands there: `filename` is a tidied copy
        if not _is_tame(name):
            raise refuse(f"names a file outside of it, {name[:100]!r}")
        if name in entries:
            raise refuse(f"holds {name[:100]!r} twice")
        kind = stat.S_IFMT(entry.external_attr >> 16)  # 0 where the archive knows no Unix
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise refuse(f"holds a link or device, {name[:100]!r}")
        if entry.flag_bits & _ENCRYPTED:
            raise refuse(f"is encrypted at {name[:100]!r}")
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise refuse(f"uses an unusual compression for {name[:100]!r}")
        if entry.file_size > max(MAX_RATIO * entry.compress_size, 1 << 20):
            raise refuse(f"is a bomb: {name[:100]!r} unpacks to {entry.file_size:,} bytes")
        entries[name] = entry
    total = sum(entry.file_size for entry in entries.values())
    if total > max_bytes:
        raise refuse(f"unpacks to {total:,} bytes, more than {max_bytes:,}")
    return entries


def _is_tame(name: str) -> bool:
    """Whether a name stays inside, on every system: relative, no `..`, no drive, no backslash."""
    return (
        name != ""
        and not name.startswith("/")
        and not re.match("[A-Za-z]:", name)
        and not set(name) & {"\\", "\0"}
        and ".." not in name.split("/")
    )


def _copy_member(opened: zipfile.ZipFile, entry: zipfile.ZipInfo, partial: Path) -> None:
    """To disk, counted: the size in the table of contents is only what the archive says of itself.

    zipfile compares the checksum at the end.
    """
    with opened.open(entry) as source, writing_to(partial):
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            size = 0
            while chunk := source.read(_CHUNK):
                size += len(chunk)
                if size > entry.file_size:
                    break
                file.write(chunk)
            if size != entry.file_size:
                raise zipfile.BadZipFile
            file.flush()
            os.fsync(file.fileno())
