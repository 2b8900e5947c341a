"""Getting the answers of a round: from the journal, from a server call by call or in batches.

A source has two methods. `fetch` makes sure that a round's answers are there, and raises the reason
when it stops early; `get` gives one answer by its key. What was paid for is on disk before anything
else happens with it: a call's place is free for the next only when its answer is in the journal, so
that a crash can cost no more answers than there are calls at once.

Stopping early has one door, `Stop`: a signal, the budget, an error that cannot heal. Nobody starts
anything new after that; what is on its way may still arrive.
"""

import asyncio
import signal
import threading
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ..errors import PartialOutputError, UsageError
from ..progress import Bar, progress_bar
from .batch_api import answer_by_batches, keys_under_way
from .journal import Answer, Journal
from .lexical_edits import LexicalEditor
from .openai_client import (
    Completion,
    ContentFilterError,
    ContextOverflowError,
    FailsAloneError,
    OpenAIClient,
    RejectedError,
)
from .paraphrase import PROMPT_FILTER, ParaphraseSettings, Pool, Request, Round, estimate_tokens
from .prices import BATCH_SHARE, Price
from .quality import COPY, GOOD, TRUNCATED, clean, judge

T = TypeVar("T")

GRACE_SECONDS = {signal.SIGINT: 30.0, signal.SIGTERM: 8.0}
"""How long after a signal answers on their way may still arrive. A second signal ends that. Who
sends SIGTERM often sends SIGKILL ten seconds later."""
HOPELESS = 50
"""Answers, none of them of any use, after which a job that has no good one stops."""
SHORTENING = 0.75
"""What is left of a text that was too long for the model, each time that it was."""


class Interrupted(Exception):
    """A signal asked to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _Stopped(Exception):
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
            raise _Stopped

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
        except (_Stopped, asyncio.CancelledError):
            if not self.reason:
                raise
        if self.reason:
            raise self.reason
        return result

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM become reasons to stop. Only the main thread can hear them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()

        def stop(signum: int, frame: FrameType | None) -> None:
            loop.call_soon_threadsafe(self.because, Interrupted(signum))

        previous = {s: signal.signal(s, stop) for s in (signal.SIGINT, signal.SIGTERM)}
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


class Spending:
    """What a job has cost, earlier runs of it included, and what it may still cost."""

    def __init__(self, price: Price | None = None, budget: float | None = None) -> None:
        """budget: US dollars; needs a price"""
        self.price, self.budget = price, budget
        self.calls = self.earlier_calls = self.reused = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.dollars = 0.0
        self._reserved = 0.0

    def add(self, answer: Answer, *, earlier: bool = False) -> None:
        """An answer was paid for; `earlier`: by another run of this job."""
        if answer.reused:
            self.reused += 1
            return
        self.calls += not earlier
        self.earlier_calls += earlier
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        if self.price:
            share = BATCH_SHARE if answer.batch else 1.0
            self.dollars += share * self.price.cost(answer.prompt_tokens, answer.completion_tokens)

    def most(self, request: Request, settings: ParaphraseSettings, share: float = 1.0) -> float:
        """The highest price: as if each byte were a token, and the answer as long as it may be."""
        if self.price is None:
            return 0.0
        prompt_bytes = len(settings.message(request.text).encode()) + 16
        return share * self.price.cost(prompt_bytes, settings.limit(request.text))

    def allows(self, dollars: float) -> bool:
        return self.budget is None or self.dollars + self._reserved + dollars <= self.budget

    @contextmanager
    def reserve(self, dollars: float) -> Iterator[None]:
        """While a call is under way, its highest price counts as spent."""
        self._reserved += dollars
        try:
            yield
        finally:
            self._reserved -= dollars

    def __str__(self) -> str:
        tokens = self.prompt_tokens + self.completion_tokens
        shown = f"{tokens / 1e6:.2f} M tokens" if tokens >= 1e5 else f"{tokens:,} tokens"
        return f"{shown}, {show_dollars(self.dollars)}" if self.price else shown


def show_dollars(dollars: float) -> str:
    """To the cent; less than a dollar to a hundredth of a cent."""
    return f"${dollars:.2f}" if dollars >= 1 or dollars == 0 else f"${dollars:.4f}"


class BudgetError(PartialOutputError):
    """The next call could cost more than is left of the budget."""


class ServerAnswers:
    """Answers of a server, each asked for once in its life.

    elsewhere: journals of other folders, whose answers are taken over instead of paid for again
    batch_state: where the Batch API's state is kept
    batch: ask through the Batch API, not call by call
    """

    def __init__(
        self,
        client: OpenAIClient,
        journal: Journal,
        settings: ParaphraseSettings,
        spending: Spending,
        stop: Stop,
        *,
        elsewhere: Sequence[Journal] = (),
        concurrency: int = 32,
        batch_state: Path,
        batch: bool = False,
        where: Callable[[int], str] = "row {}".format,
        show_progress: bool = False,
    ) -> None:
        self.get = journal.get
        self._client, self._journal, self._settings = client, journal, settings
        self._spending, self._stop, self._elsewhere = spending, stop, elsewhere
        self._concurrency, self._batch, self._batch_state = concurrency, batch, batch_state
        self._where, self._show_progress = where, show_progress
        self._any_use, self._useless = False, Counter[str]()
        self.failed: dict[int, str] = {}
        """What calls for these rows failed of, again and again, while others were answered. Their
        draws are given up, and asked for again in the next run."""

    async def fetch(self, asked: Round) -> None:
        """Returns when the journal has an answer to every request of the round.

        Raises BudgetError, ApiError or UsageError (disk), or Interrupted, when it has not; all that
        came until then is in the journal.
        """
        missing = self._missing(asked.requests)
        total = len(asked.requests)
        with progress_bar(
            asked.title, total, "answer", self._show_progress, initial=total - len(missing)
        ) as bar:
            bar.set_postfix_str(str(self._spending))
            if self._batch:
                missing = await self._fetch_in_batches(missing, self._batch_state, bar)
            elif under_way := keys_under_way(self._batch_state) & {r.key for r in missing}:
                raise UsageError(
                    f"{len(under_way)} of the requests are under way in batches, and will be paid "
                    f"for; run with --batch to get their answers, or delete {self._batch_state} "
                    "to give them up"
                )
            await self._fetch_one_by_one(missing, bar)

    def _missing(self, requests: Sequence[Request]) -> list[Request]:
        """The requests to be paid for, once other folders have given what they have."""
        found = []
        for request in requests:
            if request.key not in self._journal:
                answers = (journal.get(request.key) for journal in self._elsewhere)
                answer = next(filter(None, answers), None)
                if answer:
                    found.append((request.key, replace(answer, reused=True)))
        self._journal.add(found)
        missing = []
        for request in requests:
            answer = self._journal.get(request.key)
            if answer is None:
                missing.append(request)
            else:
                self._spending.add(answer, earlier=True)
                self._watch(request, answer)
        return missing

    async def _fetch_one_by_one(self, requests: Sequence[Request], bar: Bar) -> None:
        waiting = deque(requests)
        under_way = 0

        async def work() -> None:
            nonlocal under_way
            while waiting and not self._stop.reason:
                most = self._spending.most(waiting[0], self._settings)
                if not self._spending.allows(most):
                    if under_way == 0:
                        raise self._budget_error(len(waiting))
                    return  # those under way may turn out cheaper, and go on
                request = waiting.popleft()
                under_way += 1
                try:
                    with self._spending.reserve(most):
                        answer = await self._ask(request)
                        await self._journal.append(request.key, answer)
                    self._spending.add(answer)
                except FailsAloneError as error:
                    self.failed[request.row] = str(error)
                    continue
                finally:
                    under_way -= 1
                self._watch(request, answer)
                bar.set_postfix_str(str(self._spending))
                bar.update(1)

        async def work_until_stopped() -> None:
            try:
                await work()
            except _Stopped:
                pass
            except Exception as reason:
                self._stop.because(reason)

        async def work_together() -> None:
            places = min(self._concurrency, len(waiting))
            try:
                await asyncio.gather(*(work_until_stopped() for _ in range(places)))
            finally:
                await self._journal.flush()

        await self._stop.run(work_together())

    def _watch(self, request: Request, answer: Answer) -> None:
        """Stop a job whose every answer is useless before it has paid for all of them."""
        text = clean(answer.content, request.text)
        verdict = judge(text, answer.finish_reason, request.text)
        self._any_use |= verdict in (GOOD, COPY)
        self._useless[verdict] += 1
        if not self._any_use and self._useless.total() >= HOPELESS:
            shown = ", ".join(f"{count} {kind}" for kind, count in self._useless.most_common())
            advice = "another --model or --prompt"
            if self._useless[TRUNCATED]:
                advice += ", or a higher --max-completion-tokens (models that think need it)"
            self._stop.because(
                PartialOutputError(f"no answer was of any use so far ({shown}); try {advice}")
            )

    async def _ask(self, request: Request) -> Answer:
        """Ask until there is an answer, with less of the text where the model can't take it all."""
        text = request.text
        while True:
            # Servers count an answer's limit, not its length, which they don't know yet either.
            tokens = estimate_tokens(self._settings.message(text)) + self._settings.limit(text)
            try:
                completion = await self._client.complete(
                    self._settings.body(text), request_id=request.key, tokens=tokens
                )
                break
            except ContentFilterError:
                return _no_entry()
            except ContextOverflowError as error:
                text = _shorten(text)
                if not text:
                    error.args = (f"{self._where(request.row)}: even without its text: {error}",)
                    raise
            except RejectedError as error:
                error.args = (f"{self._where(request.row)}: {error}",)
                raise
        answer = self._as_answer(request, completion)
        return answer if text == request.text else replace(answer, shortened_to=len(text))

    def _as_answer(self, request: Request, completion: Completion) -> Answer:
        prompt_tokens, completion_tokens = completion.prompt_tokens, completion.completion_tokens
        if prompt_tokens is None:
            prompt_tokens = estimate_tokens(self._settings.message(request.text))
        if completion_tokens is None:
            completion_tokens = estimate_tokens(completion.content)
        return Answer(
            completion.content, completion.finish_reason, prompt_tokens, completion_tokens
        )

    async def _fetch_in_batches(
        self, requests: Sequence[Request], state: Path, bar: Bar
    ) -> list[Request]:
        """Through the Batch API; returns the requests that have to be asked one by one."""
        by_key = {request.key: request for request in requests}

        def keep(completions: Sequence[tuple[str, Completion]]) -> None:
            """On disk, and counted. A batch of an earlier job may bring what nobody asked now."""
            new = []
            for key, completion in completions:
                request = by_key.get(key) or Request(key, -1, "")
                if key not in self._journal:
                    answer = self._as_answer(request, completion)
                    new.append((key, replace(answer, batch=True)))
            self._journal.add(new)
            for key, answer in new:
                if key in by_key:
                    self._spending.add(answer)
                    self._watch(by_key[key], answer)
                    bar.update(1)
            bar.set_postfix_str(str(self._spending))

        def show(finished: int, total: int) -> None:
            bar.set_postfix_str(f"{finished:,} of {total:,} done at the server, {self._spending}")

        one_by_one = []
        waiting = list(requests)
        while waiting or keys_under_way(state):
            batched = self._affordable(waiting)
            if waiting and not batched:
                raise self._budget_error(len(waiting))
            waiting = waiting[len(batched) :]
            bodies = {r.key: self._settings.body(r.text) for r in batched}
            refused = await self._stop.run(
                answer_by_batches(
                    self._client, bodies, state, keep, sleep=self._stop.sleep, on_poll=show
                )
            )
            for key, error in refused.items():
                if isinstance(error, ContentFilterError):
                    self._journal.add([(key, _no_entry())])
                    bar.update(1)
                elif isinstance(error, ContextOverflowError):
                    one_by_one.append(by_key[key])
                else:
                    error.args = (f"{self._where(by_key[key].row)}: {error}",)
                    raise error
            missing = sum(r.key not in self._journal and r.key not in refused for r in batched)
            if missing:
                raise PartialOutputError(
                    f"{missing} requests have no answer after several batches; run the same "
                    "command again, or without --batch, to ask for them"
                )
        return one_by_one

    def _affordable(self, requests: Sequence[Request]) -> list[Request]:
        """As many of the first ones as the budget surely pays for."""
        total = 0.0
        for i, request in enumerate(requests):
            total += self._spending.most(request, self._settings, BATCH_SHARE)
            if not self._spending.allows(total):
                return list(requests[:i])
        return list(requests)

    def _budget_error(self, left: int) -> BudgetError:
        budget, spent = self._spending.budget or 0.0, self._spending.dollars
        return BudgetError(
            f"the budget of {show_dollars(budget)} could be exceeded: {show_dollars(spent)} are "
            f"spent, and the next call may cost more than is left; {left} requests are "
            "missing; run again with a higher --budget to go on"
        )


class EditedTexts:
    """Answers of the offline generator."""

    def __init__(self, pool: Pool) -> None:
        self._labels_N = pool.labels_N
        self._editor = LexicalEditor(pool.table.texts, pool.labels_N)
        self._answers: dict[str, Answer] = {}

    def fetch(self, asked: Round) -> None:
        for key, row, text in asked.requests:
            edited = self._editor.edit(text, int(self._labels_N[row]), key)
            self._answers[key] = Answer(edited, "stop", 0, 0)

    def get(self, key: str) -> Answer | None:
        return self._answers.get(key)


def _shorten(text: str) -> str:
    """Three quarters of a text, cut between words where it has any."""
    end = int(len(text) * SHORTENING)
    kept = text[:end]
    if not text[end : end + 1].isspace() and len(kept.split()) > 1 and not kept[-1].isspace():
        kept = kept.rsplit(None, 1)[0]  # without the word that was cut
    return kept.rstrip()


def _no_entry() -> Answer:
    return Answer("", PROMPT_FILTER, 0, 0)
