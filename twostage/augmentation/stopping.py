"""Ending a job early: one door for a signal, a used-up budget, and an error that cannot heal.

Nobody starts anything new after that. What is on its way may still arrive: it is paid for.
"""

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")

GRACE_SECONDS = {signal.SIGINT: 30.0, signal.SIGTERM: 8.0}
"""How long after a signal answers on their way may still arrive. A second signal ends that. Who
sends SIGTERM often sends SIGKILL ten seconds later."""


class Interrupted(Exception):
    """A signal asked to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Stopped(Exception):
    """Raised where the job waits, when it is to wait no longer."""


class Stop:
    """Why a job ends early; the first reason counts."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        """say: is told what a signal waits for"""
        self.reason: Exception | None = None
        self._say = say
        self._stopped, self._signalled, self._hurry = (asyncio.Event() for _ in range(3))

    def because(self, reason: Exception) -> None:
        if isinstance(reason, Interrupted):
            (self._hurry if self._signalled.is_set() else self._signalled).set()
        self.reason = self.reason or reason
        self._stopped.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, unless the job is to end: for whoever waits between two calls."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopped.wait(), seconds)
        if self.reason:
            raise Stopped

    async def run(self, work: Awaitable[T]) -> T:
        """Await the work, or let it end in good order and raise the reason."""
        task = asyncio.ensure_future(work)
        await _first_of(task, self._signalled.wait())
        if not task.done():
            signum = self.reason.signum if isinstance(self.reason, Interrupted) else signal.SIGINT
            seconds = GRACE_SECONDS[signal.Signals(signum)]
            self._say(f"\nwaiting up to {seconds:g} seconds for answers on their way")
            await _first_of(task, self._hurry.wait(), seconds)
            task.cancel()
        try:
            result = await task
        except (Stopped, asyncio.CancelledError):
            if not self.reason:
                raise
        if self.reason:
            raise self.reason
        return result

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM become reasons to stop, but for those that the process ignores.

        Only the main thread can hear them.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(signum: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.because, Interrupted(signum))

        heard = [s for s in GRACE_SECONDS if signal.getsignal(s) != signal.SIG_IGN]
        previous = {s: signal.signal(s, stop) for s in heard}
        try:
            yield
        finally:
            for signum, handler in previous.items():
                signal.signal(signum, handler)


async def _first_of(
    task: asyncio.Future[Any], other: Awaitable[object], timeout: float | None = None
) -> None:
    waiter = asyncio.ensure_future(other)
    await asyncio.wait({task, waiter}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    waiter.cancel()
