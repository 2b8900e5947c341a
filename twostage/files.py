"""Writing a file so that a reader meets all of it or none."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

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
