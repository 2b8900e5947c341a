"""A run on a data folder: `train.csv`, `test.csv` (and `aug.csv`) in, results out.

The output folder gets, rewritten as each seed ends, so that a run that stops early has lost
nothing that was finished:

    results.csv    an index column, then Seed, F1 and F1_c for each class c; one row a seed
    ave_sst.csv    the means of these columns
    log.csv        loss, gradient norm, learning rate and speed during training
    seed-7/ …      the trained models, if asked for

Results of an earlier run in the same folder are kept as `results.csv.previous` and so on.
"""

import csv
import shutil
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import torch

from .data.tables import Table, find_classes, read_table, write_table
from .data.tokenization import load_tokenizer
from .errors import DataError, writing_to
from .model.bert import BertClassifier
from .model.checkpoint import save_classifier
from .recipe import Recipe
from .training.precision import choose_device, choose_precision
from .training.stage import StepReport
from .two_stage import Result, train_two_stage


def run_experiment(
    model: Path,
    data_path: Path,
    output_path: Path,
    recipe: Recipe,
    *,
    save_models: bool = False,
    show_progress: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Train and evaluate every seed of the recipe; write the output folder.

    say: receives a line for each thing that a user should know.
    """
    train, test, augmented = _read_data(data_path, recipe)
    say(describe_run(train, test, augmented, recipe))
    with writing_to(output_path):
        output_path.mkdir(parents=True, exist_ok=True)
        for name in ("results.csv", "ave_sst.csv", "log.csv"):
            if (output_path / name).exists():
                (output_path / name).replace(output_path / f"{name}.previous")
        log_file = (output_path / "log.csv").open("w", encoding="utf-8", newline="", buffering=1)

    finished = 0

    def end_seed(result: Result, trained: BertClassifier) -> None:
        nonlocal finished
        write_results(result, output_path)
        if save_models:
            names = list(result.classes.names)
            _save_model(trained, model, names, output_path / f"seed-{result.seeds[-1].seed}")
        finished += 1
        say(describe_last_seed(result))

    with log_file:
        log = csv.writer(log_file, lineterminator="\n")
        log.writerow(field.name for field in fields(StepReport))

        def write_log(report: StepReport) -> None:
            with writing_to(output_path / "log.csv"):
                log.writerow(astuple(report))

        try:
            return train_two_stage(
                model,
                train,
                test,
                recipe,
                augmented=augmented,
                on_report=write_log,
                on_seed_end=end_seed,
                show_progress=show_progress,
            )
        except KeyboardInterrupt as interrupt:
            kept = f"; they are in {output_path / 'results.csv'}" if finished else ""
            interrupt.args = (
                f"stopped: {finished} of {len(recipe.seeds)} seeds were finished{kept}",
            )
            raise


def describe_run(train: Table, test: Table, augmented: Table | None, recipe: Recipe) -> str:
    """One line on what is about to happen."""
    classes = find_classes(train)
    counts = np.bincount(classes.encode(train)).tolist()
    shown = ", ".join(f"'{c}': {n}" for c, n in zip(classes.names, counts, strict=True))
    rows = f"{len(train)} training rows ({shown})" if len(classes) <= 8 else f"{len(train)} rows"
    rows += f", {len(augmented)} augmented" if augmented else ""
    device = choose_device(recipe.device)
    precision = "bf16" if choose_precision(recipe.precision, device) == torch.bfloat16 else "fp32"
    stages = f"{recipe.epochs_stage_1 if recipe.has_stage_1 else 0} + {recipe.epochs_stage_2}"
    return (
        f"{rows}, {len(test)} test rows; {recipe.method}, {stages} epochs, "
        f"{precision} on {device}, {len(recipe.seeds)} seed{'s' * (len(recipe.seeds) > 1)}"
    )


def write_results(result: Result, folder: Path) -> None:
    """`results.csv` and `ave_sst.csv` of the seeds so far."""
    header = ["", "Seed", "F1", *(f"F1_{c}" for c in range(len(result.classes)))]
    rows = [[s.seed, s.metrics.micro_f1, *s.metrics.f1_C.tolist()] for s in result.seeds]
    write_table(folder / "results.csv", header, [[i, *row] for i, row in enumerate(rows)])
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    write_table(folder / "ave_sst.csv", header, [[0, *means]])


def describe_last_seed(result: Result) -> str:
    """One line on the seed that has just ended: the tail class's F1 and macro-F1 first."""
    outcome = result.seeds[-1]
    tail = result.tail_class
    return (
        f"seed {outcome.seed}: F1 of tail class '{result.classes.names[tail]}' "
        f"{outcome.metrics.f1_C[tail]:.3f}, macro-F1 {outcome.metrics.macro_f1:.3f}, "
        f"micro-F1 {outcome.metrics.micro_f1:.3f} ({outcome.seconds:.0f} s)"
    )


def format_results(result: Result) -> str:
    """The table of all seeds and their mean, ending with what micro-F1 is."""
    rows: list[list[object]] = [
        [f"seed {s.seed}", *row] for s, row in zip(result.seeds, scores(result), strict=True)
    ]
    if len(rows) > 1:
        rows.append(["mean", *np.mean(scores(result), axis=0)])
    return (
        format_table(["", *score_columns(result)], rows)
        + f"\n{explain_micro_f1(result)}, so judge by its F1 and by macro-F1."
    )


def score_columns(result: Result) -> list[str]:
    """Headings of the columns that `scores` fills."""
    names = result.classes.names
    head = [f"tail F1 ('{names[result.tail_class]}')", "macro-F1", "micro-F1*"]
    return head + [f"F1_{c} ('{names[c]}')" for c in _shown_classes(result)]


def scores(result: Result) -> list[list[float]]:
    """A row a seed: the tail class's F1, macro-F1, micro-F1, then the F1s of the classes."""
    return [
        [
            m.f1_C[result.tail_class],
            m.macro_f1,
            m.micro_f1,
            *(m.f1_C[c] for c in _shown_classes(result)),
        ]
        for m in (outcome.metrics for outcome in result.seeds)
    ]


def explain_micro_f1(result: Result) -> str:
    """The note to the starred column, without its full stop."""
    tail = result.tail_class
    return (
        f"* micro-F1 is the accuracy; class '{result.classes.names[tail]}' has "
        f"{result.class_counts_C[tail]} of {sum(result.class_counts_C)} training rows"
    )


def _shown_classes(result: Result) -> range:
    """The columns of a long list of classes would not fit a line; results.csv has them all."""
    return range(len(result.classes)) if len(result.classes) <= 8 else range(0)


def format_table(header: list[str], rows: list[list[object]]) -> str:
    """Columns aligned to the right, the first to the left; floats with three digits."""
    cells = [
        header,
        *([f"{x:.3f}" if isinstance(x, float) else str(x) for x in row] for row in rows),
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in cells
    )


def _read_data(data_path: Path, recipe: Recipe) -> tuple[Table, Table, Table | None]:
    if not data_path.is_dir():
        raise DataError(
            f"there is no data folder '{data_path}'; it should hold train.csv, test.csv"
        )
    train, test = read_table(data_path / "train.csv"), read_table(data_path / "test.csv")
    if not recipe.needs_augmented:
        return train, test, None
    path = data_path / "aug.csv"
    if not path.is_file():
        raise DataError(f"method 'augment' reads '{path}', which does not exist")
    return train, test, read_table(path)


def _save_model(trained: BertClassifier, source: Path, names: list[str], folder: Path) -> None:
    """A Hugging Face folder; built beside its place, so that it is there whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    with writing_to(folder):
        shutil.rmtree(partial, ignore_errors=True)
        save_classifier(trained, partial, names)
        load_tokenizer(source).save(str(partial / "tokenizer.json"))
        shutil.rmtree(folder, ignore_errors=True)
        partial.replace(folder)
