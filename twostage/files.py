"""Writing files so that a reader meets all of what was written, or none."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from .errors import writing_to


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A UTF-8 text file beside `path`, which takes its place once everything is on disk.

    Folders on the way are made; line ends are written as given. When the body or the disk fails,
    `path` stays as it was. Raises UsageError when the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8", newline="") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """A JSON file, indented, with lists and objects of plain values on one line each.

    Raises UsageError when it cannot be written.
    """
    with replacing(path) as file:
        file.write(_format_json(value) + "\n")


def _format_json(value: Any, indent: str = "\n") -> str:
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, (dict, list)) or not any(isinstance(p, (dict, list)) for p in parts):
        return json.dumps(value)
    deeper = indent + "  "
    if isinstance(value, list):
        return f"[{deeper}{f',{deeper}'.join(_format_json(p, deeper) for p in value)}{indent}]"
    items = (f"{json.dumps(str(k))}: {_format_json(p, deeper)}" for k, p in value.items())
    return f"{{{deeper}{f',{deeper}'.join(items)}{indent}}}"


def append(descriptor: int, data: bytes) -> int:
    """Put `data` at the end of an open file and on disk; returns where it begins.

    When the disk refuses, the file is as it was: no half line may stand in front of later ones.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    try:
        left = memoryview(data)
        while left:
            left = left[os.write(descriptor, left) :]
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, end)
        raise
    return end


def open_to_append(path: Path) -> int:
    """A descriptor for `append`; a file that is new, and its folders, are on disk by name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    if is_new:
        with suppress(OSError):  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    return descriptor
