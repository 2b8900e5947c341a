"""A client for chat completions, written out: what is on the wire, and what is done when it fails.

It speaks to any server that speaks OpenAI's dialect: OpenAI, Azure's gateways, vLLM, llama.cpp,
Ollama. One call is

    POST {base_url}/chat/completions
    Authorization: Bearer …
    X-Client-Request-Id: the caller's name for this call, which OpenAI logs
    {"model": …, "messages": [{"role": "user", "content": …}], "max_completion_tokens": …}

and its answer a `Completion`, or one of the errors below. Whatever may heal is tried again:

    no whole answer     refused, reset, timed out, cut short, not JSON, not a completion
    408, 409, 429, 5xx  unless `x-should-retry: false`; others too if it is `true`

after `retry-after-ms`, else `retry-after` (seconds or an HTTP date), else min(0.5 · 2ⁿ, 8)
seconds less up to a quarter, drawn at random so that calls that failed together do not come back
together. A 429 makes everyone wait, once (see pacing.py). A call gives up when it has failed for
RETRY_SECONDS during which no other call got an answer either: an outage ends the run, a bad minute
does not. As long as nobody could even connect, REACH_SECONDS are enough. A call that fails that
long while others are answered fails alone (`FailsAloneError`): its text may be what the server
stumbles over. Only "too many" can go on for longer, since it says nothing of the text.

What cannot heal is raised at once: a wrong key (401, 403), no money (429 `insufficient_quota`), an
unknown model (404), a request that the server refuses. Two refusals concern one text alone, and
are the caller's to answer: `ContextOverflowError` and `ContentFilterError`. One is mended here:
older servers call the limit on the answer's length `max_tokens`; the name is swapped once, for all
calls.

The key is on each request and nowhere else: see `ApiKey`.
"""

import asyncio
import ipaddress
import json
import math
import random
import re
import time
import warnings
from collections.abc import Awaitable, Callable, Generator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Self, TypeVar

import httpx

from ..errors import TwoStageError, TwoStageWarning, UsageError, reading_network_settings
from .pacing import Pacer

T = TypeVar("T")

OPENAI_URL = "https://api.openai.com/v1"
CONNECT_SECONDS = 10.0
READ_SECONDS = 120.0
"""Without a byte. A server on one CPU that answers 64 calls in turn may take that long."""
RETRY_SECONDS = 300.0
REACH_SECONDS = 15.0
SHOWN = 300
"""Characters of a server's message that an error quotes."""
_MIN_SECRET = 12
"""Shorter keys are placeholders (`EMPTY`, `ollama`), which may well occur in a text."""
_OVERFLOW = re.compile("context length|maximum model length|available context size")
"""In what vLLM, SGLang and older llama.cpp say of a text that is too long."""

_UNKNOWN_NAME = re.compile(
    "unsupported|not supported|unrecogni[sz]ed|unknown|unexpected|extra|not permitted"
)
"""In what servers say of a parameter that they don't know, not of a value that they don't like."""


class ApiError(TwoStageError):
    """Base of what the server, or the way to it, has against a call. Final, unless retryable."""

    exit_code = 5

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status; None where there was no answer."""


class RetryableError(ApiError):
    """Another attempt may succeed. Raised only once RETRY_SECONDS are over."""

    exit_code = 4

    def __init__(self, message: str, status: int | None = None, wait: float | None = None) -> None:
        super().__init__(message, status)
        self.wait = wait
        """Seconds that the server asks to wait; None where it does not say."""


class UnreachableError(RetryableError):
    """No connection: refused, timed out, or the name is not known."""


class FailsAloneError(RetryableError):
    """This call has failed for RETRY_SECONDS while others were answered."""


class ThrottledError(RetryableError):
    """429: too many requests, or too many tokens."""


class AuthenticationError(ApiError):
    """401, 403: the key is missing, wrong, or not allowed to do this."""


class QuotaError(ApiError):
    """The account has no money left, which waiting doesn't change."""


class UnknownModelError(ApiError):
    """404: no such model, or no such address."""


class ContextOverflowError(ApiError):
    """The text is too long for the model: a shorter one would pass."""


class ContentFilterError(ApiError):
    """The server's filter refuses this text."""


class UnsupportedLimitError(ApiError):
    """The server knows the limit on the answer's length by its other name."""


class RejectedError(ApiError):
    """Any other request that the server refuses, and would refuse again."""


@dataclass(frozen=True)
class Completion:
    """An answer of a chat model."""

    content: str
    """Empty where the server sent none."""
    finish_reason: str
    """`stop`; `length`: cut at the limit; `content_filter`; or `refusal`."""
    prompt_tokens: int | None
    """As billed; None where the server did not say."""
    completion_tokens: int | None


class ApiKey(httpx.Auth):
    """The key: put on each request at the moment it is sent, shown by nothing.

    Held in a closure, so that no repr, no `vars()` and no traceback that prints local variables
    can show it. Raises UsageError for what cannot stand in an HTTP header.
    """

    def __init__(self, key: str, source: str = "the API key") -> None:
        key = key.strip()
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            key = ""  # a traceback may print it, and part of it may be a key
            raise UsageError(
                f"{source} is empty or holds characters that no key has; expected one word of "
                "plain letters, digits and signs"
            )

        def reveal() -> str:
            return key

        self._reveal = reveal

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        if _is_azure(request.url):  # which may take any other bearer for a token of its own kind
            request.headers["api-key"] = self._reveal()
        else:
            request.headers["Authorization"] = f"Bearer {self._reveal()}"
        yield request

    def hide(self, text: str) -> str:
        """The text without the key: servers quote it in their errors."""
        key = self._reveal()
        return text.replace(key, "[key]") if len(key) >= _MIN_SECRET else text


class OpenAIClient:
    """Calls to one server, many at a time, as a context manager.

    transport, clock, now, sleep, jitter: as httpx, `time.monotonic`, the date, `asyncio.sleep` and
    `random.random`, for those who need others.
    """

    def __init__(
        self,
        base_url: str = OPENAI_URL,
        api_key: ApiKey | None = None,
        *,
        pacer: Pacer | None = None,
        concurrency: int = 32,
        read_seconds: float = READ_SECONDS,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.base_url = check_base_url(base_url, api_key is not None)
        self._key = api_key
        self._pacer = pacer or Pacer(clock=clock, sleep=sleep)
        self._clock, self._now, self._sleep, self._jitter = clock, now, sleep, jitter
        self._limit_name = "max_completion_tokens"
        self._read_seconds = read_seconds
        self._heard_at: float | None = None  # when any answer came, an error's included
        self._answered_at = -math.inf  # when a good one came
        self._transport = transport
        self._places = asyncio.Semaphore(concurrency)
        self._idle: list[httpx.AsyncClient] = []
        self._lanes: list[httpx.AsyncClient] = []
        with reading_network_settings(UsageError):
            self._ssl = httpx.create_ssl_context()
            self._idle.append(self._open_lane())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        for lane in self._lanes:
            await lane.aclose()

    def _open_lane(self) -> httpx.AsyncClient:
        """Room for one call at a time, with a connection that it keeps.

        A client of httpx's own with room for 64 looks at all of its connections for each call, and
        again for each of them: 64 calls at once then take a core 7 ms each. (httpcore 1.0)
        """
        lane = httpx.AsyncClient(
            verify=self._ssl,
            timeout=httpx.Timeout(self._read_seconds, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=1, keepalive_expiry=30),
            transport=self._transport,
        )
        self._lanes.append(lane)
        return lane

    async def complete(
        self, body: Mapping[str, Any], *, request_id: str, tokens: int = 0
    ) -> Completion:
        """One chat completion.

        body: as `chat_body` makes it
        request_id: this call's name, in ASCII
        tokens: about how many the call takes, prompt and answer, for the pace
        """
        while True:
            name = self._limit_name
            try:
                return await self.call(
                    "POST",
                    "/chat/completions",
                    read=lambda response: self.read(parse_json(response)),
                    json=self.in_dialect(body),
                    headers={"X-Client-Request-Id": request_id},
                    tokens=tokens,
                )
            except UnsupportedLimitError as error:
                if not self.swap_limit_name(name):
                    raise RejectedError(str(error), error.status) from None

    def read(self, body: object) -> Completion:
        """The completion in a body, without the key. Raises ApiError where it is none."""
        completion = read_completion(body)
        return replace(completion, content=self.hide(completion.content))

    def in_dialect(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body with the limit's name as this server wants it."""
        return {
            self._limit_name if key == "max_completion_tokens" else key: value
            for key, value in body.items()
        }

    def swap_limit_name(self, refused: str) -> bool:
        """Whether another attempt makes sense after the server refused that name for the limit."""
        if self._limit_name == refused == "max_completion_tokens":
            self._limit_name = "max_tokens"
        return self._limit_name != refused

    async def call(
        self,
        method: str,
        path: str,
        *,
        read: Callable[[httpx.Response], T],
        tokens: int = 0,
        attempts: float = math.inf,
        **request: Any,
    ) -> T:
        """Send, and send again while that may help; what `read` makes of the answer.

        path: below the base URL, with its own query if any
        read: raises ApiError for an answer that is none
        attempts: how often at most
        request: `json`, `files`, `headers` … as httpx takes them
        """
        base, _, query = self.base_url.partition("?")
        if query:
            path += ("&" if "?" in path else "?") + query
        failing_since = None
        attempt = 0
        while True:
            async with self._places:
                sent_at = await self._pacer.wait_turn(tokens)
                outcome = await self._send(method, base + path, read, request)
            if not isinstance(outcome, ApiError):
                self._answered_at = self._clock()
                self._pacer.answered()
                return outcome
            if not isinstance(outcome, RetryableError):
                raise outcome
            failing_since = sent_at if failing_since is None else failing_since
            wait = outcome.wait
            if wait is None:
                wait = min(0.5 * 2**attempt, 8.0) * (1 - 0.25 * self._jitter())
            attempt += 1
            if attempt >= attempts:
                raise outcome
            unreached = isinstance(outcome, UnreachableError) and self._heard_at is None
            patience = REACH_SECONDS if unreached else RETRY_SECONDS
            now = self._clock()
            waited = now - max(failing_since, self._answered_at)
            if waited + wait > patience:
                raise _given_up(outcome, waited, wait)
            if isinstance(outcome, ThrottledError):
                self._pacer.throttled(sent_at, wait)
            elif now - failing_since + wait > RETRY_SECONDS:
                raise FailsAloneError(str(outcome), outcome.status)
            else:
                await self._sleep(wait)

    async def _send(
        self,
        method: str,
        url: str,
        read: Callable[[httpx.Response], T],
        request: dict[str, Any],
    ) -> T | ApiError:
        """One attempt. Errors are returned, not raised: an error raised inside httpx's own frames
        would carry them, and the key with them, to whoever prints a traceback's local variables."""
        lane = self._idle.pop() if self._idle else self._open_lane()
        try:
            response = await lane.request(method, url, auth=self._key, **request)
        except httpx.RequestError as error:
            return self._describe_failure(error)
        except (httpx.InvalidURL, httpx.CookieConflict) as error:
            return RejectedError(self.hide(f"{self.address} cannot be used: {error}"))
        finally:
            self._idle.append(lane)
        self._heard_at = self._clock()
        self._pacer.learn(response.headers)
        if not response.is_success:
            wait = read_wait(response.headers, self._now())
            refused = read_error(
                response.status_code,
                _parse_leniently(response),
                wait=wait,
                should_retry=response.headers.get("x-should-retry", ""),
            )
            return self._without_key(refused)
        try:
            return read(response)
        except ApiError as error:
            return self._without_key(error)

    def _describe_failure(self, error: httpx.RequestError) -> RetryableError:
        detail = f" ({error})" if str(error) else ""
        if isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)):
            return UnreachableError(self.hide(f"cannot connect to {self.address}{detail}"))
        if isinstance(error, httpx.ReadTimeout):
            return RetryableError(f"{self.address} sent nothing for {self._read_seconds:g} seconds")
        return RetryableError(self.hide(f"the connection to {self.address} broke{detail}"))

    @property
    def address(self) -> str:
        """The server, for messages: no query, which might hold what isn't for everyone."""
        return self.base_url.partition("?")[0]

    def _without_key(self, error: ApiError) -> ApiError:
        text = f"{self.address}: {error}"
        error.args = (self.hide(text),)
        return error.with_traceback(None)

    def hide(self, text: str) -> str:
        """The text without the key, which servers quote in their errors."""
        return self._key.hide(text) if self._key else text


def check_base_url(base_url: str, has_key: bool = False) -> str:
    """The address without a trailing slash. Raises UsageError when it is none.

    has_key: warn where a key would go over an open line
    """
    try:
        url = httpx.URL(base_url)
    except (httpx.InvalidURL, TypeError):
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.fragment:
        shown = "one with a user name or password" if "@" in str(base_url) else repr(base_url)
        raise UsageError(
            f"the base URL is {shown}; expected an address such as {OPENAI_URL} or "
            "http://localhost:8000/v1"
        )
    if has_key and url.scheme == "http" and not _is_near(url.host):
        warnings.warn(
            f"the key goes to {url.host} over plain http, where others can read it",
            TwoStageWarning,
            stacklevel=3,
        )
    path, mark, query = base_url.partition("?")
    return path.rstrip("/") + mark + query


def chat_body(
    model: str, message: str, max_tokens: int, temperature: float | None = None
) -> dict[str, Any]:
    """A request for one answer to one message."""
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": message}]}
    body["max_completion_tokens"] = max_tokens
    if temperature is not None:
        body["temperature"] = temperature
    return body


def read_completion(body: Any) -> Completion:
    """The completion in a body that came under status 200. Raises ApiError where it is none."""
    if is_error(body):
        raise read_error(200, body)
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = _join(message.get("content")), message.get("refusal")
        usage = body.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (KeyError, IndexError, TypeError, AttributeError):
        message = None
    if message is None:
        raise RetryableError("the answer is not a chat completion", 200)
    return Completion(
        content,
        # Some servers leave the reason out; whatever is not one of the bad ones is good.
        "refusal" if refusal and not content else str(reason or "stop"),
        *(count if isinstance(count, int) else None for count in counts),
    )


def _join(content: object) -> str:
    """The text of a message, which may come in parts. What else there is, is no text: it was paid
    for all the same, and asking again would be paid for too."""
    if isinstance(content, list):
        texts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def is_error(body: object) -> bool:
    """Whether a body is an error, in any of the shapes seen, whatever the status says."""
    return (
        isinstance(body, dict)
        and "choices" not in body
        and (bool(body.get("error")) or body.get("object") == "error")
    )


def read_error(
    status: int, body: object, *, wait: float | None = None, should_retry: str = ""
) -> ApiError:
    """The error that a status and a body stand for.

    Bodies seen: `{"error": {"message", "type", "param", "code"}}` with `code` a string, a number or
    absent (OpenAI, newer vLLM, llama.cpp, the last also under status 200); the same fields without
    `error` around them (older vLLM); `{"error": "…"}` (Ollama); `{"detail": …}` (FastAPI); a page.
    """
    fields = body if isinstance(body, dict) else {}
    fields = fields.get("error", fields)
    if not isinstance(fields, dict):
        fields = {"message": fields}
    message = fields.get("message") or fields.get("detail") or body or "no reason given"
    said = f"{message if isinstance(message, str) else json.dumps(message)}"
    said = " ".join(said.split())
    text = said.lower()
    codes = {str(fields.get(name) or "").lower() for name in ("code", "type")}
    inner = fields.get("innererror")
    if isinstance(inner, dict):
        codes.add(str(inner.get("code") or "").lower())
    if status == 200:
        status = next((int(c) for c in codes if c.isdigit() and 400 <= int(c) < 600), 500)
        if codes & {"invalid_request_error", "insufficient_quota"}:
            status = 400
    if len(said) > SHOWN:  # cut between words: `ApiKey.hide` would not know a part of a key
        said = f"{said[:SHOWN].rpartition(' ')[0]} …"
    said = f"{said} (status {status})"

    if codes & {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}:
        return QuotaError(
            f"the account's quota is used up, which waiting does not change: {said}", status
        )
    if codes & {"context_length_exceeded", "exceed_context_size_error"} or (
        status == 400 and _OVERFLOW.search(text)  # vLLM has no code for it
    ):
        return ContextOverflowError(said, status)
    # invalid_prompt: "your prompt was flagged as potentially violating our usage policy" (OpenAI)
    if codes & {"content_filter", "invalid_prompt", "responsibleaipolicyviolation"}:
        return ContentFilterError(said, status)
    if status in (401, 403) or "invalid_api_key" in codes:
        return AuthenticationError(f"the key is refused: {said}; check OPENAI_API_KEY", status)
    if status == 404 or "model_not_found" in codes:
        return UnknownModelError(
            f"{said}; name another model with --model, or check --base-url, which often ends "
            "in /v1",
            status,
        )
    about = f"{text} {fields.get('param')} {fields.get('code')}".lower()
    if status in (400, 422) and "max_completion_tokens" in about and _UNKNOWN_NAME.search(about):
        return UnsupportedLimitError(said, status)
    retryable = status in (408, 409, 429) or status >= 500
    if should_retry.lower() in ("true", "false"):
        retryable = should_retry.lower() == "true"
    if not retryable:
        return RejectedError(f"the request is refused: {said}", status)
    return (ThrottledError if status == 429 else RetryableError)(said, status, wait)


def read_wait(headers: Mapping[str, str], now: datetime) -> float | None:
    """Seconds that an answer asks to wait; None where it doesn't, or doesn't make sense.

    Nor does 0 or a date that is over: a server that keeps saying so would be asked without end.
    """
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds > 0:
            return seconds
    try:
        until = parsedate_to_datetime(headers["retry-after"])
        # By the server's own clock, where it tells it: ours may be wrong.
        since = parsedate_to_datetime(headers["date"]) if "date" in headers else now
        seconds = (until - since).total_seconds()
        return seconds if seconds > 0 else None
    except (KeyError, ValueError, TypeError):
        return None


def parse_json(response: httpx.Response) -> object:
    """Raises RetryableError for what is no JSON."""
    try:
        return response.json()
    except (ValueError, RecursionError):  # JSON and Unicode errors are ValueErrors
        pass
    raise RetryableError("the answer is not JSON", response.status_code)


def _parse_leniently(response: httpx.Response) -> object:
    """The JSON of an error's body, or its text."""
    try:
        return parse_json(response)
    except RetryableError:
        return response.text


def _given_up(error: RetryableError, waited: float, wait: float) -> ApiError:
    """The same error, once more, with what became of it."""
    if error.wait is not None and waited + error.wait > RETRY_SECONDS:
        what = f"the server asks to wait {wait:,.0f} seconds; run the same command again after that"
    else:
        what = f"given up after {waited:.0f} seconds; run the same command again to go on"
    error.args = (f"{error}; {what}",)
    return error


def _is_azure(url: httpx.URL) -> bool:
    return url.host.endswith(".azure.com") or "api-version" in url.params


def _is_near(host: str) -> bool:
    """This machine, or one in the same private network."""
    try:
        return ipaddress.ip_address(host).is_private
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan"))
