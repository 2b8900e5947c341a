"""A run on a data folder: `train.csv`, `test.csv` (and `aug.csv`) in, results out.

The output folder gets, rewritten as each seed ends, so that a run that stops early has lost
nothing that was finished:

    results.csv    an index column, then Seed, F1 and F1_c for each class c; one row a seed
    ave_sst.csv    the means of these columns
    metrics.json   every score, class by class; means and deviations; times, settings, versions
    confusion.csv  instead of the matrix in metrics.json, for more than 50 classes
    log.csv        loss, gradient norm, learning rate and speed during training
    seed-7/ …      the trained models, if asked for

What an earlier run left in the same folder is kept once, as `results.csv.previous` and so on.
"""

import csv
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, fields
from pathlib import Path
from typing import NamedTuple, TextIO, Unpack

from .api import Result, train_seeds
from .data.classes import Classes, find_classes
from .data.tables import (
    Table,
    TableOptions,
    find_table,
    read_augmented,
    read_table,
    write_table,
)
from .data.tokenization import tokenize
from .errors import DataError, TwoStageError, TwoStageWarning, writing_to
from .files import write_json
from .machine import choose_device, choose_precision
from .model.bert import BertClassifier
from .preparation import prepare_run
from .progress import StepReport
from .recipe import Recipe
from .report import (
    MANY_CLASSES,
    confusion_cells,
    describe_last_seed,
    describe_result,
    describe_run,
    scores_by_class,
)
from .saved_model import ModelInfo, load_model, save_model
from .training.evaluation import predict_logits
from .training.metrics import Metrics, compute_metrics

RESULT_FILES = ("results.csv", "ave_sst.csv", "metrics.json", "confusion.csv", "log.csv")


class ExperimentData(NamedTuple):
    """The tables of a data folder."""

    train: Table
    test: Table
    augmented: Table | None = None
    notes: tuple[str, ...] = ()
    """What a user should know of how they were read."""


def run_experiment(
    model: Path,
    data: ExperimentData,
    output_path: Path,
    recipe: Recipe,
    *,
    save_models: bool = False,
    show_progress: bool = False,
    say: Callable[[str], None] = print,
) -> Result:
    """Train and evaluate every seed of the recipe; write the output folder.

    say: receives what a user should know, a line or more at a time. The notes on the data become
    warnings once the model is known to be usable.
    """
    run = prepare_run(
        model, data.train, data.test, recipe, data.augmented, show_progress=show_progress
    )
    for note in data.notes:
        warnings.warn(note, TwoStageWarning, stacklevel=2)
    say(describe_run(run))
    finished = 0
    with closing(_OutputFolder(output_path)) as output:

        def end_seed(result: Result, trained: BertClassifier) -> None:
            nonlocal finished
            output.begin()
            write_results(result, recipe, model, data, output_path)
            if save_models:
                folder = output_path / f"seed-{result.seeds[-1].seed}"
                info = ModelInfo(result.classes.names, result.class_counts_C, recipe.max_length)
                save_model(folder, trained, run.tokenizer, info)
            finished += 1
            say(describe_last_seed(result))

        try:
            return train_seeds(
                run,
                on_report=output.write_report,
                on_seed_end=end_seed,
                show_progress=show_progress,
            )
        except KeyboardInterrupt as interrupt:
            kept = f"; they are in {output_path / 'results.csv'}" if finished else ""
            interrupt.args = (
                f"stopped: {finished} of {len(recipe.seeds)} seeds were finished{kept}",
            )
            raise


def evaluate_file(
    model: Path,
    data: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    show_progress: bool = False,
    **options: Unpack[TableOptions],
) -> tuple[Metrics, ModelInfo]:
    """Scores of a saved classifier on a table of labelled texts; texts are cut as in training.

    options: of the table
    """
    dtype = choose_precision(precision, choose_device(device))
    classifier, tokenizer, info = load_model(model)
    table = read_table(data, **options)
    labels_N = Classes(info.class_names, f"the training data of '{model}'").encode(table)
    store = tokenize(tokenizer, table.texts, info.max_length, show_progress=show_progress)
    classifier.to(choose_device(device))
    logits_NC = predict_logits(classifier, store, dtype=dtype, show_progress=show_progress)
    return compute_metrics(labels_N, logits_NC.numpy()), info


def write_scores(path: Path, metrics: Metrics, names: Sequence[str]) -> None:
    """A table of each class's scores. Raises UsageError when it cannot be written."""
    rows = [
        {"class": c, **of_class}
        for c, of_class in zip(names, scores_by_class(metrics), strict=True)
    ]
    write_table(path, list(rows[0]), [list(row.values()) for row in rows])


def write_results(
    result: Result, recipe: Recipe, model: Path, data: ExperimentData, folder: Path
) -> None:
    """`results.csv`, `ave_sst.csv`, `metrics.json` and `confusion.csv` of the seeds so far."""
    header = ["", "Seed", "F1", *(f"F1_{c}" for c in range(len(result.classes)))]
    rows = [[s.seed, s.metrics.micro_f1, *s.metrics.f1_C.tolist()] for s in result.seeds]
    write_table(folder / "results.csv", header, [[i, *row] for i, row in enumerate(rows)])
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    write_table(folder / "ave_sst.csv", header, [[0, *means]])
    inputs = {"model": str(model), "train": data.train.source, "test": data.test.source}
    if data.augmented:
        inputs["augmented"] = data.augmented.source
    write_json(folder / "metrics.json", describe_result(result, recipe, inputs))
    if len(result.classes) > MANY_CLASSES:
        cells = ((s.seed, *cell) for s in result.seeds for cell in confusion_cells(s.metrics))
        header = ["Seed", "true", "predicted", "texts"]
        write_table(folder / "confusion.csv", header, cells)


def read_data(data_path: Path, recipe: Recipe, **options: Unpack[TableOptions]) -> ExperimentData:
    """The tables of a data folder; `aug.csv` only where the recipe needs it.

    options: of the tables. Raises DataError, also for a label that no training row has.
    """
    if not data_path.is_dir():
        raise DataError(
            f"there is no data folder '{data_path}'; it should hold train.csv, test.csv"
        )
    with _keeping_notes() as notes:
        paths = [find_table(data_path, "train"), find_table(data_path, "test", "dev")]
        train, test = (read_table(path, **options) for path in paths)
        classes = find_classes(train)
        classes.encode(test)
        augmented = None
        if recipe.needs_augmented:
            path = find_table(data_path, "aug", who="method 'augment'")
            augmented = read_augmented(path, **options)
            classes.encode(augmented)
    return ExperimentData(train, test, augmented, tuple(notes))


@contextmanager
def _keeping_notes() -> Iterator[list[str]]:
    """Collect TwoStageWarnings in place of showing them; those of a body that fails are shown."""
    notes: list[str] = []
    error: TwoStageError | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TwoStageWarning)
        try:
            yield notes
        except TwoStageError as raised:
            error = raised
    for note in caught:
        if error is None and issubclass(note.category, TwoStageWarning):
            notes.append(str(note.message))
        else:
            warnings.showwarning(note.message, note.category, note.filename, note.lineno)
    if error is not None:
        raise error


class _OutputFolder:
    """The folder of a run, and its log: a line a report, on disk as soon as it is written.

    An earlier run's results are put aside when the first of ours come, not before: a run that
    fails at its start takes nobody's place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log: TextIO | None = None
        with writing_to(path):
            path.mkdir(parents=True, exist_ok=True)

    def begin(self) -> TextIO:
        """Make room and open the log, once."""
        if self.log is None:
            with writing_to(self.path):
                self._put_earlier_aside()
                log_path = self.path / "log.csv"
                self.log = log_path.open("w", encoding="utf-8", newline="", buffering=1)
            self._write(self.log, (field.name for field in fields(StepReport)))
        return self.log

    def write_report(self, report: StepReport) -> None:
        self._write(self.begin(), astuple(report))

    def close(self) -> None:
        if self.log is not None:
            with writing_to(self.path / "log.csv"):
                self.log.close()

    def _write(self, log: TextIO, row: Iterable[object]) -> None:
        with writing_to(self.path / "log.csv"):
            csv.writer(log, lineterminator="\n").writerow(row)

    def _put_earlier_aside(self) -> None:
        """Rename it; what the run before that one left goes."""
        models = self.path.glob("seed-*[0-9]")
        for path in [*(self.path / name for name in RESULT_FILES), *models]:
            if path.exists():
                aside = path.with_name(path.name + ".previous")
                if aside.is_dir():
                    shutil.rmtree(aside)
                path.replace(aside)
