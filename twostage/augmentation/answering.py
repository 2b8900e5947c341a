"""Getting the answers of a round: from the journal, from a server call by call or in batches.

A source has two methods. `fetch` makes sure that a round's answers are there, and raises the reason
when it stops early; `get` gives one answer by its key. What was paid for is on disk before anything
else happens with it: a call's place is free for the next only when its answer is in the journal, so
that a crash can cost no more answers than there are calls at once.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

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
from .prices import BATCH_SHARE
from .quality import COPY, GOOD, TRUNCATED, clean, judge
from .spending import Spending, show_dollars
from .stopping import Stop, Stopped

HOPELESS = 50
"""Answers, none of them of any use, after which a job that has no good one stops."""
SHORTENING = 0.75
"""What is left of a text that was too long for the model, each time that it was."""


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
        self._any_use, self._verdicts = False, Counter[str]()
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
            except Stopped:
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
        if self._any_use:
            return
        text = clean(answer.content, request.text)
        verdict = judge(text, answer.finish_reason, request.text)
        self._any_use = verdict in (GOOD, COPY)
        self._verdicts[verdict] += 1
        if not self._any_use and self._verdicts.total() >= HOPELESS:
            shown = ", ".join(f"{count} {kind}" for kind, count in self._verdicts.most_common())
            advice = "another --model or --prompt"
            if self._verdicts[TRUNCATED]:
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
