"""What a run needs before its first step: model folder and tables in, tokenised data out.

Everything that can be wrong with settings, model or data is found here, the model's faults before
anything is said about the data.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .data.classes import Classes, find_classes, warn_of_twins
from .data.containers import LabelledTexts, Table, as_table
from .data.token_store import StageData
from .data.tokenization import check_vocabulary, load_tokenizer, tokenize
from .errors import DataError
from .machine import check_kernels, choose_device
from .model.checkpoint import Checkpoint, load_weights, read_config
from .model_folder import CONFIG, check_folder
from .printing import quoted
from .recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Datasets:
    """The tokenised data of a run."""

    train: StageData
    """Imbalanced."""
    test: StageData
    num_classes: int
    augmented: StageData | None = None
    """Class-balanced; None but for method `augment`."""


@dataclass(frozen=True)
class PreparedRun:
    """A model and its data, found to fit each other and the recipe."""

    recipe: Recipe
    folder: Path
    """The model folder."""
    checkpoint: Checkpoint
    tokenizer: "Tokenizer"
    train: Table
    test: Table
    augmented: Table | None
    classes: Classes
    data: Datasets

    @property
    def class_counts_C(self) -> tuple[int, ...]:
        """Training rows of each class."""
        return tuple(self.data.train.class_counts(len(self.classes)))


def prepare_run(
    model: str | Path,
    train: LabelledTexts,
    test: LabelledTexts,
    recipe: Recipe,
    augmented: LabelledTexts | None = None,
    *,
    show_progress: bool = False,
) -> PreparedRun:
    """Load the model, check it and the tables, tokenise the texts.

    The parameters are those of `train_two_stage`. Raises UsageError, DataError or ModelError.
    """
    device = choose_device(recipe.device)
    check_kernels(recipe.kernels, recipe.graphs, recipe.precision, device)
    folder = Path(model)
    check_folder(folder)
    config, _ = read_config(folder / CONFIG)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, folder)
    recipe.check_fit(config, str(model))
    checkpoint = load_weights(folder, config)  # last: no error is to follow the notes it may have

    tables = [as_table(train, "train data"), as_table(test, "test data")]
    if recipe.needs_augmented:
        if augmented is None:
            raise DataError("method 'augment' needs augmented data, and none was given")
        tables.append(as_table(augmented, "augmented data"))
    classes = find_classes(tables[0])
    labels = [classes.encode(table) for table in tables]
    warn_of_twins(classes, tables[0])
    for table, labels_N in zip(tables[2:], labels[2:], strict=True):
        for c in np.flatnonzero(np.bincount(labels_N, minlength=len(classes)) == 0):
            raise DataError(f"class {quoted(classes.names[c])} has no row in {table.source}")
    stores = [
        tokenize(
            tokenizer,
            table.texts,
            recipe.max_length,
            description=f"tokenizing {Path(table.source).name}",
            show_progress=show_progress,
        )
        for table in tables
    ]
    train_data, test_data, *more = map(StageData, stores, labels)
    augmented_data, augmented_table = (more[0], tables[2]) if more else (None, None)
    data = Datasets(train_data, test_data, len(classes), augmented_data)
    return PreparedRun(
        recipe, folder, checkpoint, tokenizer, tables[0], tables[1], augmented_table, classes, data
    )
