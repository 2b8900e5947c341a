"""One URL to one file: all of it and the right thing, or nothing and one sentence that says why.

A body is received into `NAME.partial` beside the target. When the line is cut, by the network or by
Ctrl-C, that file stays, and the next attempt asks only for the rest:

    Range: bytes=1048576-        what is missing
    If-Range: "5f3a…"            but only if the file on the server is still the same one

The validator in If-Range, a strong ETag or else Last-Modified, is remembered in
`NAME.partial.json`. The rest is appended only if the server answers 206 with that validator, from
that byte on, of that length; everything else starts from the first byte, so that two versions are
never spliced (RFC 9110, 13.1.5 and 15.3.7). A finished body is checked (length, sha256 where it is
known, not a web page, and what the caller asks for), put on disk, and renamed into place.

Redirects are followed by hand: every address on the way must be https. Plain http is for servers
on this machine.
"""

import hashlib
import ipaddress
import json
import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from ..errors import DownloadError, reading_network_settings, writing_to
from ..progress import progress_bar

TIMEOUT = httpx.Timeout(30, connect=10)
"""Seconds without a byte, and seconds until a connection stands."""
ATTEMPTS = 5
"""How often one download is begun or gone on with."""
MAX_REDIRECTS = 5
MAX_PAGE_BYTES = 1 << 20
"""How much of a web page that came instead of data is kept for the caller to read."""

_PASSING = {408, 429, 500, 502, 503, 504}  # statuses that another attempt may not meet again
_UNREACHABLE = (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError)


class WebPageError(DownloadError):
    """A web page came where data were expected: a login, a warning, a limit."""

    def __init__(self, message: str, address: str, page: str) -> None:
        super().__init__(message)
        self.address = address
        """Where the page was, after redirects; it may hold keys, so it's not for messages."""
        self.page = page


class _InterruptedError(Exception):
    """What another attempt may mend. The message is the first half of a DownloadError's."""


@dataclass(frozen=True)
class _Version:
    """Which version of the file on the server a partial file is the beginning of."""

    url: str
    validator: str
    total: int | None
    """Bytes of the whole; None if the server did not say."""


@dataclass(frozen=True)
class _Task:
    """What `download` was asked for, as its parts need it."""

    client: httpx.Client
    url: str
    partial: Path
    max_bytes: int
    allowed_hosts: Collection[str] | None
    by_hand: str
    show_progress: bool

    def error(self, problem: str) -> DownloadError:
        return DownloadError(f"{problem}; {self.by_hand}")

    def web_page_error(self, address: str, page: bytes) -> WebPageError:
        return WebPageError(
            f"{_shown(self.url)} answered with a web page instead of the file; {self.by_hand}",
            address,
            page[:MAX_PAGE_BYTES].decode("utf-8", errors="replace"),
        )


def make_client() -> httpx.Client:
    """A client with our time-outs that honours the usual proxy variables. Raises DownloadError."""
    with reading_network_settings(DownloadError):
        return httpx.Client(timeout=TIMEOUT)


def download(
    url: str,
    path: Path,
    *,
    max_bytes: int,
    sha256: str | None = None,
    check: Callable[[Path], None] | None = None,
    allowed_hosts: Collection[str] | None = None,
    by_hand: str | None = None,
    client: httpx.Client | None = None,
    sleep: Callable[[float], None] = time.sleep,
    show_progress: bool = False,
) -> None:
    """Fill `path` with what stands at `url`; whatever was there is replaced, in one step.

    One process at a time for one path: two would write to the same partial file.

    max_bytes: more than this is refused, announced or not
    sha256: of the whole file, as 64 hexadecimal digits
    check: called with the complete file before it is put in place; what it raises refuses the file
    allowed_hosts: domains that may serve it, each with its subdomains; all if None
    by_hand: what a user can do where this fails, to end a sentence with

    Raises DownloadError, WebPageError among them, and UsageError when `path` cannot be written.
    """
    by_hand = by_hand or f"download {_shown(url)} in a browser and save it as '{path}'"
    partial = path.with_name(path.name + ".partial")
    with ExitStack() as stack, writing_to(path):
        if client is None:
            client = stack.enter_context(make_client())
        task = _Task(client, url, partial, max_bytes, allowed_hosts, by_hand, show_progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(ATTEMPTS):
            try:
                _receive(task)
                break
            except _InterruptedError as interruption:
                # A wrong name or a missing network is said at once, unless it was there before.
                unreachable = isinstance(interruption.__cause__, _UNREACHABLE) and not attempt
                if unreachable or attempt == ATTEMPTS - 1:
                    raise DownloadError(f"{interruption}, or {by_hand}") from interruption
            sleep(2**attempt)
        try:
            _refuse_web_page(task)
            if sha256 is not None:
                _check_digest(task, sha256)
            if check is not None:
                check(partial)
        except DownloadError:
            _forget(partial)
            raise
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        _forget(partial)


def _receive(task: _Task) -> None:
    """One attempt to complete the partial file. Raises _InterruptedError if another may go on."""
    partial, shown = task.partial, _shown(task.url)
    known = _read_note(task)
    headers = {"Accept-Encoding": "identity"}
    if known:
        size = partial.stat().st_size
        if size == known.total:
            return  # all of it came before, but the process ended before it was put in place
        headers |= {"Range": f"bytes={size}-", "If-Range": known.validator}
    try:
        with _follow_redirects(task, headers) as response:
            status = response.status_code
            if known and status in (206, 416):
                total = _total_if_continued(response, known, size) if status == 206 else None
                if total is None:
                    _forget(partial)
                    raise _InterruptedError(
                        f"{shown} changed while it was being downloaded; run the command again"
                    )
            elif status == 200:
                _check_type(task, response)
                total = _content_length(response)
                _forget(partial)
                partial.touch()
                _write_note(partial, _Version(task.url, _validator(response), total))
            elif status in _PASSING:
                raise _InterruptedError(
                    f"{shown} answered with status {status}; run the command again later"
                )
            else:
                raise task.error(_explain_status(shown, status))
            _append(task, response, total)
    except httpx.TransportError as error:
        raise _InterruptedError(
            f"{shown} {_explain_transport(error)}; check the network and run the command again"
        ) from error
    except (httpx.InvalidURL, httpx.StreamError) as error:
        raise task.error(f"{shown} led to an address or an answer that is not valid") from error


def _append(task: _Task, response: httpx.Response, total: int | None) -> None:
    """Add the body to the partial file, which then has `total` bytes, and never too many."""
    partial, shown = task.partial, _shown(task.url)
    size = partial.stat().st_size
    too_large = task.error(f"{shown} is larger than the {task.max_bytes:,} bytes that it may have")
    if total is not None and total > task.max_bytes:
        _forget(partial)
        raise too_large
    name = partial.name.removesuffix(".partial")
    with (
        partial.open("ab") as file,
        progress_bar(name, total, "B", task.show_progress, initial=size) as bar,
    ):
        # Raw, so that what is counted is what was sent; an encoding was refused in `_check_type`.
        for chunk in response.iter_raw():
            size += len(chunk)
            if size > task.max_bytes:
                break
            file.write(chunk)
            bar.update(len(chunk))
    if size > task.max_bytes:
        _forget(partial)
        raise too_large
    # httpx notices this where the connection tells; a body must also be as long as it says.
    if total is not None and size != total:
        if size > total:
            _forget(partial)
        raise _InterruptedError(
            f"{shown} ended after {size:,} bytes of {total:,}; run the command again"
        )


@contextmanager
def _follow_redirects(task: _Task, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
    """The answer at the end of the redirects; every address is judged before it is asked."""
    address = httpx.URL(task.url)
    _check_address(task, address)
    for _ in range(MAX_REDIRECTS + 1):
        with task.client.stream(
            "GET", address, headers=headers, follow_redirects=False
        ) as response:
            if not response.has_redirect_location:
                yield response
                return
            following = address.join(response.headers["location"])
        if address.scheme == "https" and following.scheme != "https":
            raise task.error(
                f"{_shown(str(address))} redirects to an address without https, which was not "
                "followed, since anyone on the way could answer in its place"
            )
        address = following
        _check_address(task, address)
    raise task.error(f"{_shown(task.url)} redirects more than {MAX_REDIRECTS} times")


def _check_address(task: _Task, address: httpx.URL) -> None:
    shown, host = _shown(str(address)), address.host
    if address.scheme != "https" and not (address.scheme == "http" and _is_loopback(host)):
        raise task.error(f"{shown} is not an https address and was not asked")
    if task.allowed_hosts is not None and not any(
        host == allowed or host.endswith("." + allowed) for allowed in task.allowed_hosts
    ):
        raise task.error(
            f"{shown} was not asked, since this file comes from {' or '.join(task.allowed_hosts)}"
        )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _total_if_continued(response: httpx.Response, known: _Version, size: int) -> int | None:
    """Bytes of the whole, if a 206 answer is the rest of the very file of which we have `size`.

    A server that overlooks If-Range answers 206 for a changed file too, so the validator is looked
    at once more.
    """
    place = re.fullmatch(
        r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("content-range", ""), re.ASCII
    )
    if place is None or "content-encoding" in response.headers:
        return None
    start, end, total = (int(number) for number in place.groups())
    is_rest = start == size and end == total - 1 and known.total in (None, total)
    return total if is_rest and _validator(response) == known.validator else None


def _validator(response: httpx.Response) -> str:
    """What If-Range may hold: a strong ETag, else Last-Modified, else nothing."""
    etag = str(response.headers.get("etag", ""))
    if etag and not etag.startswith("W/"):
        return etag
    return str(response.headers.get("last-modified", ""))


def _content_length(response: httpx.Response) -> int | None:
    length = response.headers.get("content-length", "")
    return int(length) if length.isdecimal() else None


def _check_type(task: _Task, response: httpx.Response) -> None:
    """Refuse what is not the file itself: a web page, or a body that was compressed on the way."""
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise task.error(
            f"{_shown(task.url)} was sent in an encoding that was not asked for, {encoding[:20]!r}"
        )
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in ("text/html", "application/xhtml+xml"):
        page = bytearray()
        for chunk in response.iter_raw():
            page += chunk
            if len(page) >= MAX_PAGE_BYTES:
                break
        raise task.web_page_error(str(response.url), bytes(page))


def _refuse_web_page(task: _Task) -> None:
    """The same by a look at the file itself, for servers that call a page something else."""
    with task.partial.open("rb") as file:
        page = file.read(MAX_PAGE_BYTES)
    start = page[:100].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        raise task.web_page_error(task.url, page)


def _check_digest(task: _Task, expected: str) -> None:
    with task.partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected.lower():
        raise task.error(
            f"{_shown(task.url)} has the sha256 {digest} instead of {expected.lower()} and was "
            "deleted, since it is damaged or another file"
        )


def _note_path(partial: Path) -> Path:
    return partial.with_name(partial.name + ".json")


def _read_note(task: _Task) -> _Version | None:
    """What the partial file is the beginning of; None where it cannot be gone on with."""
    partial = task.partial
    try:
        version = _Version(**json.loads(_note_path(partial).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):  # none, or none of ours
        return None
    if version.url != task.url or not version.validator or not partial.is_file():
        return None
    return version if partial.stat().st_size else None


def _write_note(partial: Path, version: _Version) -> None:
    _note_path(partial).write_text(json.dumps(asdict(version)), encoding="utf-8")


def _forget(partial: Path) -> None:
    # The note first: without it, a partial file is never gone on with.
    _note_path(partial).unlink(missing_ok=True)
    partial.unlink(missing_ok=True)


def _shown(url: str) -> str:
    """An address for messages: without password, key or query."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return "an address that is not valid"
    port = f":{parsed.port}" if parsed.port else ""
    return f"{parsed.scheme}://{parsed.host}{port}{parsed.path}"


def _explain_status(shown: str, status: int) -> str:
    if status in (404, 410):
        return f"there is nothing at {shown} any more (status {status})"
    if status in (401, 403):
        return f"{shown} does not hand out the file (status {status})"
    return f"{shown} answered with status {status}"


def _explain_transport(error: httpx.TransportError) -> str:
    """The second half of a clause that begins with the address.

    What httpx says may hold a proxy's password, so its words are not used; what lies beneath tells
    the causes apart.
    """
    if isinstance(error, httpx.ConnectTimeout):
        return "could not be reached in time"
    if isinstance(error, httpx.TimeoutException):
        return "fell silent"
    if isinstance(error, httpx.ProxyError):
        return "could not be reached, since the proxy refused"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"has a certificate that is not accepted ({cause.verify_message})"
        if isinstance(cause, ssl.SSLError):
            return f"could not be reached securely ({cause.reason})"
        if isinstance(cause, socket.gaierror):
            return "could not be found (its name has no address here)"
        if isinstance(cause, ConnectionRefusedError):
            return "could not be reached (connection refused)"
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, httpx.ConnectError):
        return "could not be reached"
    return "cut the connection"
