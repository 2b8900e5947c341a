"""What a result looks like: lines and tables for people, `metrics.json` for programs.

Everything for people leads with the tail class's F1 and macro-F1, and says what accuracy hides on
imbalanced data.
"""

import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from .api import Result
from .facts import find_facts
from .machine import PRECISIONS, choose_device, choose_precision
from .preparation import PreparedRun
from .printing import SHOWN_CLASSES, format_table, quoted
from .recipe import Recipe
from .training.metrics import Metrics

PACKAGES = ("twostage", "torch", "tokenizers", "safetensors", "numpy")
SUMMARY = {
    "tail_f1": "tail F1",
    "tail_average_precision": "tail AP",
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced acc.",
    "mcc": "MCC",
    "micro_f1": "micro-F1*",
}
"""Scores of a whole data set: name in `metrics.json`, heading in a table."""
MANY_CLASSES = 50
"""The most classes whose confusion matrix stands in `metrics.json`, with unrounded scores."""
COMPARED = ("tail_f1", "tail_average_precision", "macro_f1", "mcc", "micro_f1")
"""Those of SUMMARY that stand side by side for several seeds or runs, as far as a line is wide."""


def describe_run(run: PreparedRun) -> str:
    """What is about to happen, in one line, and a line for each fact to know before."""
    recipe, counts_C = run.recipe, run.class_counts_C
    shown = ", ".join(f"{quoted(c)}: {n}" for c, n in zip(run.classes.names, counts_C, strict=True))
    few = len(counts_C) <= 8
    rows = f"{len(run.train)} training rows ({shown})" if few else f"{len(run.train)} rows"
    rows += f", {len(run.augmented)} augmented" if run.augmented else ""
    stages = f"{recipe.epochs_stage_1 if recipe.has_stage_1 else 0} + {recipe.epochs_stage_2}"
    first = (
        f"{rows}, {len(run.test)} test rows; {recipe.method}, {stages} epochs, "
        f"{describe_arithmetic(recipe)}, "
        f"{len(recipe.seeds)} seed{'s' * (len(recipe.seeds) > 1)}"
    )
    return "\n".join([first, *(f"- {fact}" for fact in find_facts(run))])


def describe_arithmetic(recipe: Recipe) -> str:
    """`bf16 on cpu`, or `bf16 on cuda by Triton kernels in graphs`."""
    device = choose_device(recipe.device)
    dtype = choose_precision(recipe.precision, device)
    (name,) = (name for name, known in PRECISIONS.items() if known == dtype)
    kernels = " by Triton kernels" if recipe.kernels == "triton" else ""
    return f"{name} on {device}{kernels}{' in graphs' if recipe.graphs else ''}"


def describe_last_seed(result: Result) -> str:
    """One line on the seed that has just ended: the tail class's F1, if it can be known, first."""
    outcome, tail = result.seeds[-1], result.tail_class
    first = ""
    if outcome.metrics.support_C[tail]:
        name = quoted(result.classes.names[tail])
        first = f"F1 of tail class {name} {outcome.metrics.f1_C[tail]:.3f}, "
    return (
        f"seed {outcome.seed}: {first}macro-F1 {outcome.metrics.macro_f1:.3f}, "
        f"micro-F1 {outcome.metrics.micro_f1:.3f} ({outcome.seconds:.0f} s)"
    )


def format_results(result: Result) -> str:
    """The table of all seeds, their mean and deviation, ending with notes on the scores."""
    table = scores(result)
    rows: list[list[object]] = [
        [f"seed {s.seed}", *row] for s, row in zip(result.seeds, table, strict=True)
    ]
    if len(rows) > 1:
        rows.append(["mean", *np.mean(table, axis=0)])
        rows.append(["std", *np.std(table, axis=0, ddof=1)])
    support_C = result.seeds[0].metrics.support_C
    note = explain_scores(result.classes.names, result.class_counts_C, support_C)
    return format_table(["", *score_columns(result)], rows) + f"\n{note}"


def score_columns(result: Result) -> list[str]:
    """Headings of the columns that `scores` fills."""
    names = result.classes.names
    headings = SUMMARY | {"tail_f1": f"tail F1 ({quoted(names[result.tail_class])})"}
    head = [headings[name] for name in _compared(result)]
    return head + [f"F1 {quoted(names[c])}" for c in _other_classes(result)]


def scores(result: Result) -> list[list[float]]:
    """A row a seed: the scores of COMPARED, then the F1s of the other classes.

    The tail's scores are left out where no test row has that class; NaN stands for the F1 of other
    such classes.
    """
    rows = []
    for outcome in result.seeds:
        metrics = outcome.metrics
        summary = summarize(metrics, result.tail_class)
        f1_C = np.where(metrics.support_C > 0, metrics.f1_C, np.nan)
        others = [float(f1_C[c]) for c in _other_classes(result)]
        rows.append([summary[name] for name in _compared(result)] + others)
    return rows


def summarize(metrics: Metrics, tail_class: int) -> dict[str, float]:
    """The scores of SUMMARY, in its order; NaN for the tail's where no text is of that class."""
    known = metrics.support_C[tail_class] > 0
    return {
        "tail_f1": float(metrics.f1_C[tail_class]) if known else np.nan,
        "tail_average_precision": (
            float(metrics.average_precision_C[tail_class]) if known else np.nan
        ),
        "macro_f1": metrics.macro_f1,
        "balanced_accuracy": metrics.balanced_accuracy,
        "mcc": metrics.mcc,
        "micro_f1": metrics.micro_f1,
    }


def explain_scores(
    names: Sequence[str], class_counts_C: Sequence[int], support_C: np.ndarray
) -> str:
    """Notes to a table of scores: what the starred column hides, and what the texts cannot show.

    class_counts_C: training rows of each class. support_C: rows of each class that were scored.
    """
    tail = int(np.argmin(class_counts_C))
    judge = "so judge by its F1 and by macro-F1"
    if not support_C[tail]:
        judge = "and no row here, so nothing is known of it"
    notes = [
        f"* micro-F1 is the accuracy; class {quoted(names[tail])} has {class_counts_C[tail]} of "
        f"{sum(class_counts_C)} training rows, {judge}."
    ]
    occurring = np.count_nonzero(support_C)
    if 0 < occurring < len(names):
        notes.append(
            f"macro-F1 and balanced accuracy are means over the {occurring} of {len(names)} "
            "classes that occur in the scored texts."
        )
    return "\n".join(notes)


def format_evaluation(metrics: Metrics, names: Sequence[str], class_counts_C: Sequence[int]) -> str:
    """Scores of one model on one data set: each class, all together, the confusion matrix.

    With many classes, only the SHOWN_CLASSES with the lowest F1 among those that occur.
    """
    tail = int(np.argmin(class_counts_C))
    per_class: list[list[object]] = []
    for c, (name, shown) in enumerate(zip(names, scores_by_class(metrics), strict=True)):
        *of_class, rows = shown.values()
        of_class = of_class if rows else [np.nan] * len(of_class)
        per_class.append([quoted(name) + " (tail)" * (c == tail), *of_class, rows])
    summary = summarize(metrics, tail)
    parts = []
    if len(names) > SHOWN_CLASSES:
        worst_C = np.lexsort((-metrics.support_C, metrics.f1_C, metrics.support_C == 0))
        per_class = [per_class[c] for c in worst_C[:SHOWN_CLASSES]]
        parts.append(
            f"The {SHOWN_CLASSES} classes with the lowest F1, of {len(names):,} "
            f"({np.count_nonzero(metrics.support_C):,} of which occur in these texts):"
        )
    known = {name: score for name, score in summary.items() if not np.isnan(score)}
    parts += [
        format_table(["class", "precision", "recall", "F1", "AP", "rows"], per_class),
        format_table(["", *(SUMMARY[name] for name in known)], [["all", *known.values()]]),
    ]
    if len(names) <= 8:
        parts.append(
            "Confusion matrix (row: true class, column: predicted class):\n\n"
            + format_confusion("", metrics.confusion_CC, names)
        )
    return "\n\n".join([*parts, explain_scores(names, class_counts_C, metrics.support_C)])


def format_confusion(title: str, confusion_CC: np.ndarray, names: Sequence[str]) -> str:
    """A confusion matrix with the names of its rows and columns."""
    rows: list[list[object]] = [
        [f"true {quoted(name)}", *row]
        for name, row in zip(names, confusion_CC.tolist(), strict=True)
    ]
    return format_table([title, *(f"predicted {quoted(name)}" for name in names)], rows)


def describe_result(result: Result, recipe: Recipe, inputs: dict[str, str]) -> dict[str, Any]:
    """The content of `metrics.json`. `std` is that of a sample of seeds (n - 1); None for one.

    inputs: paths of the model and the tables. None stands for scores of a tail class that the test
    data do not have.
    """
    names, tail, many = result.classes.names, result.tail_class, len(result.classes) > MANY_CLASSES
    summaries = [summarize(s.metrics, tail) for s in result.seeds]
    columns = {name: [summary[name] for summary in summaries] for name in SUMMARY}
    return {
        "classes": [
            {"name": name, "train_rows": rows}
            for name, rows in zip(names, result.class_counts_C, strict=True)
        ],
        "tail_class": names[tail],
        "mean": {name: _or_none(float(np.mean(values))) for name, values in columns.items()},
        "std": {
            name: _or_none(float(np.std(values, ddof=1))) if len(values) > 1 else None
            for name, values in columns.items()
        },
        "seeds": [
            {
                "seed": s.seed,
                **{name: _or_none(score) for name, score in summary.items()},
                "per_class": [
                    {"class": name, **scores_of_class}
                    for name, scores_of_class in zip(names, scores_by_class(s.metrics), strict=True)
                ],
                **({} if many else {"confusion": s.metrics.confusion_CC.tolist()}),
                "seconds": {
                    "stage_1": s.seconds_stage_1,
                    "stage_2": s.seconds_stage_2,
                    "evaluation": s.seconds_evaluation,
                },
            }
            for s, summary in zip(result.seeds, summaries, strict=True)
        ],
        "inputs": inputs,
        "settings": asdict(recipe),
        "machine": describe_machine(choose_device(recipe.device))
        | {"arithmetic": describe_arithmetic(recipe)},
        "versions": describe_versions(),
    }


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on: the device and, on a CPU, its threads and bf16 units."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "threads": torch.get_num_threads()}
    capabilities = torch.cpu.get_capabilities()
    return {
        "device": capabilities.get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "avx512_bf16": capabilities.get("avx512_bf16", False),
        "amx_bf16": capabilities.get("amx_bf16", False),
    }


def describe_versions() -> dict[str, str]:
    """Python's version and those of the packages that scores and times depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def confusion_cells(metrics: Metrics) -> list[tuple[int, int, int]]:
    """(true class, predicted class, texts) of each cell of the confusion matrix that is not 0."""
    true, predicted = np.nonzero(metrics.confusion_CC)
    counts = metrics.confusion_CC[true, predicted]
    return list(zip(true.tolist(), predicted.tolist(), counts.tolist(), strict=True))


def scores_by_class(metrics: Metrics) -> list[dict[str, float]]:
    """The scores of each class under their names in `metrics.json`."""
    columns = {
        "precision": metrics.precision_C,
        "recall": metrics.recall_C,
        "f1": metrics.f1_C,
        "average_precision": metrics.average_precision_C,
        "support": metrics.support_C,
    }
    if len(metrics.f1_C) > MANY_CLASSES:
        columns = {name: values.round(6) for name, values in columns.items()}
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _compared(result: Result) -> list[str]:
    """COMPARED, without the tail's scores where no test row has that class."""
    known = result.seeds[0].metrics.support_C[result.tail_class] > 0
    return [name for name in COMPARED if known or not name.startswith("tail")]


def _or_none(score: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(score) else score


def _other_classes(result: Result) -> list[int]:
    """All but the tail; none of a long list, which would not fit a line: results.csv has them."""
    num_classes = len(result.classes)
    return [c for c in range(num_classes) if c != result.tail_class] if num_classes <= 8 else []
