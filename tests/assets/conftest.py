"""A real HTTP server on this machine that can misbehave in the ways that servers do."""

import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

Answer = Callable[[BaseHTTPRequestHandler], None]


class LoopbackServer:
    """Answers by path; remembers each request as (method, path, headers)."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.answers: dict[str, Answer] = {}
        """By path, without the query; `""` is for all others."""
        self.errors: list[BaseException | None] = []
        self.closing = threading.Event()
        """Set at the end of a test, for answers that stall."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.requests.append((self.command, self.path, dict(self.headers)))
                path = self.path.partition("?")[0]
                answer = owner.answers.get(path) or owner.answers.get("") or not_found
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *args: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *args: object) -> None:
                error = sys.exception()
                if not isinstance(error, ConnectionError):  # a client may have heard enough
                    owner.errors.append(error)

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def answer(
        self,
        path: str,
        body: bytes = b"",
        *,
        status: int = 200,
        kind: str = "application/octet-stream",
        **headers: str,
    ) -> str:
        """The same answer to every request; returns the address."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            send(handler, status, body, {"Content-Type": kind, **with_dashes(headers)})

        self.answers[path] = answer
        return self.url + path

    def file(
        self,
        path: str,
        body: bytes,
        *,
        etag: str | None = '"v1"',
        modified: str | None = None,
        cuts: tuple[int, ...] = (),
        ranges: bool = True,
        heeds_if_range: bool = True,
        content_range: str | None = None,
        length: bool = True,
        kind: str = "application/octet-stream",
    ) -> str:
        """A file as a good server has it, or not so good; returns the address.

        cuts: bytes after which the first answers break off, one answer each
        ranges: whether Range is heeded at all
        heeds_if_range: whether Range is left aside when If-Range names another version
        content_range: said in place of the true one
        length: whether Content-Length is sent
        """
        left = list(cuts)

        def answer(handler: BaseHTTPRequestHandler) -> None:
            headers = {"Content-Type": kind}
            headers |= {"ETag": etag} if etag else {}
            headers |= {"Last-Modified": modified} if modified else {}
            asked = handler.headers["Range"] if ranges else None
            condition = handler.headers["If-Range"]
            if asked and condition and heeds_if_range and condition not in (etag, modified):
                asked = None
            status, rest = 200, body
            if asked:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                if start >= len(body):
                    send(handler, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
                    return
                status, rest = 206, body[start:]
                place = f"bytes {start}-{len(body) - 1}/{len(body)}"
                headers["Content-Range"] = content_range or place
            cut = left.pop(0) if left else None
            send(handler, status, rest, headers, cut=cut, length=length)

        self.answers[path] = answer
        return self.url + path


def send(
    handler: BaseHTTPRequestHandler,
    status: int,
    body: bytes,
    headers: dict[str, str],
    *,
    cut: int | None = None,
    length: bool = True,
) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    if length:
        handler.send_header("Content-Length", str(len(body)))
    else:
        handler.send_header("Connection", "close")
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body[:cut])
    if cut is not None or not length:
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_WR)


def not_found(handler: BaseHTTPRequestHandler) -> None:
    send(handler, 404, b"", {})


def with_dashes(headers: dict[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    server = LoopbackServer()
    yield server
    server.close()
    assert server.errors == []


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """Straight to the server, whatever proxy the machine has; impatient."""
    with httpx.Client(trust_env=False, timeout=5) as client:
        yield client


@pytest.fixture
def slept() -> list[float]:
    """`slept.append` is a `sleep` that does not sleep."""
    return []
