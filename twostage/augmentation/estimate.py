"""What a run would ask for, and about what that would take, without a single call."""

from contextlib import ExitStack, closing
from pathlib import Path
from typing import Unpack

from ..data.tables import TableOptions
from . import journal as journals
from .balancing import Walk, count_draws
from .batch_api import keys_under_way
from .folder import BATCHES, Server, find_server_price, other_journals, read_folder
from .journal import Journal
from .paraphrase import ParaphraseSettings, estimate_tokens
from .prices import BATCH_SHARE, DATE
from .spending import show_dollars

ANSWER_SECONDS = 1.0
"""For one answer: a chat model writes a short one in that."""
MESSAGE_TOKENS = 8
"""What a message takes beside its text."""


def estimate_folder(
    data_path: Path, settings: ParaphraseSettings, server: Server, **options: Unpack[TableOptions]
) -> str:
    """Answers wanted, calls, tokens, cost and time, a line each.

    Only the walk itself is counted: who will have to be asked again, nobody knows before.
    """
    data = read_folder(data_path, **options)
    price = find_server_price(settings, server)
    with ExitStack() as stack:
        own = Journal(data_path / journals.NAME, read_only=True)
        known = [stack.enter_context(closing(j)) for j in (own, *other_journals(own))]
        draws = Walk(data.table.texts, data.labels_N).deal(count_draws(data.counts_C))
        texts = [(data.table.texts[draw.row], draw.repeat) for draw in draws]
        asked = {settings.key(text, repeat, 0): text for text, repeat in texts}
        missing = {k: text for k, text in asked.items() if not any(k in j for j in known)}
    under_way = keys_under_way(data_path / BATCHES) & missing.keys()
    new = [text for key, text in missing.items() if key not in under_way]
    prompt_tokens = sum(estimate_tokens(settings.message(t)) + MESSAGE_TOKENS for t in new)
    completion_tokens = sum(estimate_tokens(t) for t in new)
    seconds = max(
        len(new) * ANSWER_SECONDS / server.concurrency,
        len(new) * 60 / (server.requests_per_minute or float("inf")),
        (prompt_tokens + completion_tokens) * 60 / (server.tokens_per_minute or float("inf")),
    )
    lines = [
        f"answers  {len(asked):,} wanted, for {len(data.classes)} classes of "
        f"{data.num_majority:,} rows; {len(asked) - len(missing):,} are there already, "
        f"{len(under_way):,} under way in batches",
        f"calls    {len(new):,}; what is no paraphrase is asked again twice, then for other rows",
        f"tokens   about {prompt_tokens:,} of prompts and {completion_tokens:,} of answers, "
        "at 4 bytes a token",
    ]
    if price:
        dollars = price.cost(prompt_tokens, completion_tokens)
        halved = show_dollars(BATCH_SHARE * dollars)
        total = f"{halved}, at half of" if server.batch else f"{show_dollars(dollars)}, at"
        listed = "as given" if server.price else f"as listed in {DATE}"
        lines.append(
            f"cost     about {total} ${price.prompt:g} and ${price.completion:g} a million tokens, "
            f"{listed}{'' if server.batch else f'; with --batch about {halved}'}"
        )
    else:
        lines.append(f"cost     unknown: no price for '{settings.model}'; give one with --price")
    if server.batch:
        lines.append("time     up to 24 hours for each batch of 50,000")
    else:
        lines.append(
            f"time     about {_show_seconds(seconds)}, {server.concurrency} calls at once, "
            f"{ANSWER_SECONDS:g} second an answer"
        )
    return "\n".join(lines)


def _show_seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
