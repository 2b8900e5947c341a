"""An API server on this machine, with real sockets, that misbehaves in the ways that servers do;
and time that passes at once, for what has no sockets."""

import asyncio
import hashlib
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import parse_qsl, unquote

import pytest

T = TypeVar("T")

WORDS = (
    "amber apple autumn bright bitter butter calm candle clever copper crisp dance dawn deep dusty "
    "eager early empty faint fancy fever gentle ginger golden happy harbour hollow idle ivory "
    "jolly jumpy kindly kitten lantern lazy lemon marble meadow merry narrow noble nutmeg olive "
    "orange over paper pepper plain quick quiet rapid ripple rusty silent silver sugar tender "
    "timber tulip under velvet violet warm willow"
)


@dataclass
class Reply:
    """What the server answers, and what goes wrong while it does."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: object = b""
    """Bytes as they are; anything else as JSON."""
    delay: float | None = None
    """Seconds before the answer; None is the server's own delay."""
    stall: bool = False
    """No answer, for as long as the client waits and the server lives."""
    cut_after: int | None = None
    """The whole Content-Length is declared, but the connection closed after so many bytes."""
    reset: bool = False
    """The connection is aborted without an answer."""
    close: bool = False
    """The connection is closed after the answer, unannounced."""

    @property
    def is_good(self) -> bool:
        """Whether a client that reads it has a chat completion."""
        whole = not self.stall and not self.reset and self.cut_after is None
        return whole and self.status == 200 and isinstance(self.body, dict) and _is_good(self.body)


@dataclass
class HttpRequest:
    method: str
    path: str
    """Without the query."""
    query: dict[str, str]
    headers: dict[str, str]
    """By name in lower case."""
    body: bytes


@dataclass
class Call:
    """A chat call as it was received."""

    request_id: str
    body: Any
    headers: dict[str, str]
    at: float
    """Of `time.monotonic`."""
    path: str
    query: dict[str, str]


Answer: TypeAlias = Callable[[str, Any], Reply]
"""From the request id and the parsed body."""


class ApiServer:
    """An OpenAI-compatible server. All that is public may be set while it runs."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        """Each chat call, in the order of arrival, whatever became of it."""
        self.answered: Counter[str] = Counter()
        """Completions written whole to a client that had not yet gone, by request id."""
        self.connections = 0
        self.max_concurrent = 0
        """Most chat calls in progress at once."""
        self.delay = 0.0
        """Seconds before each answer to a chat call."""
        self.script: list[Reply | Answer] = []
        """Answers to the next chat calls, one each; `reply` gives all others."""
        self.reply: Answer = default_reply
        self.routes: dict[tuple[str, str], Callable[[HttpRequest], Reply]] = {}
        """By method and whole path (`/v1/files`), without the query; before the chat calls."""
        self.errors: list[BaseException] = []
        """Of this server itself, or of the functions that a test gave it."""
        self._in_progress = 0
        self._connected: set[asyncio.Task[None]] = set()
        started: list[int] = []
        ready = threading.Event()

        def run() -> None:
            asyncio.run(self._serve(started, ready))

        self._thread = threading.Thread(target=run, name="ApiServer", daemon=True)
        self._thread.start()
        ready.wait()
        self.url = f"http://127.0.0.1:{started[0]}/v1"

    def close(self) -> None:
        """Hang up on everyone and end the thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    async def _serve(self, started: list[int], ready: threading.Event) -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        listener = await asyncio.start_server(self._converse, "127.0.0.1", 0, backlog=1024)
        started.append(listener.sockets[0].getsockname()[1])
        ready.set()
        await self._closing.wait()
        listener.close()
        await asyncio.sleep(0)  # connections that were just accepted get their task
        for task in self._connected:
            task.cancel()
        await asyncio.gather(*self._connected, return_exceptions=True)
        await asyncio.sleep(0)  # aborted transports close their sockets in the next turn

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """All requests of one connection."""
        task = asyncio.current_task()
        assert task
        self._connected.add(task)
        self.connections += 1
        try:
            while await self._answer_one(reader, writer):
                pass
            writer.close()
            await writer.wait_closed()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        except asyncio.CancelledError:
            pass  # this server closes; streams would log the cancellation as an error
        except Exception as error:
            self.errors.append(error)
        finally:
            writer.transport.abort()
            self._connected.discard(task)

    async def _answer_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        assert "transfer-encoding" not in headers, "a body of unknown length"
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        path, _, query = target.partition("?")
        request = HttpRequest(method, unquote(path), dict(parse_qsl(query)), headers, body)
        route = self.routes.get((method, request.path))
        if not route and method == "POST" and request.path.endswith("/chat/completions"):
            self._in_progress += 1
            self.max_concurrent = max(self.max_concurrent, self._in_progress)
            try:
                return await self._answer_chat(request, reader, writer)
            finally:
                self._in_progress -= 1
        reply = route(request) if route else error(404, f"Invalid URL ({method} {request.path})")
        return await self._send(reply, reply.delay or 0, reader, writer)

    async def _answer_chat(
        self, request: HttpRequest, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        request_id = request.headers.get("x-client-request-id", "")
        body = json.loads(request.body)
        now = time.monotonic()
        self.calls.append(Call(request_id, body, request.headers, now, request.path, request.query))
        answer = self.script.pop(0) if self.script else self.reply
        reply = answer if isinstance(answer, Reply) else answer(request_id, body)
        delay = self.delay if reply.delay is None else reply.delay
        return await self._send(reply, delay, reader, writer, request_id)

    async def _send(
        self,
        reply: Reply,
        delay: float,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        chat_id: str | None = None,
    ) -> bool:
        """Raises ConnectionError where the client is known to have gone."""
        if delay:
            await asyncio.sleep(delay)
        if reply.stall:
            await reader.read()  # until the client hangs up
            return False
        if reply.reset:
            no_lingering = struct.pack("ii", 1, 0)  # closing then sends RST, not FIN
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_lingering)
            return False
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        lines = [f"{name}: {value}\r\n" for name, value in (headers | reply.headers).items()]
        head = f"HTTP/1.1 {reply.status} {_phrase(reply.status)}\r\n{''.join(lines)}\r\n"
        if chat_id is not None and reply.is_good and not reader.at_eof():
            self.answered[chat_id] += 1  # before the client can have it, and a test looks
        writer.write(head.encode("latin-1") + body[: reply.cut_after])
        await writer.drain()
        return reply.cut_after is None and not reply.close


def completion(
    text: str | None,
    finish_reason: str | None = "stop",
    refusal: str | None = None,
    usage: tuple[int, int] | None = (10, 5),
    **extra: object,
) -> Reply:
    """A chat completion.

    usage: tokens of the prompt and of the answer; None leaves them out
    extra: further fields of the body, or other values for its own
    """
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body: dict[str, object] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "model",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }
    if usage:
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        body["usage"] = dict(zip(names, (*usage, sum(usage)), strict=True))
    return Reply(body=body | extra)


def default_reply(request_id: str, body: object = None) -> Reply:
    """A pure function of the request id."""
    text = phrase(request_id)
    return completion(text, usage=(20, len(text.split())))


def phrase(request_id: str) -> str:
    """Four to seven words."""
    digest, words = hashlib.sha256(request_id.encode()).digest(), WORDS.split()
    return " ".join(words[byte % len(words)] for byte in digest[1 : 5 + digest[0] % 4])


def error(
    status: int,
    message: str,
    code: str | int | None = None,
    type: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
    shape: Literal["openai", "flat", "string", "detail"] = "openai",
) -> Reply:
    """An error as OpenAI words it, older vLLM, Ollama, or FastAPI."""
    fields = {"message": message, "type": type, "param": param, "code": code}
    body: dict[str, object]
    match shape:
        case "openai":
            body = {"error": fields}
        case "flat":
            body = {"object": "error", **fields}
        case "string":
            body = {"error": message}
        case "detail":
            body = {"detail": message}
    return Reply(status, dict(headers or {}), body)


def _is_good(body: dict[str, object]) -> bool:
    return bool(body.get("choices")) and not body.get("error")


def _phrase(status: int) -> str:
    return HTTPStatus(status).phrase if status in set(HTTPStatus) else "Unknown"


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing is left to do but to wait, time jumps to the end of the wait."""

    def __init__(self) -> None:
        super().__init__()
        self._time = 0.0
        selector = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def select_at_once(timeout: float | None = None) -> Any:
            self._time += timeout or 0
            return select(0)

        selector.select = select_at_once

    def time(self) -> float:
        return self._time


def run_in_virtual_time(main: Coroutine[Any, Any, T]) -> T:
    """As `asyncio.run`, from time 0; the clock is `asyncio.get_running_loop().time`. No sockets."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """Reached directly, whatever proxy the machine has."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = ApiServer()
    yield server
    server.close()
    assert server.errors == []
