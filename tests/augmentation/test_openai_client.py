"""Single calls to a server that misbehaves: what is sent, what comes back, what is tried again,
what is raised, and who sees the key (nobody)."""

import asyncio
import logging
import random
import socket
import traceback
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.augmentation.conftest import (
    Answer,
    ApiServer,
    HttpRequest,
    Reply,
    completion,
    default_reply,
    error,
    phrase,
    run_in_virtual_time,
)
from twostage.augmentation.openai_client import (
    REACH_SECONDS,
    RETRY_SECONDS,
    SHOWN,
    ApiError,
    ApiKey,
    AuthenticationError,
    Completion,
    ContentFilterError,
    ContextOverflowError,
    FailsAloneError,
    OpenAIClient,
    QuotaError,
    RejectedError,
    RetryableError,
    ThrottledError,
    UnknownModelError,
    UnreachableError,
    chat_body,
    check_base_url,
)
from twostage.augmentation.pacing import Pacer
from twostage.errors import TwoStageWarning, UsageError

KEY = "sk-proj-Zq3vT8xN1mKfWc6Ry0Lh"
BODY = chat_body("small-model", "a text, ünïcödé 🙂", 50)
NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
AFTER_ONE_SECOND = {"retry-after": "1"}


class Clock:
    """Time that passes only in `sleep`, which takes none."""

    def __init__(self) -> None:
        self.time = 1_000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.time

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


@pytest.fixture(autouse=True, scope="module")
def one_ssl_context() -> Iterator[None]:
    """To read the machine's certificates takes longer than most tests here."""
    context = httpx.create_ssl_context()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(httpx, "create_ssl_context", lambda: context)
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


def open_client(url: str, clock: Clock, **settings: Any) -> OpenAIClient:
    given: dict[str, Any] = {
        "clock": clock,
        "sleep": clock.sleep,
        "jitter": float,
        "now": lambda: NOW,
    }
    return OpenAIClient(url, settings.pop("key", ApiKey(KEY)), **given | settings)


def ask(url: str, clock: Clock, **settings: Any) -> Completion:
    """One call, named `call-1`, of a client of its own."""

    async def main() -> Completion:
        async with open_client(url, clock, **settings) as client:
            return await client.complete(BODY, request_id="call-1")

    return asyncio.run(main())


def refusal(url: str, clock: Clock, **settings: Any) -> ApiError:
    """The error of one call: a sentence that names the address."""
    with pytest.raises(ApiError) as caught:
        ask(url, clock, **settings)
    assert "\n" not in str(caught.value)
    assert url.partition("?")[0] in str(caught.value)
    return caught.value


def always(reply: Reply) -> Answer:
    return lambda request_id, body: reply


def ask_many(url: str, number: int, **settings: Any) -> list[Completion]:
    """Calls named 0, 1, …, all at once, in real time."""

    async def main() -> list[Completion]:
        async with OpenAIClient(url, ApiKey(KEY), **settings) as client:
            calls = (client.complete(BODY, request_id=str(i)) for i in range(number))
            return list(await asyncio.gather(*calls))

    return asyncio.run(main())


# What is sent


def test_a_call_sends_the_body_the_key_and_its_name_and_nothing_else_of_ours(
    server: ApiServer, clock: Clock
) -> None:
    ask(server.url, clock)
    (call,) = server.calls
    assert (call.path, call.query) == ("/v1/chat/completions", {})
    assert call.body == {
        "model": "small-model",
        "messages": [{"role": "user", "content": "a text, ünïcödé 🙂"}],
        "max_completion_tokens": 50,
    }
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.headers["x-client-request-id"] == call.request_id == "call-1"
    assert call.headers["content-type"] == "application/json"
    assert "api-key" not in call.headers


def test_a_body_holds_a_temperature_only_where_one_is_asked_for() -> None:
    assert "temperature" not in BODY
    assert chat_body("m", "t", 5, 0.0)["temperature"] == 0.0


def test_without_a_key_no_authorization_is_sent(server: ApiServer, clock: Clock) -> None:
    ask(server.url, clock, key=None)
    assert "authorization" not in server.calls[0].headers


def test_an_azure_address_keeps_its_query_and_gets_the_key_in_its_own_header_too(
    server: ApiServer, clock: Clock
) -> None:
    ask(f"{server.url}/deployments/d/?api-version=2024-10-21", clock)
    (call,) = server.calls
    assert call.path == "/v1/deployments/d/chat/completions"
    assert call.query == {"api-version": "2024-10-21"}
    assert call.headers["api-key"] == KEY


def test_a_path_with_a_query_keeps_it_beside_that_of_the_address(
    server: ApiServer, clock: Clock
) -> None:
    seen: list[HttpRequest] = []

    def answer(request: HttpRequest) -> Reply:
        seen.append(request)
        return Reply(body={"data": []})

    server.routes["GET", "/v1/files"] = answer

    async def main() -> None:
        async with open_client(f"{server.url}?api-version=1", clock) as client:
            await client.call("GET", "/files?limit=5", read=lambda response: response)

    asyncio.run(main())
    assert seen[0].query == {"limit": "5", "api-version": "1"}


def test_a_host_of_azure_gets_the_key_in_its_own_header(clock: Clock) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert request.headers["api-key"] == KEY
        return httpx.Response(200, json=default_reply("x").body)

    transport = httpx.MockTransport(respond)
    assert ask("https://name.openai.azure.com/openai/v1", clock, transport=transport)


# What comes back


def test_an_answer_is_read_with_its_reason_and_its_tokens(server: ApiServer, clock: Clock) -> None:
    server.script = [completion("ein Text 🙂", usage=(31, 7))]
    assert ask(server.url, clock) == Completion("ein Text 🙂", "stop", 31, 7)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (completion("so far", "length"), ("so far", "length")),
        (completion("", "content_filter"), ("", "content_filter")),
        (completion(None, "content_filter"), ("", "content_filter")),
        (completion(None, "stop", refusal="I can't"), ("", "refusal")),
        (completion("", "stop", refusal="I can't"), ("", "refusal")),
        (completion("text", "stop", refusal=""), ("text", "stop")),
        (completion("text", "stop", refusal="I can't"), ("text", "stop")),
        (completion("text", None), ("text", "stop")),
        (completion(None, "stop"), ("", "stop")),
        (completion("text", error=None), ("text", "stop")),
        (completion("text", error={"message": "slow"}), ("text", "stop")),
    ],
)
def test_the_finish_reason_tells_good_answers_from_cut_filtered_and_refused_ones(
    server: ApiServer, clock: Clock, reply: Reply, expected: tuple[str, str]
) -> None:
    server.script = [reply]
    answer = ask(server.url, clock)
    assert (answer.content, answer.finish_reason) == expected


@pytest.mark.parametrize(
    "usage", [None, {}, {"total_tokens": 9}, {"prompt_tokens": "3", "completion_tokens": None}]
)
def test_tokens_that_the_server_does_not_count_are_none(
    server: ApiServer, clock: Clock, usage: object
) -> None:
    body: Any = completion("text", usage=None).body
    assert "usage" not in body
    server.script = [Reply(body=body), Reply(body={**body, "usage": usage})]
    for _ in range(2):
        answer = ask(server.url, clock)
        assert (answer.prompt_tokens, answer.completion_tokens) == (None, None)


# What is tried again

TOO_FEW = [
    b"",
    b"not JSON",
    b"\xff\xfe\xff",
    b'{"choices": [{"message": {"content": "cut',
    b"<!DOCTYPE html><html><body>Welcome to nginx</body></html>",
    b"[" * 100_000,
    b"null",
    b"[]",
    b"{}",
    b'"text"',
    b'{"choices": []}',
    b'{"choices": {}}',
    b'{"choices": [null]}',
    b'{"choices": [{}]}',
    b'{"choices": [{"message": null}]}',
]


@pytest.mark.parametrize("body", TOO_FEW, ids=lambda body: str(body[:50]))
def test_an_answer_that_is_no_completion_is_asked_for_again(
    server: ApiServer, clock: Clock, body: bytes
) -> None:
    server.script = [Reply(body=body)]
    assert ask(server.url, clock).content == phrase("call-1")
    assert len(server.calls) == 2
    assert clock.slept == [0.5]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(reset=True),
        Reply(body=default_reply("call-1").body, cut_after=0),
        Reply(body=default_reply("call-1").body, cut_after=100),
        Reply(headers={"Content-Length": "10_000_000_000_000"}),
        Reply(headers={"Content-Encoding": "gzip"}, body=b"this is not gzip"),
    ],
    ids=["reset", "no body", "cut body", "impossible length", "wrong encoding"],
)
def test_a_connection_that_breaks_is_tried_again(
    server: ApiServer, clock: Clock, reply: Reply
) -> None:
    server.script = [reply]
    assert ask(server.url, clock).content == phrase("call-1")
    assert len(server.calls) == 2
    assert clock.slept == [0.5]


def test_an_answer_that_does_not_come_is_asked_for_again(server: ApiServer, clock: Clock) -> None:
    server.script = [Reply(stall=True)]
    assert ask(server.url, clock, read_seconds=0.05).content == phrase("call-1")
    assert len(server.calls) == 2


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 520, 529])
def test_a_status_that_may_heal_is_tried_again(
    server: ApiServer, clock: Clock, status: int
) -> None:
    server.script = [error(status, "try later")]
    assert ask(server.url, clock).content == phrase("call-1")
    assert [call.request_id for call in server.calls] == ["call-1", "call-1"]
    assert clock.slept == pytest.approx([0.5])


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_a_call_gives_up_after_five_minutes_of_failures(
    server: ApiServer, clock: Clock, status: int
) -> None:
    server.reply = always(error(status, "overloaded"))
    given_up = refusal(server.url, clock)
    assert type(given_up) is (ThrottledError if status == 429 else RetryableError)
    assert (given_up.exit_code, given_up.status) == (4, status)
    assert RETRY_SECONDS - 8 < clock.time - 1_000 <= RETRY_SECONDS == 300
    for words in ("overloaded", f"status {status}", "given up after", "run the same command again"):
        assert words in str(given_up)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("drawn", [0.0, 0.5, 1.0])
def test_waits_double_from_half_a_second_to_eight_less_up_to_a_quarter(
    server: ApiServer, clock: Clock, status: int, drawn: float
) -> None:
    server.script = [error(status, "try later")] * 7
    ask(server.url, clock, jitter=lambda: drawn)
    shares = [0.5, 1, 2, 4, 8, 8, 8]
    assert clock.slept == pytest.approx([(1 - 0.25 * drawn) * wait for wait in shares])


def test_calls_that_failed_together_do_not_come_back_together() -> None:
    async def main() -> list[float]:
        loop, seen = asyncio.get_running_loop(), []

        def respond(request: httpx.Request) -> httpx.Response:
            if loop.time() == 0:
                return httpx.Response(503)
            seen.append(loop.time())
            return httpx.Response(200, json=default_reply("x").body)

        async with OpenAIClient(
            "http://server/v1", transport=httpx.MockTransport(respond), clock=loop.time
        ) as client:
            calls = (client.complete(BODY, request_id=str(i)) for i in range(20))
            await asyncio.gather(*calls)
        return seen

    times = run_in_virtual_time(main())
    assert len(set(times)) == 20
    assert 0.375 <= min(times) < max(times) <= 0.5


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after-ms": "1500", "retry-after": "60"}, 1.5),
        ({"retry-after-ms": "soon", "retry-after": "60"}, 60),
        ({"retry-after-ms": "0", "retry-after": "60"}, 60),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.75"}, 0.75),
        ({"retry-after": "Thu, 01 Jan 2026 12:00:20 GMT"}, 20),
        # By the server's clock it is two minutes later than by ours.
        (
            {
                "date": "Thu, 01 Jan 2026 12:02:00 GMT",
                "retry-after": "Thu, 01 Jan 2026 12:02:20 GMT",
            },
            20,
        ),
        ({"date": "today", "retry-after": "Thu, 01 Jan 2026 12:00:20 GMT"}, 0.5),
        ({"retry-after": "Thu, 01 Jan 2026 11:59:00 GMT"}, 0.5),
        ({"retry-after": "Thu, 32 Jan 2026 12:00:20 GMT"}, 0.5),
        ({"retry-after": "0"}, 0.5),
        ({"retry-after": "-5"}, 0.5),
        ({"retry-after": "nan"}, 0.5),
        ({"retry-after": "inf"}, 0.5),
        ({"retry-after": "soon"}, 0.5),
        ({"retry-after": ""}, 0.5),
        ({"retry-after-ms": "-1"}, 0.5),
    ],
)
def test_the_wait_is_what_the_server_asks_for_where_that_makes_sense(
    clock: Clock, status: int, headers: dict[str, str], wait: float
) -> None:
    replies = [httpx.Response(status, headers=headers)]
    replies.append(httpx.Response(200, json=default_reply("x").body))
    ask("http://server/v1", clock, transport=httpx.MockTransport(lambda _: replies.pop(0)))
    assert clock.slept == pytest.approx([wait])


def test_a_server_that_asks_to_wait_for_an_hour_ends_the_call_at_once(
    server: ApiServer, clock: Clock
) -> None:
    server.reply = always(error(429, "daily limit", headers={"retry-after": "3600"}))
    told = refusal(server.url, clock)
    assert "the server asks to wait 3,600 seconds; run the same command again" in str(told)
    assert "given up after" not in str(told)
    assert (type(told), told.exit_code, len(server.calls)) == (ThrottledError, 4, 1)
    assert clock.slept == []


def test_a_wait_that_would_end_after_five_minutes_is_told_and_not_begun(
    server: ApiServer, clock: Clock
) -> None:
    server.reply = always(error(503, "busy", headers={"retry-after": "200"}))
    assert "asks to wait 200 seconds" in str(refusal(server.url, clock))
    assert clock.slept == [200]


def test_x_should_retry_true_makes_a_refusal_worth_another_attempt(
    server: ApiServer, clock: Clock
) -> None:
    server.script = [error(400, "odd", headers={"x-should-retry": "true", "retry-after": "3"})]
    assert ask(server.url, clock).content == phrase("call-1")
    assert clock.slept == [3]


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
def test_x_should_retry_false_ends_the_call(server: ApiServer, clock: Clock, status: int) -> None:
    server.reply = always(error(status, "no use", headers={"x-should-retry": "false"}))
    told = refusal(server.url, clock)
    assert (type(told), told.exit_code, told.status) == (RejectedError, 5, status)
    assert len(server.calls) == 1


def test_nonsense_in_x_should_retry_is_ignored(server: ApiServer, clock: Clock) -> None:
    server.script = [error(503, "later", headers={"x-should-retry": "perhaps"})]
    assert ask(server.url, clock).content == phrase("call-1")


def test_the_number_of_attempts_can_be_bounded(server: ApiServer, clock: Clock) -> None:
    server.reply = always(error(503, "busy"))

    async def main() -> None:
        async with open_client(server.url, clock) as client:
            await client.call("POST", "/chat/completions", read=str, json={}, attempts=3)

    with pytest.raises(RetryableError, match="busy") as told:
        asyncio.run(main())
    assert "given up" not in str(told.value)
    assert len(server.calls) == 3


def test_an_attempt_after_a_failure_takes_a_turn_like_any_other(
    server: ApiServer, clock: Clock
) -> None:
    """A failed call counts against the limit."""
    server.script = [error(503, "busy", headers={"retry-after": "0.25"})] * 2
    ask(server.url, clock, pacer=Pacer(60, clock=clock, sleep=clock.sleep))
    assert clock.slept == pytest.approx([0.25, 0.75, 0.25, 0.75])


def test_what_an_answer_says_of_the_limits_sets_the_pace(server: ApiServer, clock: Clock) -> None:
    limits = {"x-ratelimit-limit-requests": "6", "x-ratelimit-limit-tokens": "-1"}
    reply = completion("text")
    reply.headers |= limits
    server.reply = always(reply)

    async def main() -> None:
        async with open_client(server.url, clock) as client:
            for i in range(4):
                await client.complete(BODY, request_id=str(i))

    asyncio.run(main())
    assert clock.slept == pytest.approx([10, 10])  # the first two were sent knowing nothing


def test_after_a_429_to_one_call_all_others_wait_too() -> None:
    async def main() -> None:
        loop, sent = asyncio.get_running_loop(), []

        async def respond(request: httpx.Request) -> httpx.Response:
            sent.append(loop.time())
            await asyncio.sleep(1)
            if len(sent) <= 4:
                return httpx.Response(429, headers={"retry-after": "30"})
            return httpx.Response(200, json=default_reply("x").body)

        async with OpenAIClient(
            "http://server/v1", transport=httpx.MockTransport(respond), clock=loop.time
        ) as client:
            first = [asyncio.create_task(client.complete(BODY, request_id="a")) for _ in range(4)]
            await asyncio.sleep(2)
            await asyncio.gather(client.complete(BODY, request_id="b"), *first)
        assert sent[:4] == [0] * 4
        # One slowing for the four of them: turns 0.1 seconds apart.
        assert sent[4:] == pytest.approx([31, 31.1, 31.2, 31.3, 31.4])

    run_in_virtual_time(main())


def ask_one_in_vain(status: int) -> tuple[float, type[BaseException]]:
    """How long a call goes on that always meets `status`, while others are answered now and then
    for 2,000 seconds; and what it ends with."""

    async def main() -> tuple[float, type[BaseException]]:
        loop = asyncio.get_running_loop()

        def respond(request: httpx.Request) -> httpx.Response:
            if request.headers["X-Client-Request-Id"] == "unlucky":
                return httpx.Response(status)
            return httpx.Response(200, json=default_reply("x").body)

        async def ask(client: OpenAIClient) -> tuple[float, type[BaseException]]:
            with pytest.raises(RetryableError) as told:
                await client.complete(BODY, request_id="unlucky")
            return loop.time(), told.type

        async with OpenAIClient(
            "http://server/v1", transport=httpx.MockTransport(respond), clock=loop.time
        ) as client:
            unlucky = asyncio.create_task(ask(client))
            for _ in range(20):
                await asyncio.sleep(100)
                await client.complete(BODY, request_id="lucky")
            return await unlucky

    return run_in_virtual_time(main())


def test_a_call_that_fails_while_others_are_answered_fails_alone() -> None:
    seconds, kind = ask_one_in_vain(500)
    assert kind is FailsAloneError
    assert RETRY_SECONDS - 8 < seconds <= RETRY_SECONDS


def test_too_many_says_nothing_of_the_call_and_is_borne_as_long_as_others_are_answered() -> None:
    seconds, kind = ask_one_in_vain(429)
    assert kind is ThrottledError
    assert seconds > 2_000 + RETRY_SECONDS - 8


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a fine "}, {"type": "text", "text": "film"}], "a fine film"),
        ([{"type": "image"}, "film", {"text": 5}], ""),
        (5, ""),
        (None, ""),
    ],
)
def test_an_answer_that_was_paid_for_is_taken_whatever_its_content(
    server: ApiServer, clock: Clock, content: Any, text: str
) -> None:
    server.reply = always(completion(content))
    assert ask(server.url, clock).content == text
    assert len(server.calls) == 1


def test_a_slow_server_is_not_one_that_cannot_be_reached(server: ApiServer, clock: Clock) -> None:
    """A first answer that does not come in time is waited for again."""

    def respond(request: httpx.Request) -> httpx.Response:
        clock.time += 120
        if clock.time < 1_200:
            raise httpx.ReadTimeout("", request=request)
        return httpx.Response(200, json=default_reply("x").body)

    async def main() -> str:
        async with OpenAIClient(
            "http://server/v1",
            transport=httpx.MockTransport(respond),
            clock=clock,
            sleep=clock.sleep,
        ) as client:
            return (await client.complete(BODY, request_id="x")).content

    assert asyncio.run(main()) == phrase("x")


@pytest.mark.parametrize(
    ("code", "param", "message"),
    [
        ("unsupported_parameter", "max_completion_tokens", "Unsupported parameter."),
        (None, None, "Unrecognized request argument supplied: max_completion_tokens"),
        (None, None, "body.max_completion_tokens: Extra inputs are not permitted"),
    ],
)
def test_an_older_server_is_recognised_by_any_of_its_words(
    server: ApiServer, clock: Clock, code: str | None, param: str | None, message: str
) -> None:
    server.script = [error(400, message, code=code, param=param)]
    assert ask(server.url, clock).content == phrase("call-1")
    assert "max_tokens" in server.calls[1].body


def test_the_key_is_hidden_in_an_answer_that_repeats_it(server: ApiServer, clock: Clock) -> None:
    server.reply = always(completion(f"the key is {KEY}"))
    assert ask(server.url, clock).content == "the key is [key]"


# Connections


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_was_never_reached_is_given_up_soon(server: ApiServer, clock: Clock) -> None:
    url = f"http://127.0.0.1:{free_port()}/v1"
    told = refusal(url, clock)
    assert (type(told), told.exit_code, told.status) == (UnreachableError, 4, None)
    assert f"cannot connect to {url}" in str(told)
    assert 7 < clock.time - 1_000 <= REACH_SECONDS == 15


def test_a_server_that_went_away_gets_five_minutes_to_come_back(
    server: ApiServer, clock: Clock
) -> None:
    async def main() -> None:
        async with open_client(server.url, clock) as client:
            await client.complete(BODY, request_id="a")
            server.close()
            with pytest.raises(RetryableError, match="cannot connect"):
                await client.complete(BODY, request_id="b")

    asyncio.run(main())
    assert RETRY_SECONDS - 8 < clock.time - 1_000 <= RETRY_SECONDS


def test_an_error_too_shows_that_the_server_is_there(server: ApiServer, clock: Clock) -> None:
    server.script = [error(503, "loading the model")]
    server.reply = always(Reply(reset=True))
    refusal(server.url, clock)
    assert clock.time - 1_000 > RETRY_SECONDS - 8


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (Reply(reset=True), "broke"),
        (Reply(body=b"{}", cut_after=1), "broke"),
        (Reply(stall=True), "sent nothing for 0.02 seconds"),
    ],
)
def test_what_broke_is_said(server: ApiServer, clock: Clock, reply: Reply, words: str) -> None:
    server.reply = always(reply)
    told = refusal(server.url, clock, read_seconds=0.02)
    assert words in str(told)
    assert (told.exit_code, told.status) == (4, None)


def test_200_calls_at_concurrency_8_take_at_most_8_connections(server: ApiServer) -> None:
    server.delay = 0.002
    answers = ask_many(server.url, 200, concurrency=8)
    assert [answer.content for answer in answers] == [phrase(str(i)) for i in range(200)]
    assert server.connections <= 8
    assert server.max_concurrent == 8


@pytest.mark.parametrize("concurrency", [1, 3, 40])
def test_as_many_calls_as_allowed_are_under_way_at_once(
    server: ApiServer, concurrency: int
) -> None:
    server.delay = 0.05
    ask_many(server.url, min(3 * concurrency, 40), concurrency=concurrency)
    assert server.max_concurrent == concurrency


def test_a_call_that_waits_to_try_again_leaves_its_place_to_others(server: ApiServer) -> None:
    server.script = [error(503, "busy", headers=AFTER_ONE_SECOND)]

    async def main() -> None:
        async with OpenAIClient(server.url, ApiKey(KEY), concurrency=1) as client:
            unlucky = asyncio.create_task(client.complete(BODY, request_id="unlucky"))
            await asyncio.sleep(0.05)
            await asyncio.wait_for(client.complete(BODY, request_id="lucky"), 0.5)
            unlucky.cancel()
            await asyncio.gather(unlucky, return_exceptions=True)

    asyncio.run(main())


def test_a_cancelled_call_leaves_its_place_to_others(server: ApiServer) -> None:
    server.script = [Reply(stall=True)]

    async def main() -> None:
        async with OpenAIClient(server.url, ApiKey(KEY), concurrency=1) as client:
            cancelled = asyncio.create_task(client.complete(BODY, request_id="cancelled"))
            await asyncio.sleep(0.05)
            cancelled.cancel()
            answer = await asyncio.wait_for(client.complete(BODY, request_id="a"), 5)
            assert answer.content == phrase("a")
            assert cancelled.cancelled()

    asyncio.run(main())


def test_a_kept_connection_that_the_server_closed_costs_no_failed_call(
    server: ApiServer, clock: Clock
) -> None:
    good = default_reply("call-1")
    good.close = True
    server.reply = always(good)

    async def main() -> None:
        async with open_client(server.url, clock) as client:
            for _ in range(5):
                await client.complete(BODY, request_id="call-1")
                await asyncio.sleep(0.02)

    asyncio.run(main())
    assert (len(server.calls), server.connections, clock.slept) == (5, 5, [])


# What is raised at once


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (301, RejectedError, "the request is refused"),
        (307, RejectedError, "the request is refused"),
        (400, RejectedError, "the request is refused"),
        (401, AuthenticationError, "check OPENAI_API_KEY"),
        (402, RejectedError, "the request is refused"),
        (403, AuthenticationError, "check OPENAI_API_KEY"),
        (404, UnknownModelError, "--base-url, which often ends in /v1"),
        (405, RejectedError, "the request is refused"),
        (413, RejectedError, "the request is refused"),
        (422, RejectedError, "the request is refused"),
    ],
)
def test_what_cannot_heal_is_raised_after_one_call(
    server: ApiServer, clock: Clock, status: int, kind: type[ApiError], words: str
) -> None:
    headers = {"Location": f"{server.url}/chat/completions"}
    server.reply = always(error(status, "what the server says", headers=headers))
    told = refusal(server.url, clock)
    assert (type(told), told.status, told.exit_code) == (kind, status, 5)
    assert f"what the server says (status {status})" in str(told)
    assert words in str(told)
    assert (len(server.calls), clock.slept) == (1, [])


@pytest.mark.parametrize("status", [400, 404])
def test_an_unknown_model_is_told_whatever_the_status(
    server: ApiServer, clock: Clock, status: int
) -> None:
    server.reply = always(error(status, "The model `x` does not exist", "model_not_found"))
    told = refusal(server.url, clock)
    assert (type(told), told.status) == (UnknownModelError, status)
    assert "name another model with --model" in str(told)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_final_whatever_x_should_retry_says(
    server: ApiServer, clock: Clock, status: int
) -> None:
    server.reply = always(error(status, "no", headers={"x-should-retry": "true"}))
    assert type(refusal(server.url, clock)) is AuthenticationError
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "reply",
    [
        error(429, "You exceeded your current quota", "insufficient_quota", "insufficient_quota"),
        error(429, "You exceeded your current quota", None, "insufficient_quota"),
        error(429, "You exceeded your current quota", "insufficient_quota", shape="flat"),
        error(
            429, "No", "insufficient_quota", headers={"x-should-retry": "true"} | AFTER_ONE_SECOND
        ),
        error(400, "Billing hard limit has been reached", "billing_hard_limit_reached"),
        error(429, "Your account is not active", "billing_not_active"),
    ],
)
def test_an_empty_account_is_told_after_one_call(
    server: ApiServer, clock: Clock, reply: Reply
) -> None:
    server.reply = always(reply)
    told = refusal(server.url, clock)
    assert (type(told), told.status, told.exit_code) == (QuotaError, reply.status, 5)
    assert "quota is used up, which waiting does not change" in str(told)
    assert (len(server.calls), clock.slept) == (1, [])


OPENAI_OVERFLOW = (
    "This model's maximum context length is 8192 tokens. However, your messages resulted in 9001 "
    "tokens. Please reduce the length of the messages."
)
VLLM_OVERFLOW = (
    "You passed 4097 input tokens and requested 50 output tokens. However, the model's context "
    "length is only 4096 tokens, resulting in a maximum input length of 4046 tokens."
)
LLAMA_OVERFLOW = "request (9001 tokens) exceeds the available context size (8192 tokens)"


@pytest.mark.parametrize(
    "reply",
    [
        error(400, OPENAI_OVERFLOW, "context_length_exceeded", "invalid_request_error"),
        error(400, "Input is too long", "context_length_exceeded"),
        error(413, "Input is too long", "context_length_exceeded"),
        error(400, LLAMA_OVERFLOW, 400, "exceed_context_size_error"),
        error(400, LLAMA_OVERFLOW, 400, "invalid_request_error"),
        error(400, OPENAI_OVERFLOW, 400, "BadRequestError", shape="flat"),
        error(400, OPENAI_OVERFLOW, 400, "BadRequestError"),
        error(400, VLLM_OVERFLOW, 400, "BadRequestError", "input_tokens"),
        error(
            400,
            "The decoder prompt (length 5951) is longer than the maximum model length of 4096.",
            400,
        ),
        # Names the limit on the answer's length, but it is the text that is too long.
        error(400, f"'max_completion_tokens' is too large: 50. {OPENAI_OVERFLOW}", 400),
        error(400, "The input (9 tokens) is longer than the model's context length (8 tokens)."),
    ],
)
def test_a_text_too_long_for_the_model_has_an_error_of_its_own(
    server: ApiServer, clock: Clock, reply: Reply
) -> None:
    server.reply = always(reply)
    told = refusal(server.url, clock)
    assert (type(told), told.status, told.exit_code) == (ContextOverflowError, reply.status, 5)
    assert len(server.calls) == 1


def azure_filter(code: str | None) -> Reply:
    reply = error(400, "The response was filtered", code, param="prompt")
    inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}}
    reply.body["error"] |= {"status": 400, "innererror": inner}  # type: ignore[index]
    return reply


@pytest.mark.parametrize(
    "reply",
    [
        azure_filter("content_filter"),
        azure_filter(None),
        error(400, "filtered", "content_filter"),
        error(400, "Invalid prompt: your prompt was flagged", "invalid_prompt"),
    ],
)
def test_a_filtered_text_has_an_error_of_its_own(
    server: ApiServer, clock: Clock, reply: Reply
) -> None:
    server.reply = always(reply)
    told = refusal(server.url, clock)
    assert (type(told), told.status, told.exit_code) == (ContentFilterError, 400, 5)
    assert len(server.calls) == 1


PAGE = b"<html>\r\n<head><title>403 Forbidden</title></head>\r\n</html>\r\n"


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(400, "the reason", "some_code", "invalid_request_error"), "the reason (status"),
        (error(400, "the reason", 400, "BadRequestError"), "the reason (status"),
        (Reply(400, body={"error": {"message": "the reason"}}), "the reason (status"),
        (Reply(400, body={"error": {"code": "c"}}), '{"error": {"code": "c"}} (status'),
        (Reply(400, body={"error": {}}), '{"error": {}} (status'),
        (error(400, "the reason", 400, "BadRequestError", shape="flat"), "the reason (status"),
        (error(400, "the reason", shape="string"), "the reason (status"),
        (error(400, "the reason", shape="detail"), "the reason (status"),
        (
            Reply(400, body={"detail": [{"loc": ["body", "model"], "msg": "Field required"}]}),
            '[{"loc": ["body", "model"], "msg": "Field required"}] (status',
        ),
        (Reply(400, body=["the reason"]), '["the reason"] (status'),
        (Reply(400, body=PAGE), "<html> <head><title>403 Forbidden</title></head> </html> (status"),
        (Reply(400, body=b"\xff\xfe"), "(status"),
        (Reply(400, body=b"[" * 100_000), "(status"),
        (Reply(400, body=b""), "no reason given (status"),
        (Reply(400, body=b"null"), "no reason given (status"),
        (error(400, "two\n  lines"), "two lines (status"),
    ],
)
def test_a_refusal_says_in_one_line_what_the_server_said_in_whatever_shape(
    server: ApiServer, clock: Clock, reply: Reply, said: str
) -> None:
    server.reply = always(reply)
    told = refusal(server.url, clock)
    assert type(told) is RejectedError
    assert said in str(told)


def test_a_page_of_words_is_cut(server: ApiServer, clock: Clock) -> None:
    server.reply = always(Reply(403, body=b"<p>Some words and more words</p>\n" * 1_000))
    told = refusal(server.url, clock)
    assert "<p>Some words" in str(told)
    assert len(str(told)) < SHOWN + 150


@pytest.mark.parametrize(
    ("reply", "kind", "status"),
    [
        (error(200, "bad", 400, "invalid_request_error"), RejectedError, 400),
        (error(200, "bad", "some_code", "invalid_request_error"), RejectedError, 400),
        (error(200, "bad", 401, "authentication_error"), AuthenticationError, 401),
        (error(200, "bad", 404, "not_found_error"), UnknownModelError, 404),
        (error(200, LLAMA_OVERFLOW, 400, "exceed_context_size_error"), ContextOverflowError, 400),
        (error(200, OPENAI_OVERFLOW, 400, shape="flat"), ContextOverflowError, 400),
        (error(200, "bad", 400, "BadRequestError", shape="flat"), RejectedError, 400),
        (error(200, "no money", "insufficient_quota"), QuotaError, 400),
        (error(200, "filtered", "content_filter"), ContentFilterError, 500),
    ],
)
def test_an_error_under_status_200_is_an_error(
    server: ApiServer, clock: Clock, reply: Reply, kind: type[ApiError], status: int
) -> None:
    server.reply = always(reply)
    told = refusal(server.url, clock)
    assert (type(told), told.status) == (kind, status)
    assert len(server.calls) == 1


@pytest.mark.parametrize(
    "reply",
    [
        error(200, "Loading model", 503, "unavailable_error"),
        error(200, "too many", 429),
        error(200, "out of memory", 500, "server_error"),
        error(200, "model runner has unexpectedly stopped", shape="string"),
        error(200, "engine died", 500, shape="flat"),
    ],
)
def test_an_error_under_status_200_that_may_heal_is_tried_again(
    server: ApiServer, clock: Clock, reply: Reply
) -> None:
    server.script = [reply]
    assert ask(server.url, clock).content == phrase("call-1")
    assert len(server.calls) == 2


# The limit's two names


def older(request_id: str, body: dict[str, Any]) -> Reply:
    """A server from before `max_completion_tokens`."""
    if "max_completion_tokens" in body:
        return error(400, "Unrecognized request argument supplied: max_completion_tokens")
    return default_reply(request_id)


def strict(request_id: str, body: dict[str, Any]) -> Reply:
    """One that is written in FastAPI and forbids what it does not know."""
    if "max_completion_tokens" in body:
        fields = {"loc": ["body", "max_completion_tokens"], "msg": "Extra inputs not permitted"}
        return Reply(422, body={"detail": [fields]})
    return default_reply(request_id)


@pytest.mark.parametrize("reply", [older, strict])
def test_an_older_server_gets_max_tokens_from_the_second_attempt_on(
    server: ApiServer, clock: Clock, reply: Answer
) -> None:
    server.reply = reply

    async def main() -> None:
        async with open_client(server.url, clock) as client:
            for i in range(3):
                assert (await client.complete(BODY, request_id=str(i))).content == phrase(str(i))

    asyncio.run(main())
    names = [sorted(call.body)[0] for call in server.calls]
    assert names == ["max_completion_tokens"] + ["max_tokens"] * 3
    assert [call.body["max_tokens"] for call in server.calls[1:]] == [50] * 3
    assert clock.slept == []
    assert BODY["max_completion_tokens"] == 50


def test_32_calls_at_once_swap_the_name_of_the_limit_once(server: ApiServer) -> None:
    server.reply, server.delay = older, 0.02

    async def main() -> None:
        async with OpenAIClient(server.url, ApiKey(KEY)) as client:
            for names in (range(32), range(32, 96)):
                calls = (client.complete(BODY, request_id=str(i)) for i in names)
                answers = await asyncio.gather(*calls)
                assert [answer.content for answer in answers] == [phrase(str(i)) for i in names]

    asyncio.run(main())
    refused = [call.request_id for call in server.calls if "max_completion_tokens" in call.body]
    assert sorted(refused, key=int) == [str(i) for i in range(32)]  # each once, and no other
    assert len(server.calls) == 32 + 96
    assert server.answered == {str(i): 1 for i in range(96)}


def test_a_server_that_knows_neither_name_is_asked_twice(server: ApiServer, clock: Clock) -> None:
    server.reply = always(error(400, "Unknown parameter: 'max_completion_tokens'"))
    told = refusal(server.url, clock)
    assert (type(told), told.status) == (RejectedError, 400)
    assert "Unknown parameter" in str(told)
    assert len(server.calls) == 2


def test_a_limit_whose_value_is_refused_keeps_its_name(server: ApiServer, clock: Clock) -> None:
    server.reply = always(error(400, "max_completion_tokens is too large: 5000"))
    told = refusal(server.url, clock)
    assert (type(told), told.status) == (RejectedError, 400)
    assert "too large" in str(told)
    assert len(server.calls) == 1


def test_a_newer_server_never_sees_max_tokens(server: ApiServer) -> None:
    ask_many(server.url, 20)
    assert not any("max_tokens" in call.body for call in server.calls)


# Addresses and keys


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "api.openai.com/v1",
        "/v1",
        "ftp://host/v1",
        "file:///etc/passwd",
        "http://",
        "https:///v1",
        "http://host:port/v1",
        "http://host/v1#part",
        "http://ho st/v1\n",
        None,
    ],
)
def test_what_is_no_address_of_a_server_is_refused_by_name(url: Any) -> None:
    with pytest.raises(
        UsageError, match=r"the base URL is .*; expected an address such as"
    ) as told:
        OpenAIClient(url)
    assert repr(url) in str(told.value)
    assert told.value.exit_code == 2


@pytest.mark.parametrize(
    "url", ["https://me:hunter2@host/v1", "https://hunter2@host/v1", "https://me:hunter2@host:x/v1"]
)
def test_an_address_with_a_password_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UsageError, match="one with a user name or password") as told:
        check_base_url(url)
    assert "hunter2" not in str(told.value)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1//", "http://localhost:8000/v1"),
        ("https://host", "https://host"),
        ("https://host/v1/?api-version=1/", "https://host/v1?api-version=1/"),
        ("HTTPS://Host/V1", "HTTPS://Host/V1"),
    ],
)
def test_an_address_loses_only_the_slash_at_its_end(url: str, expected: str) -> None:
    assert check_base_url(url) == expected


def test_messages_name_the_address_without_its_query(server: ApiServer, clock: Clock) -> None:
    server.reply = always(error(400, "no"))
    told = refusal(f"{server.url}?api-version=1&sig=hunter2", clock)
    assert "hunter2" not in str(told)


@pytest.mark.parametrize("url", ["http://api.example.com/v1", "http://8.8.8.8/v1"])
def test_a_key_over_plain_http_to_a_public_host_is_warned_of(url: str) -> None:
    host = httpx.URL(url).host
    with pytest.warns(TwoStageWarning, match=f"the key goes to {host} over plain http") as told:
        OpenAIClient(url, ApiKey(KEY))
    assert [warning.filename for warning in told] == [__file__]
    assert KEY not in str(told[0].message)


@pytest.mark.parametrize(
    "host",
    ["localhost:8", "127.0.0.1", "[::1]:8", "10.1.2.3", "192.168.0.5", "gpu-box", "box.local"],
)
def test_a_key_over_plain_http_to_a_host_nearby_is_fine(host: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenAIClient(f"http://{host}/v1", ApiKey(KEY))


def test_plain_http_without_a_key_and_https_with_one_are_fine() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        OpenAIClient("http://api.example.com/v1")
        OpenAIClient("https://api.example.com/v1", ApiKey(KEY))


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_used_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "nonsense://me:hunter2@proxy:1")
    with pytest.raises(UsageError, match="check HTTP_PROXY, HTTPS_PROXY") as told:
        OpenAIClient("https://api.example.com/v1")
    assert "hunter2" not in "".join(traceback.format_exception(told.value))


BROKEN_KEYS = ["", "  \n", "sk-first part", "sk-wörter", "sk-\x00null", "sk-line\nsk-line"]


@pytest.mark.parametrize("i", range(len(BROKEN_KEYS)))  # no local variable here holds the key
def test_a_key_that_cannot_stand_in_a_header_is_refused_unseen(i: int) -> None:
    with pytest.raises(UsageError, match=r"^the file key.txt is empty or holds char") as told:
        ApiKey(BROKEN_KEYS[i], "the file key.txt")
    assert told.value.exit_code == 2
    report = traceback.TracebackException.from_exception(told.value, capture_locals=True)
    assert "sk-" not in "".join(report.format())


def test_blanks_around_a_key_do_not_matter(server: ApiServer, clock: Clock) -> None:
    ask(server.url, clock, key=ApiKey(f"  {KEY}\n"))
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"


# Who sees the key

ECHO = f"Incorrect API key provided: {KEY}. Find yours at https://example.com."


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (error(401, ECHO), "Incorrect API key provided: [key]"),
        (error(400, ECHO), "[key]"),
        (error(429, ECHO, "insufficient_quota"), "[key]"),
        (error(404, ECHO), "[key]"),
        (error(503, ECHO), "[key]"),
        (error(429, ECHO, headers={"retry-after": "999"}), "[key]"),
        (error(200, ECHO, 401), "[key]"),
        (error(200, ECHO, 500), "[key]"),
        (error(401, ECHO, shape="flat"), "[key]"),
        (error(401, ECHO, shape="string"), "[key]"),
        (error(401, ECHO, shape="detail"), "[key]"),
        (Reply(401, body={"detail": [{"headers": {"authorization": f"Bearer {KEY}"}}]}), "[key]"),
        (Reply(401, body=f"<p>{ECHO}</p>".encode()), "[key]"),
        (Reply(401, body=f'{{"error": "{KEY}'.encode()), "[key]"),
        (error(400, f"max_completion_tokens: {ECHO}"), "[key]"),
        (Reply(body=f"not JSON: {ECHO}".encode()), "the answer is not JSON"),
        (Reply(body={"choices": [ECHO]}), "not a chat completion"),
        (Reply(reset=True), "broke"),
        (Reply(stall=True), "sent nothing for"),
        (Reply(body=b"{}", cut_after=1), "broke"),
        # Where the message is cut, a part of the key could stay.
        *[(error(401, "x " * (SHOWN // 2 - n) + ECHO), "the key is refused") for n in range(8, 32)],
        (Reply(401, body=b" " * (4 * SHOWN - 40) + ECHO.encode()), "[key]"),
    ],
)
def test_no_error_log_or_traceback_shows_the_key(
    server: ApiServer,
    clock: Clock,
    caplog: pytest.LogCaptureFixture,
    reply: Reply,
    words: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    server.reply = always(reply)
    told = refusal(server.url, clock, read_seconds=0.01)
    assert words in str(told)
    assert_unseen(told, caplog)
    assert {"httpcore.http11", "httpcore.connection"} <= {record.name for record in caplog.records}
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"


def test_a_broken_header_is_quoted_without_the_key(server: ApiServer, clock: Clock) -> None:
    server.reply = always(Reply(400, {"Not a header": KEY}))
    assert "Not a header: [key]" in str(refusal(server.url, clock))


def test_no_error_of_a_server_that_is_not_there_shows_the_key(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = refusal(f"http://127.0.0.1:{free_port()}/v1?api-version=1", clock)
    assert_unseen(told, caplog)
    assert "httpcore.connection" in {record.name for record in caplog.records}


def test_no_log_of_a_good_call_shows_the_key(
    server: ApiServer, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ask(f"{server.url}?api-version=1", clock)
    assert server.calls[0].headers["api-key"] == KEY
    assert {"httpx", "httpcore.http11"} <= {record.name for record in caplog.records}
    assert_unseen(None, caplog)


def assert_unseen(told: BaseException | None, caplog: pytest.LogCaptureFixture) -> None:
    """Not even a good part of the key."""
    shown = [caplog.text, *(f"{record.getMessage()} {vars(record)}" for record in caplog.records)]
    chain = [told] if told else []
    for link in chain:  # which grows
        shown += [str(link), repr(link), repr(vars(link)), repr(link.args)]
        shown += traceback.format_exception(link)
        report = traceback.TracebackException.from_exception(link, capture_locals=True)
        shown += report.format()
        chain += [e for e in (link.__cause__, link.__context__) if e and e not in chain]
    for text in shown:
        assert KEY[:12] not in text
        assert KEY[-12:] not in text


def test_neither_client_nor_key_shows_the_key() -> None:
    key = ApiKey(KEY)
    client = OpenAIClient("https://host/v1", key)
    for thing in (key, client):
        for text in (str(thing), repr(thing), repr(vars(thing)), f"{thing}"):
            assert KEY not in text


def test_a_placeholder_for_a_key_is_not_hidden_in_messages(server: ApiServer, clock: Clock) -> None:
    server.reply = always(error(400, "the ollama server says no"))
    assert "the ollama server says no" in str(refusal(server.url, clock, key=ApiKey("ollama")))


# The server of these tests


def test_the_default_answer_depends_on_the_request_id_alone() -> None:
    assert default_reply("a", {"x": 1}).body == default_reply("a").body != default_reply("b").body
    rng = random.Random(0)
    phrases = {phrase(str(rng.random())) for _ in range(1_000)}
    assert len(phrases) == 1_000
    assert all(4 <= len(text.split()) <= 7 for text in phrases)


def test_unknown_paths_are_404_in_the_shape_of_openai(server: ApiServer) -> None:
    reply = httpx.get(f"{server.url}/models", trust_env=False)
    assert reply.status_code == 404
    assert "Invalid URL" in reply.json()["error"]["message"]


def test_clients_that_vanish_do_the_server_no_harm(server: ApiServer, clock: Clock) -> None:
    server.delay = 0.02
    port = httpx.URL(server.url).port
    head = b"POST /v1/chat/completions HTTP/1.1\r\nX-Client-Request-Id: gone\r\n"
    for sent in (b"", b"POST", head, head + b"Content-Length: 2\r\n\r\n{}"):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(sent)
    assert ask(server.url, clock).content == phrase("call-1")
    assert server.answered == {"call-1": 1}
    assert [call.request_id for call in server.calls].count("gone") == 5


def test_only_whole_good_answers_count_as_answered(server: ApiServer, clock: Clock) -> None:
    good = default_reply("call-1").body
    server.script = [
        error(503, "busy"),
        error(200, "busy", 503),
        Reply(body=good, cut_after=20),
        Reply(body=good, reset=True),
        Reply(body=b"{}"),
    ]
    ask(server.url, clock)
    assert server.answered == {"call-1": 1}
    assert len(server.calls) == 6
