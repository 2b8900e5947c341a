"""What models cost: a small table with its date, for estimates, budgets and reports.

Prices change and the table does not follow: `--price` overrides it. A model that is served here
under another company's roof may cost anything.
"""

from typing import NamedTuple

DATE = "2026-03"
"""When the table was last compared with published lists."""
BATCH_SHARE = 0.5
"""Share of the price that the Batch API takes."""


class Price(NamedTuple):
    """US dollars for a million tokens."""

    prompt: float
    completion: float

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float:
        """US dollars."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


PRICES = {
    "gpt-3.5-turbo": Price(0.50, 1.50),
    "gpt-4o": Price(2.50, 10.00),
    "gpt-4o-2024-05-13": Price(5.00, 15.00),
    "gpt-4o-mini": Price(0.15, 0.60),
    "gpt-4.1": Price(2.00, 8.00),
    "gpt-4.1-mini": Price(0.40, 1.60),
    "gpt-4.1-nano": Price(0.10, 0.40),
    "gpt-5": Price(1.25, 10.00),
    "gpt-5-mini": Price(0.25, 2.00),
    "gpt-5-nano": Price(0.05, 0.40),
}


def find_price(model: str) -> Price | None:
    """The price of a model, also under a dated name (`gpt-4o-mini-2024-07-18`); None if unknown."""
    name, _, date = model.partition("-20")
    return PRICES.get(model) or (PRICES.get(name) if date[:2].isdigit() else None)
