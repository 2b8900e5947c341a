"""Downloads from a real server that misbehaves: bytes, requests and messages."""

import errno
import hashlib
import io
import os
import random
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import pytest

from twostage.assets.download import ATTEMPTS, MAX_REDIRECTS, WebPageError, download
from twostage.errors import DownloadError, UsageError

BODY = random.Random(0).randbytes(100_000)
OTHER = random.Random(1).randbytes(100_000)  # of the same size: only the ETag tells them apart


@pytest.fixture
def get(client: httpx.Client, slept: list[float], tmp_path: Path) -> Callable[..., bytes]:
    """Downloads into `tmp_path/data.bin` and returns what is there then."""

    def get(url: str, **settings: Any) -> bytes:
        path = tmp_path / "data.bin"
        given = {"max_bytes": 1_000_000, "client": client, "sleep": slept.append}
        download(url, path, **{**given, **settings})
        return path.read_bytes()

    return get


def ranges(server: Any) -> list[str | None]:
    return [headers.get("Range") for _, _, headers in server.requests]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refusal(get: Callable[..., bytes], url: str, **settings: Any) -> str:
    """The message of a DownloadError: one sentence."""
    with pytest.raises(DownloadError) as caught:
        get(url, **settings)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    return str(caught.value)


def answering(handler: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(handler))


@pytest.mark.parametrize("length", [True, False])
@pytest.mark.parametrize("body", [b"", b"x", BODY])
def test_a_file_arrives_byte_for_byte_and_nothing_else_is_left(
    server: Any, get: Any, tmp_path: Path, body: bytes, length: bool
) -> None:
    assert get(server.file("/a", body, length=length)) == body
    assert files(tmp_path) == ["data.bin"]
    assert len(server.requests) == 1
    assert server.requests[0][2]["Accept-Encoding"] == "identity"


def test_folders_on_the_way_are_made_and_an_old_file_is_replaced(
    server: Any, client: httpx.Client, tmp_path: Path
) -> None:
    path = tmp_path / "a" / "b" / "data.bin"
    for body in (BODY, OTHER):
        download(server.file("/a", body), path, max_bytes=1_000_000, client=client)
        assert path.read_bytes() == body


def test_a_cut_connection_is_resumed_where_it_stopped(
    server: Any, get: Any, slept: list[float], tmp_path: Path
) -> None:
    url = server.file("/a", BODY, cuts=(30_000, 20_000))
    assert get(url, sha256=hashlib.sha256(BODY).hexdigest()) == BODY
    assert ranges(server) == [None, "bytes=30000-", "bytes=50000-"]
    assert [headers.get("If-Range") for _, _, headers in server.requests[1:]] == ['"v1"'] * 2
    assert slept == [1, 2]
    assert files(tmp_path) == ["data.bin"]


def test_attempts_are_bounded_and_the_next_command_goes_on(
    server: Any, get: Any, slept: list[float], tmp_path: Path
) -> None:
    url = server.file("/a", BODY, cuts=(10_000,) * ATTEMPTS)
    said = refusal(get, url)
    assert "cut the connection" in said
    assert "check the network and run the command again" in said
    assert len(server.requests) == ATTEMPTS
    assert len(slept) == ATTEMPTS - 1
    assert (tmp_path / "data.bin.partial").read_bytes() == BODY[: ATTEMPTS * 10_000]
    assert not (tmp_path / "data.bin").exists()

    assert get(url) == BODY
    assert ranges(server)[ATTEMPTS:] == [f"bytes={ATTEMPTS * 10_000}-"]


def test_ctrl_c_keeps_what_came(server: Any, get: Any, tmp_path: Path) -> None:
    class Interrupted(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield BODY[:70_000]
            raise KeyboardInterrupt

    headers = {"ETag": '"v1"', "Content-Length": str(len(BODY))}
    url = server.file("/a", BODY)
    with (
        answering(
            lambda request: httpx.Response(200, headers=headers, stream=Interrupted())
        ) as client,
        pytest.raises(KeyboardInterrupt),
    ):
        get(url, client=client)
    assert (tmp_path / "data.bin.partial").read_bytes() == BODY[:70_000]
    assert get(url) == BODY
    assert ranges(server) == ["bytes=70000-"]


def test_a_server_that_knows_no_ranges_sends_all_of_it_again(server: Any, get: Any) -> None:
    assert get(server.file("/a", BODY, cuts=(30_000,), ranges=False)) == BODY
    assert ranges(server) == [None, "bytes=30000-"]


@pytest.mark.parametrize(
    ("then", "asked"),
    [
        ({"etag": '"v2"'}, [None, "bytes=30000-"]),
        ({"etag": '"v2"', "heeds_if_range": False}, [None, "bytes=30000-", None]),
        ({"etag": None, "heeds_if_range": False}, [None, "bytes=30000-", None]),
        ({"content_range": "bytes 29999-99999/100000"}, [None, "bytes=30000-", None]),
        ({"content_range": "bytes 30000-99999/100001"}, [None, "bytes=30000-", None]),
        ({"content_range": "bytes 30000-89999/100000"}, [None, "bytes=30000-", None]),
        ({"content_range": "bytes 30000-100000/100001"}, [None, "bytes=30000-", None]),
        ({"content_range": "bytes 30000-99999/*"}, [None, "bytes=30000-", None]),
        ({"content_range": "lines 1-2/3"}, [None, "bytes=30000-", None]),
    ],
)
def test_two_versions_are_never_spliced(
    server: Any, get: Any, then: dict[str, Any], asked: list[str | None]
) -> None:
    url = server.file("/a", BODY, cuts=(30_000,))
    first = server.answers["/a"]

    def change(handler: BaseHTTPRequestHandler) -> None:
        first(handler)
        server.file("/a", OTHER, **then)

    server.answers["/a"] = change
    assert get(url) == OTHER
    assert ranges(server) == asked


def test_what_came_whole_before_a_kill_is_not_asked_for_again(
    server: Any, get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    url = server.file("/a", BODY)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            get(url)
    assert not (tmp_path / "data.bin").exists()
    assert get(url) == BODY
    assert len(server.requests) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.bin"]


def test_a_file_that_became_shorter_is_downloaded_again(server: Any, get: Any) -> None:
    url = server.file("/a", BODY, cuts=(10_000,) * ATTEMPTS)
    refusal(get, url)
    server.requests.clear()
    server.file("/a", OTHER[:20_000], heeds_if_range=False)  # so it answers 416
    assert get(url) == OTHER[:20_000]
    assert ranges(server) == ["bytes=50000-", None]


@pytest.mark.parametrize(
    ("validators", "condition"),
    [
        ({"etag": None}, None),
        ({"etag": 'W/"v1"'}, None),
        (
            {"etag": 'W/"v1"', "modified": "Mon, 01 Jan 2024 00:00:00 GMT"},
            "Mon, 01 Jan 2024 00:00:00 GMT",
        ),
        ({"etag": '"v1"', "modified": "Mon, 01 Jan 2024 00:00:00 GMT"}, '"v1"'),
    ],
)
def test_only_what_tells_versions_apart_for_sure_lets_a_download_go_on(
    server: Any, get: Any, validators: dict[str, str | None], condition: str | None
) -> None:
    assert get(server.file("/a", BODY, cuts=(30_000,), **validators)) == BODY
    assert server.requests[1][2].get("If-Range") == condition
    assert ranges(server)[1] == (None if condition is None else "bytes=30000-")


def test_the_beginning_of_another_address_is_not_gone_on_with(server: Any, get: Any) -> None:
    refusal(get, server.file("/a", BODY, cuts=(10_000,) * ATTEMPTS))
    server.requests.clear()
    assert get(server.file("/b", OTHER)) == OTHER
    assert ranges(server) == [None]


@pytest.mark.parametrize("note", ["", "{", "[]", '{"url": 1}'])
def test_a_damaged_note_means_a_new_start(server: Any, get: Any, tmp_path: Path, note: str) -> None:
    url = server.file("/a", BODY, cuts=(10_000,) * ATTEMPTS)
    refusal(get, url)
    server.requests.clear()
    (tmp_path / "data.bin.partial.json").write_text(note)
    assert get(url) == BODY
    assert ranges(server) == [None]


def test_a_body_shorter_than_announced_is_no_success(get: Any, tmp_path: Path) -> None:
    # Where the transport itself does not notice.
    headers = {"Content-Length": str(len(BODY))}
    stream = httpx.ByteStream(BODY[:-1])
    with answering(lambda _: httpx.Response(200, headers=headers, stream=stream)) as client:
        said = refusal(get, "https://example.org/a", client=client)
    assert "ended after 99,999 bytes of 100,000" in said
    assert not (tmp_path / "data.bin").exists()


def test_a_wrong_checksum_names_both_and_leaves_nothing(
    server: Any, get: Any, tmp_path: Path
) -> None:
    expected = hashlib.sha256(OTHER).hexdigest()
    said = refusal(get, server.file("/a", BODY), sha256=expected)
    assert expected in said
    assert hashlib.sha256(BODY).hexdigest() in said
    assert files(tmp_path) == []


def test_what_the_caller_refuses_is_not_put_in_place(server: Any, get: Any, tmp_path: Path) -> None:
    (tmp_path / "data.bin").write_bytes(b"old")
    seen = []

    def check(path: Path) -> None:
        seen.append(path.read_bytes())
        raise DownloadError("not this one")

    assert refusal(get, server.file("/a", BODY), check=check) == "not this one"
    assert seen == [BODY]
    assert (tmp_path / "data.bin").read_bytes() == b"old"
    assert files(tmp_path) == ["data.bin"]


@pytest.mark.parametrize("length", [True, False])
def test_more_bytes_than_allowed_are_refused_announced_or_not(
    server: Any, get: Any, tmp_path: Path, length: bool
) -> None:
    url = server.file("/a", BODY, length=length)
    assert "larger than the 99,999 bytes" in refusal(get, url, max_bytes=99_999)
    assert files(tmp_path) == []
    assert len(server.requests) == 1
    assert get(url, max_bytes=100_000) == BODY


def test_a_body_without_end_is_left_at_the_limit(server: Any, get: Any, tmp_path: Path) -> None:
    sent = 0

    def pour(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        while sent < 1 << 30:
            handler.wfile.write(BODY)
            sent += len(BODY)

    server.answers["/a"] = pour
    assert "larger than" in refusal(get, server.url + "/a", max_bytes=1_000_000)
    assert sent < 1 << 29
    assert files(tmp_path) == []


def test_an_encoding_that_was_not_asked_for_is_refused(
    server: Any, get: Any, tmp_path: Path
) -> None:
    url = server.answer("/a", BODY, Content_Encoding="gzip")
    assert "an encoding that was not asked for, 'gzip'" in refusal(get, url)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        ("text/html; charset=utf-8", b"Please log in"),
        ("Text/HTML", b""),
        ("application/octet-stream", b"<!DOCTYPE html><title>Log in</title>"),
        ("text/plain", b"\xef\xbb\xbf\r\n  <HTML lang=en>"),
    ],
)
def test_a_web_page_is_not_data(
    server: Any, get: Any, tmp_path: Path, kind: str, page: bytes
) -> None:
    url = server.answer("/a", page, kind=kind)
    with pytest.raises(WebPageError) as caught:
        get(url)
    assert str(caught.value) == (
        f"{url} answered with a web page instead of the file; "
        f"download {url} in a browser and save it as '{tmp_path / 'data.bin'}'"
    )
    assert caught.value.page == page.decode()
    assert caught.value.address == url
    assert files(tmp_path) == []


def test_data_that_mention_html_are_data(server: Any, get: Any) -> None:
    assert get(server.answer("/a", b"text,label\n<html>,1\n", kind="text/csv"))


@pytest.mark.parametrize(
    ("status", "said", "asked"),
    [
        (404, "there is nothing at", 1),
        (410, "there is nothing at", 1),
        (401, "does not hand out the file (status 401)", 1),
        (403, "does not hand out the file (status 403)", 1),
        (418, "answered with status 418", 1),
        (206, "answered with status 206", 1),
        (500, "answered with status 500; run the command again later", ATTEMPTS),
        (503, "answered with status 503; run the command again later", ATTEMPTS),
    ],
)
def test_a_status_is_told_with_what_to_do(
    server: Any, get: Any, tmp_path: Path, status: int, said: str, asked: int
) -> None:
    url = server.answer("/a", b"no", status=status)
    message = refusal(get, url, by_hand="ask Ann")
    assert said in message
    assert url in message
    assert message.endswith("ask Ann")
    assert len(server.requests) == asked
    assert files(tmp_path) == []


def test_a_server_that_is_busy_for_a_moment_is_asked_again(server: Any, get: Any) -> None:
    url = server.file("/a", BODY)
    good = server.answers["/a"]
    server.answer("/a", status=503)
    busy = server.answers["/a"]
    server.answers["/a"] = lambda handler: (busy if len(server.requests) < 3 else good)(handler)
    assert get(url) == BODY
    assert len(server.requests) == 3


@pytest.mark.slow
def test_silence_is_cut_short_and_the_download_goes_on(server: Any, get: Any) -> None:
    url = server.file("/a", BODY)
    good = server.answers["/a"]

    def stall(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("ETag", '"v1"')
        handler.send_header("Content-Length", str(len(BODY)))
        handler.end_headers()
        handler.wfile.write(BODY[:40_000])
        server.answers["/a"] = good
        server.closing.wait(10)
        handler.close_connection = True

    server.answers["/a"] = stall
    with httpx.Client(trust_env=False, timeout=httpx.Timeout(5, read=0.2)) as impatient:
        assert get(url, client=impatient) == BODY
        assert ranges(server) == [None, "bytes=40000-"]

        def never_begin(handler: BaseHTTPRequestHandler) -> None:
            server.closing.wait(10)
            handler.close_connection = True

        server.answers["/b"] = never_begin
        assert "/b fell silent; check the network" in refusal(
            get, server.url + "/b", client=impatient
        )


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_server_that_is_not_there_is_told_at_once(get: Any, slept: list[float]) -> None:
    said = refusal(get, f"http://127.0.0.1:{closed_port()}/a")
    assert "could not be reached (connection refused); check the network" in said
    assert slept == []


def test_a_server_that_vanishes_on_the_way_is_waited_for(
    server: Any, client: httpx.Client, get: Any, slept: list[float]
) -> None:
    url = server.file("/a", BODY, cuts=(30_000,))

    def relay(request: httpx.Request) -> httpx.Response:
        if len(slept) == 1:
            raise httpx.ConnectError("gone")
        answer = client.send(client.build_request("GET", url, headers=request.headers), stream=True)
        return httpx.Response(answer.status_code, headers=answer.headers, stream=answer.stream)

    with answering(relay) as flaky:
        assert get("https://example.org/a", client=flaky) == BODY
    assert slept == [1, 2]


def test_a_name_without_address_is_told_as_such(get: Any) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("[Errno -2]") from socket.gaierror(-2, "Name or service not known")

    with answering(fail) as client:
        said = refusal(get, "https://example.org/a", client=client)
    assert "https://example.org/a could not be found (its name has no address here)" in said


def test_a_server_that_speaks_no_tls_is_told_as_such(
    server: Any, get: Any, slept: list[float]
) -> None:
    said = refusal(get, server.url.replace("http:", "https:") + "/a")
    assert "could not be reached securely" in said
    assert slept == []
    assert server.requests == []


def test_redirects_are_followed_to_the_file_and_counted(server: Any, get: Any) -> None:
    server.file("/end", BODY, cuts=(30_000,))
    server.answer("/middle", status=302, Location=f"{server.url}/end?key=1")
    url = server.answer("/start", status=301, Location="middle")
    assert get(url) == BODY
    assert [path for _, path, _ in server.requests] == ["/start", "/middle", "/end?key=1"] * 2
    assert ranges(server)[3:] == ["bytes=30000-"] * 3

    server.requests.clear()
    loop = server.answer("/loop", status=302, Location="/loop")
    assert f"redirects more than {MAX_REDIRECTS} times" in refusal(get, loop)
    assert len(server.requests) == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "target", ["http://example.org/a", "http://127.0.0.1/a", "file:///etc/passwd"]
)
def test_https_never_leads_to_anything_less(get: Any, target: str) -> None:
    asked = []

    def redirect(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(302, headers={"Location": target})

    with answering(redirect) as client:
        said = refusal(get, "https://example.org/start?key=secret", client=client)
    assert "https" in said
    assert "secret" not in said
    assert asked == ["https://example.org/start?key=secret"]


@pytest.mark.parametrize(
    ("url", "is_asked"),
    [
        ("https://example.org/a", True),
        ("http://localhost:8000/a", True),
        ("http://127.1.2.3/a", True),
        ("http://[::1]/a", True),
        ("http://example.org/a", False),
        ("http://127.0.0.1.example.org/a", False),
        ("http://10.0.0.1/a", False),
        ("ftp://localhost/a", False),
        ("/a", False),
        ("http://[bad", False),
    ],
)
def test_plain_http_is_for_this_machine_only(get: Any, url: str, is_asked: bool) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        return httpx.Response(200, stream=httpx.ByteStream(BODY))

    with answering(answer) as client:
        if is_asked:
            assert get(url, client=client) == BODY
        else:
            refusal(get, url, client=client)
    assert len(asked) == is_asked


@pytest.mark.parametrize(
    ("url", "is_asked"),
    [
        ("https://example.org/a", True),
        ("https://drive.example.org/a", True),
        ("https://example.org.evil.com/a", False),
        ("https://notexample.org/a", False),
        ("https://example.org@evil.com/a", False),
    ],
)
def test_only_allowed_hosts_are_asked(get: Any, url: str, is_asked: bool) -> None:
    asked = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        if request.url.path == "/start":
            return httpx.Response(302, headers={"Location": url})
        return httpx.Response(200, stream=httpx.ByteStream(BODY))

    with answering(answer) as client:
        settings = {"client": client, "allowed_hosts": ("example.org",)}
        if is_asked:
            assert get("https://example.org/start", **settings) == BODY
        else:
            assert "was not asked" in refusal(get, "https://example.org/start", **settings)
    assert len(asked) == 1 + is_asked


def test_no_message_holds_a_password_or_a_key(get: Any) -> None:
    port = closed_port()
    said = refusal(get, f"http://ann:secret@127.0.0.1:{port}/a?key=secret#secret")
    assert f"http://127.0.0.1:{port}/a could not be reached" in said
    assert "secret" not in said


def clear_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def test_the_usual_proxy_variables_are_honoured(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_proxies(monkeypatch)
    monkeypatch.setenv("HTTP_PROXY", server.url)
    server.answer("", BODY)
    download("http://localhost:9/a", tmp_path / "a", max_bytes=1_000_000)
    assert (tmp_path / "a").read_bytes() == BODY
    assert server.requests[0][1] == "http://localhost:9/a"


@pytest.mark.parametrize("proxy", ["http://ann:secret@127.0.0.1:{port}", "junk://ann:secret@host"])
def test_a_proxy_that_fails_is_told_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    clear_proxies(monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", proxy.format(port=closed_port()))
    with pytest.raises(DownloadError) as caught:
        download("https://example.org/a", tmp_path / "a", max_bytes=1)
    assert "secret" not in str(caught.value)
    assert "junk" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_a_usage_error(
    server: Any, client: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write '.*file/data\.bin'"):
        download(
            server.file("/a", BODY), tmp_path / "file" / "data.bin", max_bytes=1, client=client
        )
    assert server.requests == []


def test_a_full_disk_is_a_usage_error_and_keeps_the_old_file(
    server: Any, get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "data.bin").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot write '.*data\.bin': No space left on device"):
        get(server.file("/a", BODY))
    assert (tmp_path / "data.bin").read_bytes() == b"old"


@pytest.mark.parametrize("length", [True, False])
def test_a_bar_counts_bytes_on_a_terminal_only(
    server: Any, get: Any, monkeypatch: pytest.MonkeyPatch, length: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return is_terminal

    url = server.file("/a", BODY, length=length)
    for is_terminal in (False, True):
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        assert get(url, show_progress=True) == BODY
        said = terminal.getvalue()
        assert ("data.bin" in said) == is_terminal
    monkeypatch.undo()
    assert "B/s" in said
