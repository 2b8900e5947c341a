"""From training rows to a pool of paraphrases: what is asked, in which rounds, what is kept.

    deal the walk's draws                                  (balancing.py)
    for each pass, the walk itself and up to EXTRA_PASSES more:
        ask once for every draw, all at the same time
        twice more: ask again where the answer was no paraphrase, or one that the pool has already
        give up the draws that brought nothing; deal as many new ones to their classes
        until no class is short

Nothing here calls anybody. `ask_in_rounds` yields the requests of a round, and whoever drives it
gets their answers (answering.py), from a server, from the journal of an earlier run, or from a
generator on this machine. Answers are judged in the order of the draws once a round is complete, so
that the pool depends on the data and the answers, not on who answered first. That is what makes a
run that was stopped a hundred times end with the same bytes as one that was not.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..data.tables import Table
from ..errors import UsageError
from .balancing import SURPLUS, Draw, Walk, count_draws
from .journal import Answer
from .openai_client import chat_body
from .quality import COPY, DUPLICATE, GOOD, ClassQuality, clean, judge, lexical_overlap, normalize

PROMPT = "Rephrase the following phrase into a different phrase with similar meaning."
"""The published instruction."""
MODEL = "gpt-3.5-turbo"
"""The published model."""
REGENERATIONS = 2
EXTRA_PASSES = 3
MAX_LIMIT = 4096
"""Tokens. gpt-3.5-turbo refuses to be allowed more for an answer."""
PROMPT_FILTER = "prompt_filter"
"""The finish reason of a text that the server's filter does not let in: asking again is no use."""


@dataclass(frozen=True)
class ParaphraseSettings:
    """What an answer depends on, besides the text."""

    model: str = MODEL
    prompt: str = PROMPT
    """The instruction. The text stands where it says `{text}`, else below a line of `---`."""
    temperature: float | None = None
    """None leaves it to the server (OpenAI: 1)."""
    max_completion_tokens: int | None = None
    """Limit on an answer; None is half the text's bytes and 64, twice what English takes, but no
    more than MAX_LIMIT."""

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UsageError("model is empty; expected a name, such as gpt-4o-mini")
        if not self.prompt.strip():
            raise UsageError("prompt is empty; expected an instruction")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UsageError(f"temperature is {self.temperature}; expected a number from 0 to 2")
        limit = self.max_completion_tokens
        if limit is not None and limit < 1:
            raise UsageError(f"max_completion_tokens is {limit}; expected 1 or more")

    def message(self, text: str) -> str:
        """What the model reads."""
        if "{text}" in self.prompt:
            return self.prompt.replace("{text}", text)
        return f"{self.prompt}\n\n---\n\n{text}"

    def limit(self, text: str) -> int:
        """Tokens that an answer may have."""
        return self.max_completion_tokens or min(64 + len(text.encode()) // 2, MAX_LIMIT)

    def body(self, text: str) -> dict[str, Any]:
        return chat_body(self.model, self.message(text), self.limit(text), self.temperature)

    def key(self, text: str, repeat: int, attempt: int) -> str:
        """The name of a request: a hash of all that its answer depends on, and of nothing else.

        repeat, attempt: the same text's other draws, and the same draw's other attempts, are
        other requests.
        """
        return _hash(self.body(text), text, repeat, attempt)


@dataclass(frozen=True)
class EditSettings:
    """What an offline edit depends on, besides the corpus."""

    seed: int = 42

    def key(self, text: str, repeat: int, attempt: int) -> str:
        return _hash("lexical edits", self.seed, text, repeat, attempt)


class Request(NamedTuple):
    """One answer that is wanted."""

    key: str
    row: int
    text: str


class Round(NamedTuple):
    """Requests that do not depend on each other's answers."""

    title: str
    requests: list[Request]


def ask_in_rounds(
    pool: "Pool",
    make_key: Callable[[str, int, int], str],
    get_answer: Callable[[str], Answer | None],
) -> Iterator[Round]:
    """Fill the pool; `get_answer` is asked for a round's answers when the next one is wanted.

    make_key: of (text, repeat, attempt)
    get_answer: by key; None where there is none, which gives up that draw
    """
    texts, counts_C = pool.table.texts, pool.counts_C
    walk = Walk(texts, pool.labels_N)
    enough = math.ceil(SURPLUS * max(counts_C))
    wanted_C = count_draws(counts_C)
    for extra_pass in range(1 + EXTRA_PASSES):
        draws = walk.deal(wanted_C)
        for attempt in range(1 + REGENERATIONS):
            if not draws:
                break
            keys = [make_key(texts[draw.row], draw.repeat, attempt) for draw in draws]
            yield Round(
                _title(extra_pass, attempt),
                [Request(k, d.row, texts[d.row]) for k, d in zip(keys, draws, strict=True)],
            )
            last = attempt == REGENERATIONS
            draws = [
                draw
                for key, draw in zip(keys, draws, strict=True)
                if not pool.settle(draw, get_answer(key), last)
            ]
        wanted_C = [max(0, enough - quality.kept) for quality in pool.quality_C]
        if not any(wanted_C):
            return


def _title(extra_pass: int, attempt: int) -> str:
    title = f"extra pass {extra_pass} of {EXTRA_PASSES}" if extra_pass else "paraphrases"
    return f"{title}, again {attempt} of {REGENERATIONS}" if attempt else title


class Paraphrase(NamedTuple):
    """A text of the pool. They sort by source row, then by draw."""

    row: int
    pass_: int
    text: str


@dataclass
class Pool:
    """The paraphrases so far, and how each class fared."""

    table: Table
    labels_N: np.ndarray
    """[N] class indices 0 … C-1, each of which occurs."""
    paraphrases: list[Paraphrase] = field(default_factory=list)
    quality_C: list[ClassQuality] = field(init=False)
    shortened: dict[int, int] = field(default_factory=dict)
    """Row → characters that the model could take of it."""

    def __post_init__(self) -> None:
        self.counts_C: list[int] = np.bincount(self.labels_N).tolist()
        self.quality_C = [ClassQuality() for _ in self.counts_C]
        self._seen: set[str] = set()
        self._spare: dict[Draw, tuple[str, str]] = {}  # a duplicate or copy that may have to do

    def settle(self, draw: Draw, answer: Answer | None, last: bool) -> bool:
        """Judge an answer; whether the draw has come to its end, with a paraphrase or without.

        last: whether there is no further attempt
        """
        source = self.table.texts[draw.row]
        quality = self.quality_C[self.labels_N[draw.row]]
        again = False
        if answer is not None:
            text = clean(answer.content, source)
            verdict = judge(text, answer.finish_reason, source)
            if verdict == GOOD and normalize(text) in self._seen:
                verdict = DUPLICATE
            quality.asked += 1
            quality.verdicts[verdict] += 1
            if answer.shortened_to is not None:
                self.shortened[draw.row] = answer.shortened_to
            if verdict == GOOD:
                self._spare.pop(draw, None)
                self._keep(draw, text, quality)
                return True
            if verdict in (DUPLICATE, COPY):
                self._spare[draw] = (text, verdict)
            again = not last and answer.finish_reason != PROMPT_FILTER
        if again:
            return False
        text, verdict = self._spare.pop(draw, ("", ""))
        if verdict:
            quality.kept_duplicates += verdict == DUPLICATE
            quality.kept_copies += verdict == COPY
            self._keep(draw, text, quality)
        elif answer is not None:
            quality.given_up += 1
        return True

    def _keep(self, draw: Draw, text: str, quality: ClassQuality) -> None:
        self._seen.add(normalize(text))
        self.paraphrases.append(Paraphrase(draw.row, draw.pass_, text))
        quality.kept += 1
        quality.words += len(text.split())
        quality.overlap += lexical_overlap(text, self.table.texts[draw.row])


def estimate_tokens(text: str) -> int:
    """About four bytes a token, in English."""
    return len(text.encode(errors="replace")) // 4 + 1


def _hash(*parts: object) -> str:
    """128 bits in hexadecimal: short enough for a header, too many to meet twice."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
