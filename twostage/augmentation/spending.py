"""What a job has cost, and may still cost."""

from collections.abc import Iterator
from contextlib import contextmanager

from .journal import Answer
from .paraphrase import ParaphraseSettings, Request
from .prices import BATCH_SHARE, Price


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
