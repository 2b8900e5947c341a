"""One pace for all calls to a server, so that nobody is told "too many" twice for one mistake.

A call waits for its turn, and three things put a turn off:

    limits      requests and tokens a minute, given, or read from the server's rate headers: turns
                stand 60 / limit seconds apart (for tokens: 60 / limit for each token of the call)
    a pause     after a 429, or where the headers say that nothing is left: nobody sends before the
                moment that the server names
    slowing     after a 429 turns also stand further apart: a quarter further than they did, but
                at least as far as the answers of the last minute have stood, and at most a quarter
                further than those. Each answer after that takes a quarter of a percent off.

What the server lets through in a minute is the best guess at its limit there is: however often it
says no while it lets nothing through, the guess stays, and turns don't drift apart without end. A
no that follows a no, without an answer in between, makes the pause longer instead.

A 429 to a call that was sent before the last slowing says nothing new: of the 64 calls that were
on their way when the limit was met, one slows us, and 63 don't.

Calls queue up, and only the first in the queue looks at the clock. To hand out moments ahead of
time would be simpler, but then slowing comes too late for all who hold one: in a simulation of a
server that allows 60 requests a minute, each 429 led to the next, and 6 % of the limit was used
(now: 85 % and more; tests/augmentation/test_pacing.py has the simulation).
"""

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping

MAX_PAUSE_FOR_HEADERS = 60.0
"""Seconds. Headers tell when a limit is whole again; the first call may pass long before."""
_SLOWER, _FASTER = 1.25, 0.9975
_MINUTE = 60.0
_FIRST_SPACING = 0.1
"""Seconds between turns after a 429 that came before any answer."""
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Pacer:
    """Gives turns. Times are of `clock`, in seconds."""

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """Limits that are given hold; those that are None are learnt from the server."""
        self._given = (requests_per_minute, tokens_per_minute)
        self._clock, self._sleep = clock, sleep
        self._seconds_a_request = 60 / requests_per_minute if requests_per_minute else 0.0
        self._seconds_a_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_by_requests = self._next_by_tokens = self._resume_at = -math.inf
        self._spacing = 0.0
        self._slowed_at = -math.inf
        self._answers: deque[float] = deque()  # when they came: those of a minute
        self._refusals = 0  # slowings since the last answer
        self._queue = asyncio.Lock()

    async def wait_turn(self, tokens: int) -> float:
        """Return when a call of so many tokens may be sent: the time of that moment."""
        async with self._queue:
            turn = now = self._clock()
            while (due := self._due()) > now:
                await self._sleep(due - now)
                # The next turn counts from when this one was due: to wake late costs no pace.
                turn, now = due, self._clock()
            self._next_by_requests = turn + max(self._seconds_a_request, self._spacing)
            self._next_by_tokens = turn + tokens * self._seconds_a_token
            return now

    def _due(self) -> float:
        return max(self._resume_at, self._next_by_requests, self._next_by_tokens)

    def answered(self) -> None:
        """A call got its answer."""
        now = self._clock()
        self._answers.append(now)
        while self._answers[0] < now - _MINUTE:
            self._answers.popleft()
        self._refusals = 0
        self._spacing *= _FASTER

    def throttled(self, sent_at: float, wait: float) -> None:
        """A call sent at `sent_at` was told "too many", and to wait so many seconds."""
        now = self._clock()
        self._resume_at = max(self._resume_at, now + wait)
        if sent_at <= self._slowed_at:
            return
        # Like one call's own waits, but over all calls: each may be at its first.
        self._resume_at = max(self._resume_at, now + min(0.375 * 2**self._refusals, 6.0))
        self._refusals += 1
        answer_spacing = _FIRST_SPACING
        if self._answers:
            answer_spacing = min(now - self._answers[0], _MINUTE) / len(self._answers)
        self._spacing = min(max(_SLOWER * self._spacing, answer_spacing), _SLOWER * answer_spacing)
        self._slowed_at = now

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take over what the server says of its limits; 0, -1 and nonsense say nothing."""
        for given, kind in zip(self._given, ("requests", "tokens"), strict=True):
            limit = _number(headers.get(f"x-ratelimit-limit-{kind}"))
            if limit is None or limit <= 0:
                continue
            if given is None and kind == "requests":
                self._seconds_a_request = 60 / limit
            elif given is None:
                self._seconds_a_token = 60 / limit
            left = _number(headers.get(f"x-ratelimit-remaining-{kind}"))
            reset = parse_duration(headers.get(f"x-ratelimit-reset-{kind}"))
            if left == 0 and reset is not None:
                pause = min(reset, MAX_PAUSE_FOR_HEADERS)
                self._resume_at = max(self._resume_at, self._clock() + pause)


def parse_duration(text: str | None) -> float | None:
    """Seconds in `120ms`, `1s`, `6m0s` or a bare number; None for anything else."""
    number = _number(text)
    if number is not None:
        return number if number >= 0 else None
    if not text or not re.fullmatch(f"({_DURATION.pattern})+", text.strip()):
        return None
    return sum(float(value) * _SECONDS[unit] for value, unit in _DURATION.findall(text))


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None
