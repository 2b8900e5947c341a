"""Chat completions through the Batch API: half the price, up to a day to wait, nothing paid twice.

Requests travel in shards: a file of up to 50,000 of them, one a line, and a batch made of that
file. The life of a shard, with the calls that move it on:

    requests
       │ POST /files                          the file is there: {"file": …, "keys": […]}
       v
    uploaded <─────────────────────────┐
       │ POST /batches                 │      the batch is there: {"file": …, "batch": "batch_1"}
       v                               │
    validating ─── no room for its ────┘      no batch any more: {"file": …, "batch": null}
       │           tokens in the queue
       v   GET /batches/{id}, again and again
    in_progress, finalizing
       │
       v
    completed, expired, cancelled, failed     all four may hold answers, which are paid for
       │ GET /files/{id}/content              what they say is kept, then: {"file": …, "done": true}
       v
    done: whatever has no answer yet goes into another shard, RESUBMISSIONS times

On the right is what the state file, `batches.jsonl`, is told: a line each, on disk before the next
call. So a run that was killed is taken up where it was, by reading the lines again.

A batch is paid for once it is created, and that call alone cannot be made again blindly: when its
answer is lost (a timeout, a cut connection, a 5xx, a kill), nobody on this side knows whether the
batch exists, and a second one would be paid for as well. So the file is on record before the call,
and after a lost answer, in this run or the next, the server's list of batches is searched for that
file before anything else is done. Batches on record don't count in that search: a shard that found
no room has had batches before, and they have failed. All other calls can be repeated: a second
upload is a file that nobody uses.

Nothing is ever cancelled at the server. Whoever stops a job finds its batches in the next run.
"""

import asyncio
import io
import json
import os
import warnings
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from ..errors import TwoStageWarning, UsageError, writing_to
from ..files import append, open_to_append
from .openai_client import (
    RETRY_SECONDS,
    SHOWN,
    ApiError,
    AuthenticationError,
    Completion,
    OpenAIClient,
    QuotaError,
    RejectedError,
    RetryableError,
    UnknownModelError,
    UnsupportedLimitError,
    is_error,
    parse_json,
    read_error,
)

MAX_REQUESTS = 50_000
MAX_BYTES = 190_000_000
"""OpenAI takes 200 MB, and doesn't say which megabytes these are."""
RESUBMISSIONS = 3
"""How often requests that brought neither an answer nor a refusal are sent again."""
FIRST_POLL_SECONDS, MAX_POLL_SECONDS = 5.0, 60.0
SETTLE_SECONDS = 10.0
"""Time for a batch to show up in the server's list after a create call whose answer was lost."""
CREATE_ATTEMPTS = 6
LATE_POLLS = 5
"""How often to look again where requests have completed, but there is no output file yet."""

_ENDPOINT = "/v1/chat/completions"
_ENDED = ("completed", "expired", "cancelled", "failed")
_FATAL = (AuthenticationError, QuotaError, UnknownModelError)  # no other request would fare better


async def answer_by_batches(
    client: OpenAIClient,
    bodies: Mapping[str, Mapping[str, Any]],
    state_path: Path,
    keep: Callable[[Sequence[tuple[str, Completion]]], None],
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    on_poll: Callable[[int, int], None] = lambda finished, total: None,
    max_requests: int = MAX_REQUESTS,
    max_bytes: int = MAX_BYTES,
) -> dict[str, ApiError]:
    """Get the completions of all requests, and of all batches that an earlier run left behind.

    bodies: by the request's key, as `chat_body` makes them; sent in this order
    state_path: the state file; no two jobs at a time may have the same
    keep: makes completions durable before it returns. A crash right after that brings them again,
        and the batches of an earlier job bring keys that are not in `bodies`
    sleep: may raise to stop the job; the batches go on, and the next call takes them up
    on_poll: told how many requests have finished at the server, and of how many

    Returns the requests that the server refused one by one, with the error of each: a context
    overflow, the content filter, or another refusal. Requests that are neither kept nor returned
    are still missing after RESUBMISSIONS.

    Raises AuthenticationError, QuotaError or UnknownModelError; RetryableError when the server
    cannot be reached for long or has no room for even one request; RejectedError when it refuses
    a whole batch, has no Batch API, or does not know a batch or file on record; UsageError when
    the state file cannot be used, or has batches of another server under way. What was harvested
    by then has been kept.
    """
    state = _State(state_path)
    job = _Job(client, bodies, state, keep, sleep, on_poll, max_requests, max_bytes)
    await job.resume()
    for _ in range(1 + RESUBMISSIONS):
        await job.submit(job.missing())
        await job.wait()
        if not job.missing():
            break
    return job.refused


def keys_under_way(state_path: Path) -> set[str]:
    """Requests in batches on record that have not been harvested. Raises UsageError."""
    state = _State(state_path, read_only=True)
    return {key for shard in state.shards.values() for key in shard.keys}


@dataclass
class _Shard:
    """Requests that travel in one file."""

    file_id: str
    keys: list[str]
    server: str
    limit_name: str
    """What the limit on an answer's length is called in this file."""
    batch_id: str | None = None
    """None: not created yet, or turned away for want of room."""
    finished: int = 0
    """Requests done, when last looked at."""
    late_polls: int = 0
    was_alone: bool = False
    """No other batch of ours has been under way since this one was created."""


class _State:
    """The state file. Its shards are those that aren't done.

    read_only: a torn last line is left alone; another process may just be writing it

    Raises UsageError where it cannot be read or written.
    """

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self.path = path
        self.shards: dict[str, _Shard] = {}
        """By file id, in the order of their upload."""
        self.batch_ids: set[str] = set()
        """Of all batches that there ever were."""
        self._read(mend=not read_only)
        self.earlier = frozenset(self.shards)
        """Those of an earlier call."""

    def record(self, **fields: Any) -> None:
        """Append a line; when this returns it is on disk, and the shards are what it says."""
        with writing_to(self.path):
            file = open_to_append(self.path)
            try:
                append(file, json.dumps(fields).encode() + b"\n")
            finally:
                os.close(file)
        self._apply(fields)

    def _read(self, *, mend: bool) -> None:
        whole = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        break  # a crash cut it short; nothing was done on the strength of it
                    try:
                        self._apply(json.loads(line))
                    except (ValueError, KeyError, TypeError, AttributeError):
                        raise UsageError(
                            f"{self.path}, line {number}: not a line of a batch's state; restore "
                            "the file, or delete it to give up the batches that it names"
                        ) from None
                    whole += len(line)
                else:
                    return
        except FileNotFoundError:
            return
        except OSError as error:
            raise UsageError(f"cannot read '{self.path}': {error.strerror or error}") from error
        if mend:
            with writing_to(self.path):
                os.truncate(self.path, whole)

    def _apply(self, fields: dict[str, Any]) -> None:
        file_id = fields["file"]
        if "keys" in fields:
            shard = _Shard(file_id, fields["keys"], fields["server"], fields["limit_name"])
            self.shards[file_id] = shard
        elif "batch" in fields:
            self.shards[file_id].batch_id = fields["batch"]
            if fields["batch"] is not None:
                self.batch_ids.add(fields["batch"])
        elif fields["done"]:
            del self.shards[file_id]


class _Job:
    """One call of `answer_by_batches`. One call at a time: there is nothing to gain from more."""

    def __init__(
        self,
        client: OpenAIClient,
        bodies: Mapping[str, Mapping[str, Any]],
        state: _State,
        keep: Callable[[Sequence[tuple[str, Completion]]], None],
        sleep: Callable[[float], Awaitable[object]],
        on_poll: Callable[[int, int], None],
        max_requests: int,
        max_bytes: int,
    ) -> None:
        self.refused: dict[str, ApiError] = {}
        self._client, self._bodies, self._state, self._keep = client, bodies, state, keep
        self._sleep, self._on_poll = sleep, on_poll
        self._max_requests, self._max_bytes = max_requests, max_bytes
        self._kept: set[str] = set()
        earlier = (key for shard in state.shards.values() for key in shard.keys)
        self._total = len(set(bodies).union(earlier))

    def missing(self) -> list[str]:
        """Requests without an answer, a refusal, or a shard that may still bring one."""
        settled = self._kept.union(self.refused, *(s.keys for s in self._state.shards.values()))
        return [key for key in self._bodies if key not in settled]

    async def resume(self) -> None:
        """Find the batches that an earlier run created, and harvest those that have ended."""
        shards = list(self._state.shards.values())
        self._check_server(shards)
        unsure = [shard for shard in shards if shard.batch_id is None]
        if unsure:
            await self._sleep(SETTLE_SECONDS)
            found = await self._find_batches([shard.file_id for shard in unsure])
            for shard in unsure:
                if shard.file_id in found:
                    self._state.record(file=shard.file_id, batch=found[shard.file_id])
                else:
                    # Not created from here: this job may not want all of its requests.
                    self._state.record(file=shard.file_id, done=True)
        if self._state.shards:
            await self._poll()

    def _check_server(self, shards: Sequence[_Shard]) -> None:
        for shard in shards:
            if shard.server != self._client.address:
                raise UsageError(
                    f"{self._state.path} has batches under way at {shard.server}, and this is "
                    f"{self._client.address}; run once with --base-url {shard.server} to get "
                    "their answers, or delete the file to give them up"
                )

    async def submit(self, keys: Sequence[str]) -> None:
        """Send these requests off, in as many shards as they need."""
        # The name is the same for all: only a harvest changes it.
        limit_name = next(iter(self._client.in_dialect({"max_completion_tokens": 0})))
        for shard_keys, lines in self._cut(keys):
            await self._sleep(0)  # where the caller may stop the job
            file_id = await self._upload(lines)
            self._state.record(
                file=file_id, server=self._client.address, limit_name=limit_name, keys=shard_keys
            )
            await self._create(self._state.shards[file_id])

    def _cut(self, keys: Iterable[str]) -> Iterator[tuple[list[str], bytes]]:
        """Shards within both limits: their keys, and the lines of their file."""
        shard_keys: list[str] = []
        lines: list[bytes] = []
        size = 0
        for key in keys:
            line = _write_request(key, self._client.in_dialect(self._bodies[key]))
            if shard_keys and (
                len(shard_keys) >= self._max_requests or size + len(line) > self._max_bytes
            ):
                yield shard_keys, b"".join(lines)
                shard_keys, lines, size = [], [], 0
            shard_keys.append(key)
            lines.append(line)
            size += len(line)
        if shard_keys:
            yield shard_keys, b"".join(lines)

    async def _upload(self, lines: bytes) -> str:
        """The id of a new file at the server."""
        try:
            file = await self._client.call(
                "POST",
                "/files",
                read=_read_object,
                files={"file": ("requests.jsonl", lines, "application/jsonl")},
                data={"purpose": "batch"},
            )
        except UnknownModelError as error:
            raise self._no_batch_api(error) from None
        return str(file["id"])

    async def _create(self, shard: _Shard) -> None:
        """Make a batch of an uploaded file: one, whatever becomes of the answers to the call."""
        pause = SETTLE_SECONDS
        for attempt in range(1, CREATE_ATTEMPTS + 1):
            try:
                batch = await self._client.call(
                    "POST",
                    "/batches",
                    read=_read_object,
                    attempts=1,  # the client's own further attempts would be blind ones
                    json={
                        "input_file_id": shard.file_id,
                        "endpoint": _ENDPOINT,
                        "completion_window": "24h",
                    },
                )
                batch_id = str(batch["id"])
            except RetryableError as error:
                wait = error.wait or 0.0
                if attempt == CREATE_ATTEMPTS or wait > RETRY_SECONDS:
                    raise
                await self._sleep(max(pause, wait))
                pause = min(2 * pause, MAX_POLL_SECONDS)
                batch_id = (await self._find_batches([shard.file_id])).get(shard.file_id, "")
            except ApiError as error:
                # A clear no: there is no batch, and nobody has to look for one.
                self._state.record(file=shard.file_id, done=True)
                if isinstance(error, UnknownModelError):
                    raise self._no_batch_api(error) from None
                raise
            if batch_id:
                self._state.record(file=shard.file_id, batch=batch_id)
                under_way = [s for s in self._state.shards.values() if s.batch_id is not None]
                for other in under_way:
                    other.was_alone = len(under_way) == 1
                return

    async def _find_batches(self, file_ids: Collection[str]) -> dict[str, str]:
        """The batch that was made of each of these files, where there is one nobody knew of."""
        found: dict[str, str] = {}
        wanted = set(file_ids)
        cursor, cursors = "", {""}
        while True:
            query = f"&after={quote(cursor, safe='')}" if cursor else ""
            page = await self._get(f"/batches?limit=100{query}", _read_page, "its list of batches")
            for batch in page["data"]:
                file_id, batch_id = batch.get("input_file_id"), batch["id"]
                if file_id in wanted and batch_id not in self._state.batch_ids:
                    found[file_id] = batch_id
            cursor = page["data"][-1]["id"] if page["data"] else ""
            # A cursor that comes again: a server that takes no `after`, and has no more to show.
            if not page.get("has_more") or cursor in cursors or len(found) == len(wanted):
                return found
            cursors.add(cursor)

    async def wait(self) -> None:
        """Return when no shard is left at the server."""
        pause = FIRST_POLL_SECONDS
        while self._state.shards:
            await self._sleep(pause)
            ended = await self._poll()
            submitted = await self._submit_held(ended)
            longer = min(1.5 * pause, MAX_POLL_SECONDS)
            pause = FIRST_POLL_SECONDS if ended or submitted else longer

    async def _poll(self) -> bool:
        """Look at each batch, and harvest those that have ended; whether there were any."""
        any_ended = False
        for shard in list(self._state.shards.values()):
            if shard.batch_id is None:
                continue
            path = f"/batches/{quote(shard.batch_id, safe='')}"
            batch = await self._get(path, _read_object, f"the batch {shard.batch_id}")
            counts = _read_counts(batch)
            shard.finished = min(sum(counts), len(shard.keys))
            if batch.get("status") not in _ENDED:
                continue
            if counts[0] and not batch.get("output_file_id") and shard.late_polls < LATE_POLLS:
                shard.late_polls += 1  # the answers are paid for: the file may still come
            elif self._has_no_room(shard, batch):
                self._state.record(file=shard.file_id, batch=None)
                shard.finished = 0
            else:
                await self._end(shard, batch)
                any_ended = True
        finished = sum(shard.finished for shard in self._state.shards.values())
        finished += len(self._kept) + len(self.refused)
        self._on_poll(min(finished, self._total), self._total)
        return any_ended

    def _has_no_room(self, shard: _Shard, batch: Mapping[str, Any]) -> bool:
        """Whether it only has to wait. What an earlier run sent is rather cut anew by this one."""
        return (
            shard.file_id not in self._state.earlier
            and not _list_results(batch)
            and any(p.get("code") == "token_limit_exceeded" for p in _list_problems(batch))
        )

    async def _submit_held(self, room: bool) -> bool:
        """Whether any shard was submitted of those that found no room before.

        room: a batch of ours has ended, so that there may be some now
        """
        shards = list(self._state.shards.values())
        held = [shard for shard in shards if shard.batch_id is None]
        if not room:
            if len(held) < len(shards):
                return False  # those under way will make room
            held = held[:1]
        for shard in held:
            await self._sleep(0)
            if shard.was_alone:
                await self._split(shard)  # nothing of ours stood in its way
            else:
                await self._create(shard)
        return bool(held)

    async def _split(self, shard: _Shard) -> None:
        self._state.record(file=shard.file_id, done=True)
        if len(shard.keys) == 1:
            raise RetryableError(
                f"{self._client.address}: the queue has no room for the tokens of even one request "
                "(token_limit_exceeded), and no other batch of this job is under way; run the same "
                "command again when other batches of the account have ended"
            )
        half = (len(shard.keys) + 1) // 2
        await self.submit(shard.keys[:half])
        await self.submit(shard.keys[half:])

    async def _end(self, shard: _Shard, batch: Mapping[str, Any]) -> None:
        """Keep what a batch has brought, then put it on record as done.

        Raises what makes it pointless to go on, unless an earlier run sent the batch: much may have
        been mended since, and if not, the next batch will say so.
        """
        completions, errors = await self._harvest(shard, batch)
        if completions:
            self._keep(list(completions.items()))
        self._kept.update(completions)
        fatal = self._judge_failure(shard, batch, has_results=bool(completions or errors))
        for key, error in errors.items():
            if isinstance(error, _FATAL):
                fatal = fatal or error
            elif key in self._bodies and not self._is_worth_another(shard, error):
                limit = isinstance(error, UnsupportedLimitError)  # by either of its names
                self.refused[key] = RejectedError(str(error), error.status) if limit else error
        self._state.record(file=shard.file_id, done=True)
        if fatal and shard.file_id not in self._state.earlier:
            raise fatal

    def _is_worth_another(self, shard: _Shard, error: ApiError) -> bool:
        if isinstance(error, UnsupportedLimitError):
            return self._client.swap_limit_name(shard.limit_name)
        return isinstance(error, RetryableError)

    def _judge_failure(
        self, shard: _Shard, batch: Mapping[str, Any], *, has_results: bool
    ) -> ApiError | None:
        """What the server has against a batch as a whole, where another one would fare no better.

        has_results: it was good enough to be begun
        """
        problems = _list_problems(batch)
        if batch["status"] != "failed" or not problems:
            return None
        error = self._without_key(read_error(400, {"error": problems[0]}))
        if isinstance(error, _FATAL):
            return error
        if has_results or self._is_worth_another(shard, error):
            return None
        quoted = "; ".join(_describe_problem(p, self._client.hide) for p in problems[:3])
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        return RejectedError(
            f"{self._client.address}: the batch {batch['id']} is refused: {quoted}{more}", 400
        )

    async def _harvest(
        self, shard: _Shard, batch: Mapping[str, Any]
    ) -> tuple[dict[str, Completion], dict[str, ApiError]]:
        """What its two files say, by key; a key is in one of the results at most."""
        completions: dict[str, Completion] = {}
        errors: dict[str, ApiError] = {}
        known = set(shard.keys)
        strange = 0
        for file_id in _list_results(batch):
            path = f"/files/{quote(file_id, safe='')}/content"
            content = await self._get(path, lambda r: r.content, f"the result file {file_id}")
            for line in io.BytesIO(content):
                try:
                    key, outcome = _read_result(line, self._client.read)
                except (ValueError, KeyError, TypeError, AttributeError):
                    strange += bool(line.strip())
                    continue
                if key not in known:
                    strange += 1
                elif isinstance(outcome, Completion):
                    completions.setdefault(key, outcome)
                else:
                    errors[key] = self._without_key(outcome)
        for key in errors.keys() & completions:
            del errors[key]
        if strange:
            warnings.warn(
                f"{self._client.address}: {strange} lines of the results of batch {batch['id']} "
                "are unreadable, or answer what was not asked; they are left out",
                TwoStageWarning,
                stacklevel=2,
            )
        return completions, errors

    async def _get(self, path: str, read: Callable[[httpx.Response], Any], what: str) -> Any:
        try:
            return await self._client.call("GET", path, read=read)
        except UnknownModelError as error:
            raise RejectedError(
                f"{self._client.address} does not have {what} (status {error.status}); a batch is "
                "known only to the project whose key it was sent with: use that key, or delete "
                f"{self._state.path} to pay for its requests again",
                error.status,
            ) from None

    def _no_batch_api(self, error: ApiError) -> RejectedError:
        return RejectedError(
            f"{self._client.address} seems to have no Batch API (status {error.status}); run "
            "without --batch",
            error.status,
        )

    def _without_key(self, error: ApiError) -> ApiError:
        """Servers quote the key in their errors, here as in the answers that the client reads."""
        error.args = (self._client.hide(str(error)),)
        return error


def _write_request(key: str, body: Mapping[str, Any]) -> bytes:
    request = {"custom_id": key, "method": "POST", "url": _ENDPOINT, "body": body}
    return json.dumps(request).encode() + b"\n"


def _read_result(
    line: bytes, read: Callable[[object], Completion]
) -> tuple[str, Completion | ApiError]:
    """Raises ValueError, KeyError, TypeError or AttributeError for what is no result.

    Lines seen: `{"custom_id", "response": {"status_code", "body"}, "error": null}`, and for what
    was not begun in time `{"custom_id", "response": null, "error": {"code", "message"}}`.
    """
    fields = json.loads(line)
    key, response, error = fields["custom_id"], fields.get("response"), fields.get("error")
    if not isinstance(key, str) or not (response or error):
        raise ValueError
    if not response:
        # `batch_expired`, `batch_cancelled`: nobody's fault, like a 5xx
        return key, read_error(500, {"error": error})
    status, body = int(response["status_code"]), response.get("body")
    if not 200 <= status < 300:
        return key, read_error(status, body)
    try:
        return key, read(body)
    except ApiError as refused:
        return key, refused.with_traceback(None)  # which would hold on to the whole file


def _read_object(response: httpx.Response) -> dict[str, Any]:
    """A file or a batch. Raises ApiError where it is neither."""
    fields = _read_json(response)
    if not isinstance(fields.get("id"), str) or not fields["id"]:
        raise _read_other(fields, "the answer is neither a file nor a batch")
    return fields


def _read_page(response: httpx.Response) -> dict[str, Any]:
    """A part of the list of batches. Raises ApiError where it is none."""
    page = _read_json(response)
    batches = page.get("data")
    if not isinstance(batches, list) or not all(
        isinstance(batch, dict) and isinstance(batch.get("id"), str) for batch in batches
    ):
        raise _read_other(page, "the answer is not a list of batches")
    return page


def _read_json(response: httpx.Response) -> dict[str, Any]:
    fields = parse_json(response)
    return fields if isinstance(fields, dict) else {}


def _read_other(fields: dict[str, Any], said: str) -> ApiError:
    return read_error(200, fields) if is_error(fields) else RetryableError(said, 200)


def _read_counts(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Requests with an answer, and with an error."""
    counts = batch.get("request_counts")
    counts = counts if isinstance(counts, dict) else {}
    completed, failed = (counts.get(name) for name in ("completed", "failed"))
    return (
        completed if isinstance(completed, int) else 0,
        failed if isinstance(failed, int) else 0,
    )


def _list_results(batch: Mapping[str, Any]) -> list[str]:
    """Ids of the files with answers and with errors, as many as there are."""
    files = (batch.get("output_file_id"), batch.get("error_file_id"))
    return [file_id for file_id in files if isinstance(file_id, str) and file_id]


def _list_problems(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the server has against the batch: `code`, `message` and `line` of each."""
    errors = batch.get("errors")
    problems = errors.get("data") if isinstance(errors, dict) else errors
    return [p for p in problems if isinstance(p, dict)] if isinstance(problems, list) else []


def _describe_problem(problem: Mapping[str, Any], hide: Callable[[str], str]) -> str:
    line = f"line {problem['line']}: " if problem.get("line") else ""
    # First hidden, then cut: nobody knows half a key for one.
    message = " ".join(hide(str(problem.get("message"))).split())
    return f"{line}{message[:SHOWN]} ({problem.get('code')})"
