"""The Batch API against a fake one: nothing is lost, nothing is paid twice, whatever breaks when.

The fake checks the promise itself: a key may be in a new batch only if every earlier batch with it
has ended without an answer for it. Everything else is a case that has to end well, and well means
that each key is answered, from however many batches it took.
"""

import asyncio
import email
import itertools
import json
import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote

import httpx
import pytest

from tests.augmentation.conftest import (
    ApiServer,
    HttpRequest,
    Reply,
    default_reply,
    error,
    phrase,
)
from tests.augmentation.conftest import completion as as_completion
from twostage.augmentation import batch_api
from twostage.augmentation.batch_api import (
    CREATE_ATTEMPTS,
    LATE_POLLS,
    RESUBMISSIONS,
    SETTLE_SECONDS,
    answer_by_batches,
)
from twostage.augmentation.openai_client import (
    SHOWN,
    ApiError,
    ApiKey,
    AuthenticationError,
    Completion,
    ContentFilterError,
    ContextOverflowError,
    OpenAIClient,
    QuotaError,
    RejectedError,
    RetryableError,
    ThrottledError,
    UnknownModelError,
    chat_body,
)
from twostage.errors import TwoStageWarning, UsageError

URL = "http://localhost:1/v1"
KEYS = [f"key-{i}" for i in range(7)]
ENDED = ("completed", "expired", "cancelled", "failed")
QUOTA = error(429, "You exceeded your current quota", "insufficient_quota")
TOO_LONG = error(400, "maximum context length is 4097 tokens", "context_length_exceeded")
BUSY = error(500, "The server had an error")


class Crash(BaseException):
    """The process is gone, as far as anyone can tell: nothing may catch this."""


# ------------------------------------------------------------------------------- the fake server


def answer(key: str, body: Any = None) -> dict[str, Any]:
    return result(key, default_reply(key))


def result(key: str, reply: Reply) -> dict[str, Any]:
    """A line of an output or error file."""
    response = {"status_code": reply.status, "request_id": f"req-{key}", "body": reply.body}
    return {"id": f"line-{key}", "custom_id": key, "response": response, "error": None}


def expiry(key: str, body: Any = None, code: str = "batch_expired") -> dict[str, Any]:
    reason = {"code": code, "message": "This request could not be executed in time."}
    return {"id": f"line-{key}", "custom_id": key, "response": None, "error": reason}


@dataclass
class Plan:
    """What becomes of a batch."""

    status: str = "completed"
    answer: Callable[[str, Any], dict[str, Any] | None] = answer
    """The result of a request, by its key and body; None for none."""
    polls: int = 1
    """How often it is still under way when looked at."""
    problems: list[dict[str, Any]] = field(default_factory=list)
    junk: bytes = b""
    """At the end of the output file."""
    late: int = 0
    """How many more looks the output file takes than the status."""


def partly(*answered: str) -> Callable[[str, Any], dict[str, Any] | None]:
    """Some keys have an answer, the others expired."""
    return lambda key, body: answer(key) if key in answered else expiry(key)


class BatchApi:
    """Files and batches in memory, over any transport."""

    def __init__(self, *plans: Plan, room: int | None = None) -> None:
        self.plans = list(plans)
        """Of the next batches to be created, one each; a plain `Plan()` for all others."""
        self.room = room
        """Requests that fit into the queue."""
        self.files: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.batches: dict[str, dict[str, Any]] = {}
        """In the order of their creation; the list shows the last one first."""
        self.keys: dict[str, list[str]] = {}
        self.bodies: dict[str, dict[str, Any]] = {}
        self.log: list[tuple[str, str, dict[str, str]]] = []
        self.paid_twice: list[str] = []
        self._plan: dict[str, Plan] = {}
        self._polls: dict[str, int] = {}

    def count(self, method: str, path: str) -> int:
        return sum(m == method and p.startswith(path) for m, p, _ in self.log)

    def handle(self, request: HttpRequest) -> Reply:
        self.log.append((request.method, request.path, request.query))
        match request.method, request.path.removeprefix("/v1/").split("/"):
            case "POST", ["files"]:
                return self._upload(request)
            case "POST", ["batches"]:
                return self._create(json.loads(request.body))
            case "GET", ["batches"]:
                return self._list(request.query)
            case "GET", ["batches", batch_id] if batch_id in self.batches:
                return Reply(body=self._look(batch_id))
            case "GET", ["files", file_id, "content"] if file_id in self.files:
                return Reply(body=self.files[file_id])
        return error(404, "No such object")

    def _upload(self, request: HttpRequest) -> Reply:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        parts: Any = email.message_from_bytes(head + request.body).get_payload()
        fields = {
            part.get_param("name", header="content-disposition"): part.get_payload(decode=True)
            for part in parts
        }
        assert set(fields) == {"purpose", "file"}
        assert fields["purpose"] == b"batch"
        file_id = f"file-{len(self.files)}"
        self.files[file_id] = fields["file"]
        self.uploads.append(file_id)
        return Reply(body={"id": file_id, "object": "file", "purpose": "batch"})

    def _create(self, asked: dict[str, Any]) -> Reply:
        assert asked["endpoint"] == "/v1/chat/completions"
        assert asked["completion_window"] == "24h"
        lines = list(map(json.loads, self.files[asked["input_file_id"]].splitlines()))
        for line in lines:
            assert set(line) == {"custom_id", "method", "url", "body"}
            assert (line["method"], line["url"]) == ("POST", "/v1/chat/completions")
        keys = [line["custom_id"] for line in lines]
        assert len(set(keys)) == len(keys)
        for earlier, answered in self.keys.items():
            ended = self.batches[earlier]["status"] in ENDED
            answers = self._answers(earlier)
            self.paid_twice += [key for key in answered if key in keys and not ended]
            self.paid_twice += [key for key in answers if key in keys and ended]
        batch_id = f"batch-{len(self.batches)}"
        queued = sum(
            len(self.keys[name])
            for name, batch in self.batches.items()
            if batch["status"] not in ENDED
        )
        if self.room is not None and queued + len(keys) > self.room:
            problem = {"code": "token_limit_exceeded", "message": "Enqueued token limit reached"}
            plan = Plan("failed", lambda key, body: None, problems=[problem])
        else:
            plan = self.plans.pop(0) if self.plans else Plan()
        self.bodies |= {line["custom_id"]: line["body"] for line in lines}
        self.keys[batch_id], self._plan[batch_id], self._polls[batch_id] = keys, plan, 0
        self.batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "status": "validating",
            "input_file_id": asked["input_file_id"],
            "output_file_id": None,
            "error_file_id": None,
            "errors": None,
            "request_counts": {"total": len(keys), "completed": 0, "failed": 0},
        }
        return Reply(body=self.batches[batch_id])

    def _list(self, query: dict[str, str]) -> Reply:
        assert int(query["limit"]) == 100
        names = list(reversed(self.batches))
        first = names.index(query["after"]) + 1 if "after" in query else 0
        page = [self.batches[name] for name in names[first : first + 100]]
        return Reply(body={"object": "list", "data": page, "has_more": len(names) > first + 100})

    def _look(self, batch_id: str) -> dict[str, Any]:
        batch, plan = self.batches[batch_id], self._plan[batch_id]
        self._polls[batch_id] += 1
        over = self._polls[batch_id] - plan.polls
        if over <= 0:
            batch["status"] = "in_progress"
            return batch
        lines = [plan.answer(key, self.bodies[key]) for key in self.keys[batch_id]]
        good = [line for line in lines if line and is_answer(line)]
        bad = [line for line in lines if line and not is_answer(line)]
        batch["status"] = plan.status
        batch["request_counts"] |= {"completed": len(good), "failed": len(bad)}
        if plan.problems:
            batch["errors"] = {"object": "list", "data": plan.problems}
        if bad:
            batch["error_file_id"] = self._write(f"errors-{batch_id}", bad, b"")
        if (good or plan.junk) and over > plan.late:
            batch["output_file_id"] = self._write(f"output-{batch_id}", good[::-1], plan.junk)
        return batch

    def _answers(self, batch_id: str) -> list[str]:
        lines = [self._plan[batch_id].answer(key, self.bodies[key]) for key in self.keys[batch_id]]
        return [line["custom_id"] for line in lines if line and is_answer(line)]

    def _write(self, file_id: str, lines: Sequence[dict[str, Any]], junk: bytes) -> str:
        self.files[file_id] = "".join(f"{json.dumps(line)}\n" for line in lines).encode() + junk
        return file_id


def is_answer(line: dict[str, Any]) -> bool:
    return bool(line["response"]) and line["response"]["status_code"] == 200


# ----------------------------------------------------------------------------- the way to it, ours


class Line:
    """What is between the client and the fake, where things go wrong.

    faults: by call ("POST /v1/batches"), what happens to the next ones of that kind:
        an exception: raised before the server hears of the call
        a tuple with one: raised after the server did what was asked
        a Reply: given instead of the server's; in a tuple: given after the server did it
        None: nothing
    """

    def __init__(self, api: BatchApi, **faults: Sequence[Any]) -> None:
        self.api = api
        self.faults = {name.replace("_", " /v1/"): list(queue) for name, queue in faults.items()}
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None

    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._pass_on)

    def _pass_on(self, request: httpx.Request) -> httpx.Response:
        self.before()
        path, headers = unquote(request.url.path), dict(request.headers)
        asked = HttpRequest(
            request.method,
            path,
            dict(parse_qsl(request.url.query.decode())),
            headers,
            request.read(),
        )
        queue = self.faults.get(f"{request.method} {path}")
        fault = queue.pop(0) if queue else None
        if fault is None or isinstance(fault, tuple):
            reply = self.api.handle(asked)
        if fault is not None:
            fault = fault[0] if isinstance(fault, tuple) else fault
            if isinstance(fault, Exception):
                raise fault
            reply = fault
        self.after()
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        return httpx.Response(reply.status, headers=reply.headers, content=body)


class Kept:
    """The caller's journal: it skips what it has, as the real one's user does."""

    def __init__(self) -> None:
        self.completions: dict[str, Completion] = {}
        self.after: Callable[[], None] = lambda: None

    def __call__(self, completions: Sequence[tuple[str, Completion]]) -> None:
        for key, completion in completions:
            assert completion.content == phrase(key)
            self.completions.setdefault(key, completion)
        self.after()

    def __contains__(self, key: str) -> bool:
        return key in self.completions

    @property
    def keys(self) -> list[str]:
        return sorted(self.completions)


class Clock:
    """Time that passes only in `sleep`, which takes none."""

    def __init__(self) -> None:
        self.time = 1_000.0
        self.sleeps: list[float] = []
        self.after: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        if seconds:
            self.sleeps.append(seconds)
        self.time += seconds
        self.after()


def make_bodies(keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {key: chat_body("model", f"the text of {key}", 50) for key in keys}


def run(
    line: Line | BatchApi,
    state: Path,
    kept: Kept,
    keys: Sequence[str] = KEYS,
    *,
    clock: Clock | None = None,
    url: str = URL,
    api_key: ApiKey | None = None,
    **options: Any,
) -> dict[str, ApiError]:
    """One run of a job: asks for what is not kept, as the caller does."""
    clock = clock or Clock()
    line = Line(line) if isinstance(line, BatchApi) else line

    async def main() -> dict[str, ApiError]:
        async with OpenAIClient(
            url,
            api_key,
            transport=line.transport(),
            clock=clock,
            sleep=clock.sleep,
            jitter=lambda: 0.0,
        ) as client:
            bodies = make_bodies([key for key in keys if key not in kept])
            return await answer_by_batches(
                client, bodies, state, kept, sleep=clock.sleep, **options
            )

    return asyncio.run(main())


@pytest.fixture(scope="module", autouse=True)
def haste() -> Iterator[None]:
    """Hundreds of clients here need no certificates (20 ms to read), and no disk to survive them.

    That lines are synced, and where, is seen by the kills at each sync.
    """
    context = httpx.create_ssl_context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx, "create_ssl_context", lambda: context)
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "batches.jsonl"


@pytest.fixture
def kept() -> Kept:
    return Kept()


def read_state(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -------------------------------------------------------------------------------------- good days


def test_all_requests_are_answered_in_one_batch(state: Path, kept: Kept) -> None:
    api = BatchApi()
    assert run(api, state, kept) == {}
    assert kept.keys == KEYS
    assert api.keys == {"batch-0": KEYS}
    assert kept.completions["key-3"].prompt_tokens == 20
    assert api.bodies == make_bodies(KEYS)


def test_a_real_server_answers_the_same(server: ApiServer, state: Path, kept: Kept) -> None:
    api = BatchApi(Plan(), Plan("expired", partly("key-3", "key-4")))
    server.routes = Routes(api)
    assert run_with_sockets(server, state, kept, max_requests=3) == {}
    assert kept.keys == KEYS
    assert [len(keys) for keys in api.keys.values()] == [3, 3, 1, 1]
    assert api.paid_twice == []


class Routes(dict[tuple[str, str], Callable[[HttpRequest], Reply]]):
    """Every path leads to the fake; faults as in Line."""

    def __init__(self, api: BatchApi, faults: Sequence[Reply | None] = ()) -> None:
        self.api, self.faults = api, list(faults)

    def get(self, route: Any, default: Any = None) -> Any:
        def handle(request: HttpRequest) -> Reply:
            reply = self.api.handle(request)
            fault = None
            if route == ("POST", "/v1/batches") and self.faults:
                fault = self.faults.pop(0)
            if fault:
                fault.body = fault.body or reply.body
            return fault or reply

        return handle


def run_with_sockets(
    server: ApiServer, state: Path, kept: Kept, read_seconds: float = 30.0, **options: Any
) -> dict[str, ApiError]:
    async def main() -> dict[str, ApiError]:
        async with OpenAIClient(server.url, read_seconds=read_seconds) as client:
            bodies = make_bodies([key for key in KEYS if key not in kept])
            return await answer_by_batches(
                client, bodies, state, kept, sleep=lambda seconds: asyncio.sleep(0), **options
            )

    return asyncio.run(main())


@pytest.mark.parametrize(
    "fault",
    [Reply(reset=True), Reply(stall=True), Reply(cut_after=10), Reply(502, body=b"<html>")],
    ids=["reset", "stalled", "cut short", "502"],
)
def test_a_real_server_whose_answer_to_create_is_lost_gets_no_second_batch(
    server: ApiServer, state: Path, kept: Kept, fault: Reply
) -> None:
    api = BatchApi()
    server.routes = Routes(api, [fault])
    assert run_with_sockets(server, state, kept, read_seconds=0.3) == {}
    assert kept.keys == KEYS
    assert len(api.batches) == 1


def test_a_shard_is_full_at_its_number_of_requests(state: Path, kept: Kept) -> None:
    api = BatchApi()
    run(api, state, kept, max_requests=3)
    assert list(api.keys.values()) == [KEYS[:3], KEYS[3:6], KEYS[6:]]
    assert kept.keys == KEYS


def test_a_shard_is_full_at_its_number_of_bytes(state: Path, kept: Kept) -> None:
    run(BatchApi(), state, kept, KEYS[:2])
    api = BatchApi()
    size = len(batch_api._write_request("key-0", make_bodies(KEYS)["key-0"]))
    run(api, state.with_name("2"), Kept(), max_bytes=2 * size)
    assert list(api.keys.values()) == [KEYS[:2], KEYS[2:4], KEYS[4:6], KEYS[6:]]
    assert {len(api.files[name]) for name in api.uploads} == {2 * size, size}
    api = BatchApi()
    run(api, state.with_name("3"), Kept(), max_bytes=2 * size - 1)
    assert list(api.keys.values()) == [[key] for key in KEYS]


def test_a_request_larger_than_a_shard_travels_alone(state: Path, kept: Kept) -> None:
    api = BatchApi()
    run(api, state, kept, KEYS[:3], max_bytes=10)
    assert list(api.keys.values()) == [[key] for key in KEYS[:3]]
    assert kept.keys == KEYS[:3]


def test_shards_are_at_the_server_together(state: Path, kept: Kept) -> None:
    api = BatchApi()
    run(api, state, kept, max_requests=1)
    calls = [(method, path) for method, path, _ in api.log]
    first_look = calls.index(("GET", "/v1/batches/batch-0"))
    assert calls[:first_look].count(("POST", "/v1/batches")) == len(KEYS)


def test_nothing_to_ask_is_no_call(state: Path, kept: Kept) -> None:
    api = BatchApi()
    assert run(api, state, kept, []) == {}
    assert api.log == []
    assert not state.exists()


def test_polls_come_after_5_seconds_and_then_ever_less_often_down_to_one_a_minute(
    state: Path, kept: Kept
) -> None:
    clock = Clock()
    run(BatchApi(Plan(polls=10)), state, kept, clock=clock)
    expected = [min(5 * 1.5**n, 60) for n in range(11)]
    assert clock.sleeps == pytest.approx(expected)
    assert expected[-1] == 60


def test_the_pace_of_polls_starts_anew_when_a_batch_has_ended(state: Path, kept: Kept) -> None:
    clock = Clock()
    run(BatchApi(Plan(polls=2), Plan(polls=4)), state, kept, clock=clock, max_requests=4)
    assert clock.sleeps == pytest.approx([5, 7.5, 11.25, 5, 7.5])


def test_progress_counts_what_has_finished_at_the_server(state: Path, kept: Kept) -> None:
    seen: list[tuple[int, int]] = []
    api = BatchApi(Plan(polls=2), Plan(answer=lambda key, body: result(key, TOO_LONG), polls=1))
    run(api, state, kept, max_requests=4, on_poll=lambda *counts: seen.append(counts))
    assert seen == [(0, 7), (3, 7), (7, 7)]


def test_keys_and_texts_in_any_script_come_through(state: Path, kept: Kept) -> None:
    keys = ["ключ", "鍵 \u2028 🙂", 'a "quoted" one\n']
    run(BatchApi(), state, kept, keys)
    assert kept.keys == sorted(keys)


# --------------------------------------------------------------------------------- kill and restart


class Fuse:
    """Crashes at the n-th event."""

    def __init__(self, n: int) -> None:
        self.left = n
        self.blown = False

    def __call__(self) -> None:
        self.left -= 1
        if self.left < 0 and not self.blown:
            self.blown = True
            raise Crash

    @property
    def on(self) -> Callable[[], None]:
        return self


def lay_fuse(
    where: str, fuse: Fuse, line: Line, clock: Clock, kept: Kept, patch: pytest.MonkeyPatch
) -> None:
    match where:
        case "before a call":
            line.before = fuse.on
        case "after a call":
            line.after = fuse.on
        case "in a sleep":
            clock.after = fuse.on
        case "after keeping":
            kept.after = fuse.on
        case "line written" | "line torn":
            fsync = os.fsync

            def sync(descriptor: int) -> None:
                try:
                    fuse()
                except Crash:
                    status = os.fstat(descriptor)
                    if where == "line torn" and stat.S_ISREG(status.st_mode):
                        os.truncate(descriptor, status.st_size - 7)
                    raise
                fsync(descriptor)

            patch.setattr(os, "fsync", sync)


@pytest.mark.parametrize(
    ("where", "at_least"),
    [
        ("before a call", 20),
        ("after a call", 20),
        ("in a sleep", 8),
        ("after keeping", 4),
        ("line written", 12),
        ("line torn", 12),
    ],
)
def test_a_kill_at_any_moment_loses_nothing_and_pays_nothing_twice(
    tmp_path: Path, where: str, at_least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in itertools.count():
        # Three shards, of which one expires half done and one must wait for room.
        api = BatchApi(Plan(), Plan("expired", partly("key-3", "key-4")), room=6)
        line, clock, kept, fuse = Line(api), Clock(), Kept(), Fuse(n)
        state = tmp_path / f"{n}.jsonl"
        with monkeypatch.context() as patch:
            lay_fuse(where, fuse, line, clock, kept, patch)
            try:
                run(line, state, kept, clock=clock, max_requests=3)
            except Crash:
                run(line, state, kept, clock=clock, max_requests=3)
        assert kept.keys == KEYS, n
        assert api.paid_twice == [], n
        assert run(line, state, kept, []) == {}  # nothing is left to harvest
        if not fuse.blown:
            break
    assert n >= at_least


@pytest.mark.parametrize("seed", range(30))
def test_many_kills_in_bad_weather_lose_nothing_and_pay_nothing_twice(
    state: Path, kept: Kept, seed: int
) -> None:
    rng = random.Random(seed)
    keys = [f"key-{i:02}" for i in range(25)]

    def make_plan(number: int) -> Plan:
        def fickle(key: str, body: Any) -> dict[str, Any] | None:
            draw = random.Random(f"{seed} {key} {number}").random()
            if draw < 0.6:
                return answer(key)
            return None if draw < 0.8 else expiry(key) if draw < 0.9 else result(key, BUSY)

        return Plan(rng.choice(["completed", "expired", "cancelled"]), fickle, rng.randrange(5))

    api = BatchApi(*map(make_plan, range(500)), room=rng.choice([None, 6, 12]))
    lost: list[Any] = [httpx.ReadTimeout(""), httpx.RemoteProtocolError(""), BUSY, Reply(body=b"?")]
    weather = [rng.choice([None, None, fault, (fault,)]) for fault in rng.choices(lost, k=500)]
    line = Line(api, POST_batches=weather, GET_batches=rng.choices([None, BUSY], k=500))
    for runs in itertools.count():
        line.before = line.after = Fuse(rng.randrange(3, 40)).on
        try:
            run(line, state, kept, keys, max_requests=5)
        except (Crash, RetryableError):
            if rng.random() < 0.3:
                with state.open("ab") as file:
                    file.write(b'{"file": "file-1", "batch": "bat')
        if len(kept.keys) == len(keys):
            break
        assert runs < 300
    assert kept.keys == keys
    assert api.paid_twice == []


def test_batches_under_way_are_harvested_before_anything_is_sent(state: Path, kept: Kept) -> None:
    api, clock = BatchApi(), Clock()
    clock.after = Fuse(3).on  # when the batches are created, and not yet looked at
    with pytest.raises(Crash):
        run(api, state, kept, KEYS[:4], clock=clock, max_requests=2)
    assert len(api.batches) == 2
    calls = len(api.log)
    run(api, state, kept, KEYS, max_requests=2)
    resumed = [f"{method} {path}" for method, path, _ in api.log[calls:]]
    harvest = [f"GET /v1/batches/batch-{n}" for n in range(2)]
    harvest += [f"GET /v1/files/output-batch-{n}/content" for n in range(2)]
    assert sorted(resumed[: resumed.index("POST /v1/files")]) == sorted(harvest)
    assert list(api.keys.values()) == [KEYS[:2], KEYS[2:4], KEYS[4:6], KEYS[6:]]
    assert kept.keys == KEYS


def test_batches_of_another_job_are_harvested_too(state: Path, kept: Kept) -> None:
    api, clock = BatchApi(Plan("expired", partly("key-0"))), Clock()
    clock.after = Fuse(2).on
    with pytest.raises(Crash):
        run(api, state, kept, KEYS[:3], clock=clock)
    assert run(api, state, kept, KEYS[4:]) == {}
    assert kept.keys == ["key-0", *KEYS[4:]]  # and what expired is not asked again: nobody wants it
    assert list(api.keys.values()) == [KEYS[:3], KEYS[4:]]


def test_files_of_another_job_become_no_batches(state: Path, kept: Kept) -> None:
    api = BatchApi()
    line = Line(api, POST_batches=[Reply(429, {"retry-after": "9999"})])
    with pytest.raises(ThrottledError):
        run(line, state, kept, KEYS[:3])
    assert api.uploads == ["file-0"]
    run(api, state, kept, KEYS[4:])
    assert list(api.keys.values()) == [KEYS[4:]]


def test_a_torn_last_line_is_cut_off(state: Path, kept: Kept) -> None:
    whole = b'{"file": "file-7", "server": "%s", "limit_name": "max_tokens", "keys": ["x"]}\n'
    whole = whole % URL.encode() + b'{"file": "file-7", "done": true}\n'
    for torn in (b"{", b'{"file": "file-8", "batch": null}', b"\0\0\0"):
        state.write_bytes(whole + torn)
        run(BatchApi(), state, Kept(), [])
        assert state.read_bytes() == whole


def test_who_only_looks_leaves_a_torn_last_line_to_its_writer(state: Path) -> None:
    fields = {"file": "file-0", "server": URL, "limit_name": "max_tokens", "keys": KEYS}
    state.write_bytes(json.dumps(fields).encode() + b'\n{"file": "fi')
    before = state.read_bytes()
    assert batch_api.keys_under_way(state) == set(KEYS)
    assert state.read_bytes() == before


def test_the_key_is_in_no_answer_though_the_server_repeats_it(state: Path) -> None:
    class Anything(Kept):
        """Kept, whatever it says."""

        def __call__(self, completions: Sequence[tuple[str, Completion]]) -> None:
            self.completions.update(completions)

    key, kept = "sk-0123456789abcdef", Anything()
    api = BatchApi(Plan(answer=lambda name, body: result(name, as_completion(f"it is {key}"))))
    assert run(api, state, kept, api_key=ApiKey(key)) == {}
    assert sorted(kept.completions) == KEYS
    assert {answer.content for answer in kept.completions.values()} == {"it is [key]"}


@pytest.mark.parametrize(
    "line", ["nonsense", "[]", "{}", '{"file": "file-1", "batch": "batch_1"}', '{"file": "x"}']
)
def test_a_state_file_that_makes_no_sense_is_refused_with_its_line(
    state: Path, kept: Kept, line: str
) -> None:
    run(BatchApi(), state, kept, KEYS[:1])
    with state.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(UsageError, match=r"batches\.jsonl, line 4"):
        run(BatchApi(), state, kept)


def test_a_disk_that_is_full_leaves_no_half_line(
    state: Path, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    api = BatchApi()
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UsageError, match="No space left on device"):
        run(api, state, kept)
    assert state.read_bytes() == b""
    assert api.batches == {}  # nothing is created that is not on record
    monkeypatch.undo()
    run(api, state, kept)
    assert kept.keys == KEYS


def test_the_state_names_each_key_once_however_often_a_shard_finds_no_room(
    state: Path, kept: Kept
) -> None:
    api = BatchApi(*(Plan(polls=3) for _ in range(7)), room=1)
    run(api, state, kept, max_requests=1)
    assert len(api.batches) > 2 * len(KEYS)
    assert all(state.read_text().count(f'"{key}"') == 1 for key in KEYS)
    assert len(api.uploads) == len(KEYS)


def test_batches_of_another_server_are_not_looked_for_here(state: Path, kept: Kept) -> None:
    clock = Clock()
    clock.after = Fuse(2).on
    with pytest.raises(Crash):
        run(BatchApi(), state, kept, clock=clock)
    elsewhere = BatchApi()
    with pytest.raises(UsageError, match=f"--base-url {URL}"):
        run(elsewhere, state, kept, url="http://localhost:2/v1")
    assert elsewhere.log == []


def test_a_batch_that_the_server_does_not_know_is_not_paid_for_again(
    state: Path, kept: Kept
) -> None:
    clock = Clock()
    clock.after = Fuse(2).on
    with pytest.raises(Crash):
        run(BatchApi(), state, kept, clock=clock)
    other_project = BatchApi()
    with pytest.raises(RejectedError, match=r"does not have the batch batch-0.*batches\.jsonl"):
        run(other_project, state, kept)
    assert other_project.batches == {}


def test_cancelling_leaves_the_batches_at_the_server_and_the_state_right(
    state: Path, kept: Kept
) -> None:
    api = BatchApi(Plan(polls=5))
    started = asyncio.Event()

    async def sleep(seconds: float) -> None:
        if seconds:
            started.set()
            await asyncio.sleep(3600)

    async def main() -> None:
        async with OpenAIClient(URL, transport=Line(api).transport()) as client:
            task = asyncio.create_task(
                answer_by_batches(client, make_bodies(KEYS), state, kept, sleep=sleep)
            )
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(main())
    assert [(method, path) for method, path, _ in api.log] == [
        ("POST", "/v1/files"),
        ("POST", "/v1/batches"),
    ]
    run(api, state, kept)
    assert kept.keys == KEYS
    assert len(api.batches) == 1


# ------------------------------------------------------------------- create, and its lost answers


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ReadTimeout("nothing came"),
        httpx.RemoteProtocolError("cut"),
        Reply(500),
        Reply(409),
        Reply(body=b"not JSON"),
        Reply(body={"error": {"message": "overloaded", "code": 503}}),
    ],
    ids=["timeout", "cut", "500", "409", "not JSON", "an error under 200"],
)
@pytest.mark.parametrize("created", [True, False], ids=["created", "not created"])
def test_a_lost_answer_to_create_is_looked_up_before_another_try(
    state: Path, kept: Kept, fault: Any, created: bool
) -> None:
    api, clock = BatchApi(), Clock()
    run(Line(api, POST_batches=[(fault,) if created else fault]), state, kept, clock=clock)
    assert kept.keys == KEYS
    assert len(api.batches) == 1
    assert len(api.uploads) == 1
    assert api.count("GET", "/v1/batches") > 1
    assert clock.sleeps[0] == SETTLE_SECONDS


def test_create_waits_as_long_as_the_server_asks(state: Path, kept: Kept) -> None:
    clock = Clock()
    busy = Reply(429, {"retry-after": "45"})
    run(Line(BatchApi(), POST_batches=[busy]), state, kept, clock=clock)
    assert clock.sleeps[0] == 45
    assert kept.keys == KEYS


def test_create_is_given_up_in_the_end_and_goes_on_in_the_next_run(state: Path, kept: Kept) -> None:
    api = BatchApi()
    line = Line(api, POST_batches=[BUSY] * CREATE_ATTEMPTS)
    with pytest.raises(RetryableError, match="The server had an error"):
        run(line, state, kept)
    assert line.faults["POST /v1/batches"] == []
    run(line, state, kept)
    assert kept.keys == KEYS


def test_a_refused_create_is_forgotten_so_that_the_next_run_is_free(
    state: Path, kept: Kept
) -> None:
    api = BatchApi()
    line = Line(api, POST_batches=[error(400, "Your plan has no batches", "invalid_plan")])
    with pytest.raises(RejectedError, match="Your plan has no batches"):
        run(line, state, kept)
    assert read_state(state)[-1] == {"file": "file-0", "done": True}
    run(line, state, kept)
    assert api.count("GET", "/v1/batches") == api.count("GET", "/v1/batches/")  # nobody looks
    assert kept.keys == KEYS


def test_the_search_for_a_batch_goes_through_all_pages(state: Path, kept: Kept) -> None:
    api = BatchApi()
    line = Line(api)
    line.after = Fuse(1).on  # the answer to create
    with pytest.raises(Crash):
        run(line, state, kept)
    for number in range(250):  # of other people, and all of them newer
        api.batches[f"other {number}/&?"] = {"id": f"other {number}/&?", "input_file_id": "x"}
    run(api, state, kept)
    assert kept.keys == KEYS
    assert len(api.keys) == 1
    pages = [query for method, path, query in api.log if path == "/v1/batches" and method == "GET"]
    assert [page.get("after") for page in pages] == [None, "other 150/&?", "other 50/&?"]


def test_a_list_of_batches_that_never_ends_is_left(state: Path, kept: Kept) -> None:
    api = BatchApi()
    page = Reply(body={"data": [{"id": "other", "input_file_id": "x"}], "has_more": True})
    line = Line(api, POST_batches=[BUSY], GET_batches=[page] * 2)
    run(line, state, kept)
    assert line.faults["GET /v1/batches"] == []
    assert kept.keys == KEYS


@pytest.mark.parametrize("call", ["POST_files", "POST_batches"])
def test_a_server_without_a_batch_api_is_told_apart(state: Path, kept: Kept, call: str) -> None:
    with pytest.raises(RejectedError, match=r"no Batch API \(status 404\); run without --batch"):
        run(Line(BatchApi(), **{call: [error(404, "Not Found")]}), state, kept)


def test_uploads_and_looks_and_downloads_are_simply_repeated(state: Path, kept: Kept) -> None:
    api, cut = BatchApi(), httpx.RemoteProtocolError("cut")
    line = Line(api, POST_files=[(cut,), BUSY, Reply(body=b"?")])
    line.faults["GET /v1/batches/batch-0"] = [BUSY, cut, Reply(body={"id": 1})]
    line.faults["GET /v1/files/output-batch-0/content"] = [cut, BUSY]
    run(line, state, kept)
    assert kept.keys == KEYS
    assert len(api.batches) == 1
    assert api.batches["batch-0"]["input_file_id"] == api.uploads[-1]


# ----------------------------------------------------------------------------- how batches can end


@pytest.mark.parametrize("status", ["completed", "expired", "cancelled", "failed"])
@pytest.mark.parametrize("left_out", [expiry, lambda key, body: None], ids=["as errors", "silent"])
def test_what_a_batch_leaves_is_sent_again_and_what_it_brought_is_kept(
    state: Path, kept: Kept, status: str, left_out: Callable[..., Any]
) -> None:
    problems = [{"code": "server_gone", "message": "half way"}] if status == "failed" else []
    halfway = Plan(
        status, lambda k, b: answer(k) if k < "key-3" else left_out(k, b), problems=problems
    )
    api = BatchApi(halfway)
    assert run(api, state, kept) == {}
    assert list(api.keys.values()) == [KEYS, KEYS[3:]]
    assert kept.keys == KEYS


def test_what_never_comes_is_sent_again_three_times(state: Path, kept: Kept) -> None:
    api = BatchApi(*(Plan(answer=lambda key, body: result(key, BUSY)) for _ in range(9)))
    assert run(api, state, kept, KEYS[:2]) == {}
    assert list(api.keys.values()) == [KEYS[:2]] * (1 + RESUBMISSIONS)
    assert kept.keys == []
    assert run(api, state, kept, []) == {}


@pytest.mark.parametrize(
    "problems", [[], [{"code": None, "message": "Unknown: max_completion_tokens"}]]
)
def test_a_batch_that_failed_for_nothing_final_is_sent_again(
    state: Path, kept: Kept, problems: list[dict[str, Any]]
) -> None:
    api = BatchApi(Plan("failed", lambda key, body: None, problems=problems))
    assert run(api, state, kept) == {}
    assert kept.keys == KEYS
    assert ("max_tokens" in api.bodies["key-0"]) == bool(problems)


def test_a_batch_that_is_refused_says_why_and_leaves_the_next_run_free(
    state: Path, kept: Kept
) -> None:
    problems = [
        {"code": "invalid_json_line", "message": "This line is\nnot parseable.", "line": n}
        for n in range(1, 6)
    ]
    api = BatchApi(Plan("failed", lambda key, body: None, problems=problems), Plan())
    quoted = r"batch-0 is refused: line 1: This line is not parseable\. \(invalid_json_line\); "
    with pytest.raises(RejectedError, match=f"{quoted}line 2.*; and 2 more"):
        run(api, state, kept)
    run(api, state, kept)
    assert kept.keys == KEYS


@pytest.mark.parametrize(
    ("code", "kind"),
    [("billing_hard_limit_reached", QuotaError), ("model_not_found", UnknownModelError)],
)
def test_what_no_batch_can_mend_is_raised_once_its_answers_are_kept(
    state: Path, kept: Kept, code: str, kind: type[ApiError]
) -> None:
    problems = [{"code": code, "message": "so it is"}]
    api = BatchApi(Plan("failed", partly("key-1"), problems=problems))
    with pytest.raises(kind, match="so it is"):
        run(api, state, kept)
    assert kept.keys == ["key-1"]


def test_an_output_file_may_come_later_than_the_end(state: Path, kept: Kept) -> None:
    api = BatchApi(Plan(late=LATE_POLLS))
    run(api, state, kept)
    assert len(api.batches) == 1
    assert kept.keys == KEYS


def test_an_output_file_that_never_comes_is_not_waited_for_forever(state: Path, kept: Kept) -> None:
    api = BatchApi(Plan(late=LATE_POLLS + 1))
    run(api, state, kept)
    assert len(api.batches) == 2
    assert kept.keys == KEYS


def test_a_result_file_that_is_gone_stops_the_job_and_stays_on_record(
    state: Path, kept: Kept
) -> None:
    api = BatchApi()
    line = Line(api)
    line.faults["GET /v1/files/output-batch-0/content"] = [error(404, "No such File")]
    with pytest.raises(RejectedError, match="does not have the result file output-batch-0"):
        run(line, state, kept)
    run(line, state, kept)  # it was a moment's weakness
    assert kept.keys == KEYS
    assert len(api.batches) == 1


# ------------------------------------------------------------------------- no room for the tokens


def test_shards_that_find_no_room_wait_for_the_others(state: Path, kept: Kept) -> None:
    api = BatchApi(*(Plan(polls=4) for _ in range(3)), room=3)
    assert run(api, state, kept, max_requests=3) == {}
    assert kept.keys == KEYS
    assert len(api.uploads) == 3  # none is cut, none is sent twice
    assert api.paid_twice == []
    reached = [keys for name, keys in api.keys.items() if api.batches[name]["status"] != "failed"]
    assert reached == [KEYS[:3], KEYS[3:6], KEYS[6:]]


def test_a_shard_too_large_for_the_queue_is_halved_until_it_fits(state: Path, kept: Kept) -> None:
    api = BatchApi(room=2)
    assert run(api, state, kept) == {}
    assert kept.keys == KEYS
    assert api.paid_twice == []
    reached = [keys for name, keys in api.keys.items() if api.batches[name]["status"] != "failed"]
    assert sorted(key for keys in reached for key in keys) == KEYS
    assert max(map(len, reached)) == 2


def test_waiting_for_room_is_no_resubmission(state: Path, kept: Kept) -> None:
    api = BatchApi(*(Plan(polls=3) for _ in range(20)), room=1)
    keys = [f"key-{i:02}" for i in range(20)]
    assert run(api, state, kept, keys, max_requests=1) == {}
    assert kept.keys == keys


def test_no_room_for_even_one_request_is_an_error(state: Path, kept: Kept) -> None:
    api = BatchApi(room=0)
    with pytest.raises(RetryableError, match="token_limit_exceeded"):
        run(api, state, kept)
    api.room = None
    assert run(api, state, kept) == {}
    assert kept.keys == KEYS


def test_what_found_no_room_in_an_earlier_run_is_sent_again_by_this_one(
    state: Path, kept: Kept
) -> None:
    api, clock = BatchApi(room=0), Clock()
    clock.after = Fuse(2).on
    with pytest.raises(Crash):
        run(api, state, kept, clock=clock)
    api.room = None
    assert run(api, state, kept) == {}
    assert kept.keys == KEYS


def test_what_found_no_room_in_another_job_is_not_sent_again(state: Path, kept: Kept) -> None:
    api, clock = BatchApi(room=0), Clock()
    clock.after = Fuse(2).on
    with pytest.raises(Crash):
        run(api, state, kept, KEYS[:3], clock=clock)
    api.room = None
    assert run(api, state, kept, KEYS[4:]) == {}
    assert list(api.keys.values()) == [KEYS[:3], KEYS[4:]]


# ---------------------------------------------------------------------------- results line by line


def refuse(reply: Reply) -> Callable[[str, Any], dict[str, Any]]:
    return lambda key, body: result(key, reply) if key == "key-2" else answer(key)


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (TOO_LONG, ContextOverflowError),
        (error(400, "filtered", "content_filter"), ContentFilterError),
        (error(400, "temperature is out of range"), RejectedError),
        (error(422, "what is this?", shape="detail"), RejectedError),
    ],
    ids=["too long", "filtered", "refused", "refused otherwise"],
)
def test_a_refusal_of_one_request_is_returned(
    state: Path, kept: Kept, reply: Reply, kind: type[ApiError]
) -> None:
    api = BatchApi(Plan(answer=refuse(reply)))
    refused = run(api, state, kept)
    assert {key: type(error) for key, error in refused.items()} == {"key-2": kind}
    assert kept.keys == [key for key in KEYS if key != "key-2"]
    assert len(api.batches) == 1


@pytest.mark.parametrize(
    "line",
    [
        result("key-2", BUSY),
        result("key-2", error(429, "slow down", "rate_limit_exceeded")),
        result("key-2", Reply(body={"no": "completion"})),
        result("key-2", Reply(body={"error": {"message": "overloaded", "code": 503}})),
        expiry("key-2"),
        expiry("key-2", code="batch_cancelled"),
        expiry("key-2", code="request_timeout"),
    ],
    ids=["500", "429", "no completion", "error under 200", "expired", "cancelled", "timeout"],
)
def test_what_may_go_better_is_sent_again(state: Path, kept: Kept, line: dict[str, Any]) -> None:
    api = BatchApi(Plan(answer=lambda key, body: line if key == "key-2" else answer(key)))
    assert run(api, state, kept) == {}
    assert list(api.keys.values()) == [KEYS, ["key-2"]]
    assert kept.keys == KEYS


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (QUOTA, QuotaError),
        (error(401, "Incorrect API key"), AuthenticationError),
        (error(404, "no such model", "model_not_found"), UnknownModelError),
    ],
    ids=["quota", "key", "model"],
)
def test_what_no_request_can_pass_is_raised_once_all_is_kept(
    state: Path, kept: Kept, reply: Reply, kind: type[ApiError]
) -> None:
    api = BatchApi(Plan(answer=refuse(reply)))
    with pytest.raises(kind):
        run(api, state, kept)
    assert kept.keys == [key for key in KEYS if key != "key-2"]
    run(api, state, kept)  # once it is mended
    assert list(api.keys.values()) == [KEYS, ["key-2"]]


def test_an_empty_purse_of_an_earlier_run_does_not_stop_this_one(state: Path, kept: Kept) -> None:
    api, clock = BatchApi(Plan(answer=refuse(QUOTA))), Clock()
    clock.after = Fuse(2).on
    with pytest.raises(Crash):
        run(api, state, kept, clock=clock)
    assert run(api, state, kept) == {}
    assert list(api.keys.values()) == [KEYS, ["key-2"]]
    assert kept.keys == KEYS


def know_only(name: str | None) -> Callable[[str, Any], dict[str, Any]]:
    """A model that knows the limit on answers by one name, or by none."""

    def reply(key: str, body: Any) -> dict[str, Any]:
        if name is not None and name in body:
            return answer(key)
        unknown = next(iter(set(body) - {"model", "messages"}))
        said = f"'{unknown}' is not supported; use neither it nor max_completion_tokens"
        return result(key, error(400, said, "unsupported_parameter"))

    return reply


def test_a_limit_by_its_other_name_is_sent_once_more_for_all_shards(
    state: Path, kept: Kept
) -> None:
    api = BatchApi(*(Plan(answer=know_only("max_tokens")) for _ in range(9)))
    assert run(api, state, kept, max_requests=4) == {}
    assert list(api.keys.values()) == [KEYS[:4], KEYS[4:]] * 2
    assert kept.keys == KEYS
    assert api.bodies["key-0"]["max_tokens"] == 50


def test_a_limit_by_no_name_is_a_refusal(state: Path, kept: Kept) -> None:
    api = BatchApi(*(Plan(answer=know_only(None)) for _ in range(9)))
    refused = run(api, state, kept, KEYS[:1])
    assert {key: type(error) for key, error in refused.items()} == {"key-0": RejectedError}
    assert len(api.batches) == 2


def test_lines_that_make_no_sense_are_left_out_with_one_warning(state: Path, kept: Kept) -> None:
    junk = [
        b"nonsense",
        b'{"custom_id": "key-5"',
        b"[]",
        b"null",
        b'{"custom_id": "key-6"}',
        b'{"custom_id": ["key-6"], "response": {"status_code": 200}}',
        b'{"custom_id": "key-6", "response": "none"}',
        b"\xff\xfe",
        json.dumps(answer("of somebody else")).encode(),
    ]
    plan = Plan(answer=partly(*KEYS[:5]), junk=b"\n\n".join(junk))
    api = BatchApi(plan)
    with pytest.warns(TwoStageWarning, match="9 lines of the results of batch batch-0") as caught:
        assert run(api, state, kept) == {}
    assert len(caught) == 1
    assert list(api.keys.values()) == [KEYS, KEYS[5:]]
    assert kept.keys == KEYS


def test_an_answer_counts_more_than_an_error_and_the_first_one_counts(
    state: Path, kept: Kept
) -> None:
    again = answer("key-0")
    again["response"]["body"]["choices"][0]["message"]["content"] = "another"
    also_an_error = result("key-1", TOO_LONG)
    plan = Plan(junk="".join(f"{json.dumps(x)}\n" for x in (again, also_an_error)).encode())
    api = BatchApi(plan)
    assert run(api, state, kept) == {}
    assert kept.keys == KEYS
    assert len(api.batches) == 1


def test_the_key_is_in_no_error_though_the_server_quotes_it(state: Path, kept: Kept) -> None:
    secret = "sk-proj-Zq3vT8xN1mKfWc6Ry0Lh"
    refusal = error(400, f"the key {secret} may not do this")
    problems = [
        {"code": "invalid", "message": f"{'x' * before} {secret} may not do this"}
        for before in (5, SHOWN - 20)
    ]
    api = BatchApi(
        Plan(answer=refuse(refusal)),
        Plan("failed", lambda key, body: None, problems=problems),
    )
    refused = run(api, state, kept, api_key=ApiKey(secret))
    assert "[key]" in str(refused["key-2"])
    with pytest.raises(RejectedError) as caught:
        run(api, state, Kept(), api_key=ApiKey(secret))
    assert "[key]" in str(caught.value)
    assert secret[:10] not in f"{refused} {caught.value} {state.read_text()}"


def test_results_that_cannot_be_kept_stay_on_record(state: Path, kept: Kept) -> None:
    api = BatchApi()

    def full() -> None:
        kept.completions.clear()
        raise UsageError("cannot write: No space left on device")

    kept.after = full
    with pytest.raises(UsageError):
        run(api, state, kept)
    kept.after = lambda: None
    run(api, state, kept)
    assert kept.keys == KEYS
    assert len(api.batches) == 1
