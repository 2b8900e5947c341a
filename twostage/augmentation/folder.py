"""The job on a data folder: `train.csv` in, a class-balanced `aug.csv` out.

    train.csv              read: the columns text and label
    aug.csv                org_ind,text,label: n_majority paraphrases of each class, shuffled
    aug.partial.csv        instead, when the job ended early: as much as there is, not balanced
    augment_report.json    how each class fared, what it cost, what is missing and why
    paraphrases.jsonl      every answer that was paid for; run again and it is not asked for again
    batches.jsonl          with the Batch API: what is under way at the server

An `aug.csv` that was there before, and is another one, is kept as `aug.csv.previous`, or with a
number after that.
"""

import asyncio
import filecmp
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ..data.classes import Classes, find_classes, warn_of_twins
from ..data.tables import (
    AUGMENTED_COLUMNS,
    Table,
    TableOptions,
    find_table,
    read_table,
    write_table,
)
from ..errors import DataError, PartialOutputError, TwoStageError, UsageError, writing_to
from ..files import write_json
from ..printing import SHOWN_CLASSES, format_table, list_some, quoted, visible
from . import journal as journals
from .answering import EditedTexts, ServerAnswers
from .balancing import choose_rows
from .journal import Journal
from .openai_client import OPENAI_URL, READ_SECONDS, ApiKey, OpenAIClient, check_base_url
from .pacing import Pacer
from .paraphrase import (
    EditSettings,
    ParaphraseSettings,
    Pool,
    ask_in_rounds,
)
from .prices import Price, find_price
from .quality import BAD
from .spending import Spending
from .stopping import Interrupted, Stop

AUG, PARTIAL, REPORT, BATCHES = (
    "aug.csv",
    "aug.partial.csv",
    "augment_report.json",
    "batches.jsonl",
)


@dataclass(frozen=True)
class Server:
    """Whom to ask, and how hard."""

    base_url: str = OPENAI_URL
    api_key: ApiKey | None = None
    concurrency: int = 32
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = READ_SECONDS
    """Seconds without a sign of life."""
    batch: bool = False
    """Ask through the Batch API: about half the price, up to a day."""
    price: Price | None = None
    """None takes it from the table, by the model's name."""
    budget: float | None = None
    """US dollars that the job may cost, earlier runs of it included."""

    def __post_init__(self) -> None:
        check_base_url(self.base_url)
        for name in (
            "concurrency",
            "requests_per_minute",
            "tokens_per_minute",
            "timeout",
            "budget",
        ):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is {value}; expected a number above 0")
        if self.price and not all(0 <= dollars < math.inf for dollars in self.price):
            raise UsageError(f"price is {','.join(map(str, self.price))}; expected two dollar sums")


@dataclass(frozen=True)
class TrainingData:
    """A training table, and where things about it go."""

    folder: Path
    table: Table
    classes: Classes
    labels_N: np.ndarray

    @property
    def counts_C(self) -> list[int]:
        """Rows of each class."""
        counts: list[int] = np.bincount(self.labels_N).tolist()
        return counts

    @property
    def num_majority(self) -> int:
        return max(self.counts_C)


def augment_folder(
    data_path: Path,
    settings: ParaphraseSettings,
    server: Server,
    *,
    show_progress: bool = False,
    say: Callable[[str], None] = print,
    **options: Unpack[TableOptions],
) -> None:
    """Ask for what is missing, and write the folder's files.

    options: of the training table
    Raises DataError; UsageError; ApiError when the server refuses; PartialOutputError when the
    budget is used up or a class stays short; KeyboardInterrupt, or whatever the process does on
    SIGTERM, when it was asked to stop. In all of these cases what was paid for is kept.
    """
    data = read_folder(data_path, **options)
    spending = Spending(find_server_price(settings, server), server.budget)
    pool = Pool(data.table, data.labels_N)
    started = time.monotonic()
    reason: Exception | None = None
    failed: dict[int, str] = {}
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(data_path / journals.NAME)))
        elsewhere = [stack.enter_context(closing(j)) for j in other_journals(journal)]

        async def run() -> None:
            nonlocal failed
            stop = Stop(say)
            pacer = Pacer(server.requests_per_minute, server.tokens_per_minute, sleep=stop.sleep)
            client = OpenAIClient(
                server.base_url,
                server.api_key,
                pacer=pacer,
                concurrency=server.concurrency,
                read_seconds=server.timeout,
                sleep=stop.sleep,
            )
            source = ServerAnswers(
                client,
                journal,
                settings,
                spending,
                stop,
                elsewhere=elsewhere,
                concurrency=server.concurrency,
                batch=server.batch,
                batch_state=data_path / BATCHES,
                where=data.table.where,
                show_progress=show_progress,
            )
            failed = source.failed
            with stop.on_signals():
                async with client:
                    for asked in ask_in_rounds(pool, settings.key, source.get):
                        await source.fetch(asked)

        try:
            asyncio.run(run())
        except (TwoStageError, Interrupted) as early:
            reason = early
            # What the pool would be if nothing else ever came.
            pool = Pool(data.table, data.labels_N)
            for _ in ask_in_rounds(pool, settings.key, journal.get):
                pass

    asked = spending.calls + spending.earlier_calls + spending.reused
    paid = describe_spending(spending) if asked else ""
    details = {
        "model": settings.model,
        "base_url": server.base_url.partition("?")[0],
        "prompt": settings.prompt,
        "temperature": settings.temperature,
        "max_completion_tokens": settings.max_completion_tokens,
        "batch": server.batch,
        "answers_paid_for": spending.calls + spending.earlier_calls,
        "answers_taken_over": spending.reused,
        "prompt_tokens": spending.prompt_tokens,
        "completion_tokens": spending.completion_tokens,
        "price_per_million_tokens": spending.price,
        "dollars": round(spending.dollars, 6) if spending.price else None,
        "seconds": round(time.monotonic() - started, 3),
        "failed": [{"where": data.table.where(row), "error": e} for row, e in failed.items()],
    }
    _finish(data, pool, reason, details, paid, say)


def edit_folder(
    data_path: Path,
    settings: EditSettings,
    *,
    say: Callable[[str], None] = print,
    **options: Unpack[TableOptions],
) -> None:
    """The same files from the offline generator: lexical edits of the texts, no paraphrases."""
    data = read_folder(data_path, **options)
    details = {"generator": "lexical edits", "seed": settings.seed}
    _finish(data, edit_texts(data.table, data.labels_N, settings), None, details, "", say)


def edit_texts(table: Table, labels_N: np.ndarray, settings: EditSettings) -> Pool:
    """A pool of lexical edits of a table in memory; see `choose_table` for its balanced part."""
    pool = Pool(table, labels_N)
    source = EditedTexts(pool)
    for asked in ask_in_rounds(pool, settings.key, source.get):
        source.fetch(asked)
    return pool


def choose_table(pool: Pool, classes: Classes) -> list[tuple[int, str, str]]:
    """(source row, text, label) for each row of `aug.csv`, in its order."""
    paraphrases = sorted(pool.paraphrases)
    labels = pool.labels_N[[p.row for p in paraphrases]]
    chosen = choose_rows(labels, len(classes), max(pool.counts_C))
    return [(paraphrases[i].row, paraphrases[i].text, classes.names[labels[i]]) for i in chosen]


def describe_spending(spending: Spending) -> str:
    """One line on what was asked and paid."""
    parts = [f"{spending.calls:,} answers of this run"]
    if spending.earlier_calls:
        parts.append(f"{spending.earlier_calls:,} of earlier runs")
    if spending.reused:
        parts.append(f"{spending.reused:,} taken over from other folders")
    return f"{', '.join(parts)}; {spending}"


def format_quality(pool: Pool, names: tuple[str, ...]) -> str:
    """How each class fared, as a table."""
    header = ["class", "rows", "asked", "kept", *BAD, "mean words", "overlap"]
    rows: list[list[object]] = [
        [
            quoted(name),
            count,
            quality.asked,
            quality.kept,
            *(quality.verdicts[verdict] for verdict in BAD),
            f"{quality.mean_words:.1f}",
            f"{quality.mean_overlap:.2f}",
        ]
        for name, count, quality in zip(names, pool.counts_C, pool.quality_C, strict=True)
    ]
    if len(rows) <= SHOWN_CLASSES:
        return format_table(header, rows)
    worst_C = sorted(range(len(rows)), key=lambda c: pool.quality_C[c].kept)[:SHOWN_CLASSES]
    title = f"The {SHOWN_CLASSES} classes with the fewest kept, of {len(rows):,}; all: {REPORT}"
    return f"{title}\n{format_table(header, [rows[c] for c in worst_C])}"


def _finish(
    data: TrainingData,
    pool: Pool,
    reason: Exception | None,
    details: dict[str, Any],
    paid: str,
    say: Callable[[str], None],
) -> None:
    """Write what there is, say how it went, and raise the reason if the job ended early."""
    short = [
        f"class {quoted(name)} has {quality.kept:,} of {data.num_majority:,}"
        for name, quality in zip(data.classes.names, pool.quality_C, strict=True)
        if quality.kept < data.num_majority
    ]
    if short and reason is None:
        reason = PartialOutputError(
            f"the answers bring too few paraphrases: {list_some(short, 10, ', ')}; see "
            f"{data.folder / REPORT} for why"
        )
    rows = choose_table(pool, data.classes)
    unwritten: Exception | None = None
    try:
        _write(data, rows, _describe(data, pool, reason, details, len(rows)), reason is None)
    except UsageError as error:
        unwritten = error

    if any(quality.asked for quality in pool.quality_C):
        say(format_quality(pool, data.classes.names))
    for row, kept in sorted(pool.shortened.items()):
        whole = len(data.table.texts[row])
        say(f"{data.table.where(row)}: only {kept:,} of {whole:,} characters fit into the model")
    for failure in details.get("failed", []):
        why = visible(failure["error"])
        say(f"{failure['where']}: no answer, though others had theirs: {why}")
    if paid:
        say(paid)
    if unwritten:
        if reason is None:
            raise unwritten
        say(str(unwritten))  # the reason is what matters more
    elif reason is None:
        say(f"written: {data.folder / AUG}, {len(rows):,} rows; {REPORT}")
    elif rows:
        say(f"written: {data.folder / PARTIAL}, {len(rows):,} rows, NOT balanced; {REPORT}")
    if reason is not None and (data.folder / AUG).exists():
        say(f"{data.folder / AUG} is still that of an earlier run")
    if isinstance(reason, Interrupted):
        _deliver(reason, data.folder)
    if reason is not None:
        raise reason


def _write(
    data: TrainingData, rows: list[tuple[int, str, str]], report: dict[str, Any], complete: bool
) -> None:
    """Raises UsageError."""
    partial = data.folder / PARTIAL
    if complete:
        _replace_table(data.folder / AUG, rows)
    elif rows:
        write_table(partial, AUGMENTED_COLUMNS, rows)
    if complete or not rows:
        with writing_to(partial):
            partial.unlink(missing_ok=True)
    write_json(data.folder / REPORT, report)


def _deliver(interrupted: Interrupted, folder: Path) -> None:
    """Let the signal do now what it would have done at once."""
    try:
        signal.raise_signal(interrupted.signum)
    except KeyboardInterrupt as interrupt:
        interrupt.args = (
            f"stopped: every answer that came is in {folder / journals.NAME}; run the same command "
            "again to go on",
        )
        raise


def _replace_table(path: Path, rows: list[tuple[int, str, str]]) -> None:
    """Put the table in its place; another one that was there is kept as `.previous`, `.previous-2`
    and so on: it may be the authors' own."""
    new = path.with_name(path.name + ".new")
    write_table(new, AUGMENTED_COLUMNS, rows)
    with writing_to(path):
        if path.exists() and not filecmp.cmp(path, new, shallow=False):
            asides = (path.with_name(f"{path.name}.previous{n}") for n in _numbers())
            path.replace(next(aside for aside in asides if not aside.exists()))
        new.replace(path)


def _numbers() -> Iterator[str]:
    yield ""
    yield from (f"-{n}" for n in itertools.count(2))


def _describe(
    data: TrainingData, pool: Pool, reason: Exception | None, details: dict[str, Any], num_rows: int
) -> dict[str, Any]:
    """The content of `augment_report.json`."""
    classes = [
        {
            "class": name,
            "train_rows": count,
            "asked": quality.asked,
            "kept": quality.kept,
            **quality.verdicts,
            "kept_duplicates": quality.kept_duplicates,
            "kept_copies": quality.kept_copies,
            "given_up": quality.given_up,
            "mean_words": quality.mean_words,
            "mean_lexical_overlap": quality.mean_overlap,
        }
        for name, count, quality in zip(
            data.classes.names, pool.counts_C, pool.quality_C, strict=True
        )
    ]
    why = "a signal" if isinstance(reason, Interrupted) else str(reason)
    return {
        "complete": reason is None,
        "ended_early_because": None if reason is None else why,
        "rows": num_rows,
        "rows_per_class_when_complete": data.num_majority,
        **details,
        "classes": classes,
        "shortened": [
            {
                "row": row,
                "line": data.table.lines[row] if data.table.lines else None,
                "characters": len(data.table.texts[row]),
                "sent": kept,
            }
            for row, kept in sorted(pool.shortened.items())
        ],
    }


def read_folder(data_path: Path, **options: Unpack[TableOptions]) -> TrainingData:
    """The training table of a data folder. Raises DataError."""
    if not data_path.is_dir():
        raise DataError(f"there is no data folder '{data_path}'; it should hold train.csv")
    table = read_table(find_table(data_path, "train"), **options)
    classes = find_classes(table)
    warn_of_twins(classes, table)
    return TrainingData(data_path, table, classes, classes.encode(table))


def find_server_price(settings: ParaphraseSettings, server: Server) -> Price | None:
    price = server.price or find_price(settings.model)
    if server.budget is not None and price is None:
        raise UsageError(
            f"a budget needs a price, and none is known for '{settings.model}': give one with "
            "--price"
        )
    return price


def other_journals(journal: Journal) -> list[Journal]:
    """Those of the folders beside this one: other rates of the same texts have the same answers."""
    own = journal.path.resolve()
    paths = sorted(own.parent.parent.glob(f"*/{journals.NAME}"))
    return [Journal(path, read_only=True) for path in paths if path.resolve() != own]
