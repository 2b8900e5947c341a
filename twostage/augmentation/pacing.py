"""One pace for all calls to a server, so that nobody is told "too many" twice for one mistake.

A call waits for its turn, and three things put a turn off:

    limits      requests and tokens a minute, given, or read from the server's rate headers: turns
                stand 60 / limit seconds apart (for tokens: 60 / limit for each token of the call)
    a pause     after a 429, or where the headers say that nothing is left: nobody sends before the
                moment that the server names
    slowing     after a 429 turns also stand further apart: half as long again as the answers of
                late have stood (or as the turns did). Each answer after that takes 0.5 % off.

A 429 to a call that was sent before the last slowing says nothing new: of the 64 calls that were
on their way when the limit was met, one slows us, and 63 don't.
"""

import asyncio
import math
import re
import time
from collections.abc import Awaitable, Callable, Mapping

MAX_PAUSE_FOR_HEADERS = 60.0
"""Seconds. Headers tell when a limit is whole again; the first call may pass long before."""
_SLOWER, _FASTER = 1.5, 0.995
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
        self._slowed_at = clock()
        self._answered_since = 0

    async def wait_turn(self, tokens: int) -> float:
        """Return when a call of so many tokens may be sent: the time of that moment."""
        while True:
            now = self._clock()
            if now < self._resume_at:
                await self._sleep(self._resume_at - now)
                continue
            turn = max(now, self._next_by_requests, self._next_by_tokens)
            self._next_by_requests = turn + max(self._seconds_a_request, self._spacing)
            self._next_by_tokens = turn + tokens * self._seconds_a_token
            if turn > now:
                await self._sleep(turn - now)
                now = self._clock()
            if now >= self._resume_at:  # else a pause began meanwhile: queue again after it
                return now

    def answered(self) -> None:
        """A call got its answer."""
        self._answered_since += 1
        self._spacing *= _FASTER

    def throttled(self, sent_at: float, wait: float) -> None:
        """A call sent at `sent_at` was told "too many", and to wait so many seconds."""
        now = self._clock()
        self._resume_at = max(self._resume_at, now + wait)
        if sent_at <= self._slowed_at:
            return
        seconds_an_answer = (now - self._slowed_at) / (self._answered_since + 1)
        self._spacing = _SLOWER * (self._spacing or seconds_an_answer)
        # What was in the queue was given its turn at the pace that was too fast.
        self._next_by_requests = self._resume_at
        self._slowed_at, self._answered_since = now, 0

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
