"""Answers on disk: what was paid for once is never asked for again.

`paraphrases.jsonl` has a line for each answer of the server, good or bad, as it came:

    {"key": "9f86d081…", "content": "a fine film", "finish_reason": "stop", "tokens": [31, 4]}

The key is a hash of all that the answer depends on (model, message, parameters, text, draw), so
that it holds in any folder and for any later run. Lines are only ever appended, many at a time,
and `append` returns when they are on disk: written and fsynced. A line that a crash cut short was
never acknowledged; it is cut off when the file is opened again. In memory there is only where each
answer stands in the file.
"""

import asyncio
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import TwoStageWarning, UsageError, writing_to
from ..files import append, open_to_append

try:
    import fcntl
except ImportError:  # Windows has none; two jobs in one folder are then not noticed
    fcntl = None  # type: ignore[assignment]

NAME = "paraphrases.jsonl"


@dataclass(frozen=True)
class Answer:
    """What came back for one request."""

    content: str
    finish_reason: str
    """As the server said; `refusal` and `content_filter` where it refused."""
    prompt_tokens: int
    completion_tokens: int
    shortened_to: int | None = None
    """Characters of the text that were sent, where the whole was too long for the model."""
    batch: bool = False
    """Came through the Batch API, at its lower price."""
    reused: bool = False
    """Taken over from another folder's journal, so paid for by another job."""


class Journal:
    """The answers of one folder. Raises UsageError while another process writes to it.

    read_only: for another folder's answers; the file may not exist, nothing is mended.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self._file = -1  # for writing
        self._reader: BinaryIO | None = None
        self._offsets: dict[str, int] = {}
        self._pending: list[tuple[str, Answer, asyncio.Future[None]]] = []
        self._writing: asyncio.Task[None] | None = None
        if not read_only:
            with writing_to(path):
                self._file = open_to_append(path)
        try:
            if not read_only:
                self._lock()
            try:
                self._reader = path.open("rb")
            except OSError:
                if read_only:
                    return  # nothing to be had from that folder
                raise UsageError(f"cannot read '{path}', which was just written") from None
            self._read(mend=not read_only)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: str) -> bool:
        return key in self._offsets

    def get(self, key: str) -> Answer | None:
        """The answer to this request, if there is one."""
        offset = self._offsets.get(key)
        if offset is None or self._reader is None:
            return None
        self._reader.seek(offset)
        return _read_line(self._reader.readline())[1]

    def add(self, answers: Iterable[tuple[str, Answer]]) -> None:
        """Append these answers; they are on disk when this returns. Raises UsageError."""
        lines = [(key, _write_line(key, answer)) for key, answer in answers]
        if not lines:
            return
        with writing_to(self.path):
            offset = append(self._file, b"".join(line for _, line in lines))
        for key, line in lines:
            self._offsets[key] = offset
            offset += len(line)

    async def append(self, key: str, answer: Answer) -> None:
        """`add` one answer, together with those of all who ask while the disk is at work."""
        written = asyncio.get_running_loop().create_future()
        self._pending.append((key, answer, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_pending())
        await written

    async def _write_pending(self) -> None:
        while self._pending:
            block, self._pending = self._pending, []
            error = None
            try:
                await asyncio.to_thread(self.add, [(key, answer) for key, answer, _ in block])
            except UsageError as refused:
                error = refused
            for _, _, written in block:
                if written.cancelled():
                    continue
                if error:
                    written.set_exception(error)
                else:
                    written.set_result(None)
        self._writing = None

    async def flush(self) -> None:
        """Return when all that was appended is on disk, also for callers that were cancelled."""
        if self._writing is not None:
            await asyncio.shield(self._writing)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)  # and with it goes the lock
            self._file = -1
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{self.path} is in use: another twostage augment works in this folder; wait for "
                "it, or stop it"
            ) from None
        except OSError:
            pass  # some network file systems have no locks; better unlocked than not at all

    def _read(self, *, mend: bool) -> None:
        assert self._reader is not None
        unreadable = []
        offset = 0
        for number, line in enumerate(self._reader, 1):
            if not line.endswith(b"\n"):
                if mend:
                    with writing_to(self.path):
                        os.ftruncate(self._file, offset)
                break
            try:
                key, _ = _read_line(line)
                self._offsets[key] = offset
            except (ValueError, KeyError, TypeError):
                unreadable.append(number)
            offset += len(line)
        if unreadable:
            shown = ", ".join(map(str, unreadable[:10]))
            more = f" and {len(unreadable) - 10} more" if len(unreadable) > 10 else ""
            warnings.warn(
                f"{self.path}, line {shown}{more}: no answer; what it was is asked again",
                TwoStageWarning,
                stacklevel=3,
            )


def _write_line(key: str, answer: Answer) -> bytes:
    fields: dict[str, Any] = {
        "key": key,
        "content": answer.content,
        "finish_reason": answer.finish_reason,
        "tokens": [answer.prompt_tokens, answer.completion_tokens],
    }
    if answer.shortened_to is not None:
        fields["shortened_to"] = answer.shortened_to
    fields |= {name: True for name in ("batch", "reused") if getattr(answer, name)}
    return json.dumps(fields).encode() + b"\n"


def _read_line(line: bytes) -> tuple[str, Answer]:
    """Raises ValueError, KeyError or TypeError for what is no answer."""
    fields = json.loads(line)
    key = fields.pop("key")
    prompt_tokens, completion_tokens = map(int, fields.pop("tokens"))
    answer = Answer(**fields, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    if not isinstance(key, str) or not isinstance(answer.content, str):
        raise TypeError
    return key, answer
