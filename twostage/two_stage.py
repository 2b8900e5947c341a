"""Two-stage fine-tuning for class-imbalanced text: the algorithm. Start reading here.

Standard fine-tuning on long-tailed data starves the tail classes: most batches hold few of their
examples or none. Two-stage fine-tuning first lets only the top of the pretrained encoder learn,
from a class-balanced signal, then fine-tunes everything in the standard way:

    for each seed:
        model ← pretrained encoder, new head
        STAGE 1   freeze all but the last encoder layer, the pooler and the head;
                  train with LDAM and class weights on the imbalanced data   (method `reweight`)
                  or with cross-entropy on class-balanced augmented data     (method `augment`)
        STAGE 2   unfreeze; train with cross-entropy on the imbalanced data
        evaluate on the test data

Vanilla fine-tuning is stage 2 alone.

Source: ValizadehAslani et al. 2022, "Two-Stage Fine-Tuning: A Novel Strategy for Learning
Class-Imbalanced Data" (arXiv 2207.10858). With ChatGPT augmentation: Neurocomputing 592:127801,
2024.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from .data.samplers import SAMPLERS
from .data.tables import Classes, Table, find_classes
from .data.tokenization import load_tokenizer, tokenize
from .errors import DataError, ModelError, UsageError
from .model.bert import BertClassifier, BertConfig
from .model.checkpoint import Checkpoint, build_model, load_checkpoint
from .training.evaluation import predict_logits
from .training.losses import CLASS_WEIGHTS, LOSSES, make_loss
from .training.metrics import Metrics, compute_metrics
from .training.precision import PRECISIONS, choose_device, choose_precision
from .training.stage import StageData, StageSettings, StepReport, train_stage
from .training.state import HEAD_STREAM, TrainingState, derive_seed

METHODS = ("reweight", "augment", "vanilla")


@dataclass(frozen=True)
class Recipe:
    """Every choice of a run. The defaults are the published ones."""

    method: str = "reweight"
    """`reweight`, `augment` (stage 1 on augmented data) or `vanilla` (stage 2 alone)."""
    epochs_stage_1: int = 1
    """0 is vanilla fine-tuning."""
    epochs_stage_2: int = 1
    seeds: tuple[int, ...] = (7, 42, 106, 190, 191)
    """Each seed starts again from the pretrained weights."""
    batch_size: int = 16
    max_length: int = 128
    """Tokens at which a text is cut, [CLS] and [SEP] included."""
    learning_rate_stage_1: float = 1e-4
    learning_rate_stage_2: float = 1e-5
    stage_1_layers: int = 1
    """Encoder layers, from the top, that stage 1 trains with the pooler and the head."""
    loss: str | None = None
    """Of stage 1: `ldam` or `ce`. None: `ce` for `augment`, else `ldam`."""
    class_weights: str | None = None
    """Of stage 1: `effective`, `inverse`, `inverse-sqrt`, `none`. None: `none` for `augment`, else
    `effective`."""
    ldam_s: float = 1.0
    ldam_max_m: float = 0.5
    sampler: str = "random"
    """`random` or `token-budget`: both stages. `class-balanced`: stage 1, or, without one, stage 2;
    after a stage 1, stage 2 is random, since it is to see the data as they are."""
    precision: str = "auto"
    """`fp32`, `bf16`, or `auto`: bf16 where the device multiplies it natively."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:n`, or `auto`: a GPU if there is one."""
    upstream_schedule: bool = False
    """Count the steps of augmented stage 1 as the published code does, from the imbalanced data:
    the learning rate is then 0 for the rest of the stage."""

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        _check_choice("sampler", self.sampler, SAMPLERS)
        _check_choice("precision", self.precision, PRECISIONS)
        if self.loss is not None:
            _check_choice("loss", self.loss, LOSSES)
        if self.class_weights is not None:
            _check_choice("class_weights", self.class_weights, CLASS_WEIGHTS)
        for name, least in (
            ("epochs_stage_1", 0),
            ("epochs_stage_2", 0),
            ("batch_size", 1),
            ("max_length", 2),
            ("stage_1_layers", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}; expected a whole number, {least} or more")
        for name in ("learning_rate_stage_1", "learning_rate_stage_2", "ldam_s"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value!r}; expected a number above 0")
        if not 0 <= self.ldam_max_m < float("inf"):
            raise UsageError(f"ldam_max_m is {self.ldam_max_m!r}; expected a number, 0 or more")
        if not self.seeds or any(seed < 0 for seed in self.seeds):
            raise UsageError(f"seeds are {self.seeds!r}; expected one or more whole numbers from 0")

    @property
    def has_stage_1(self) -> bool:
        return self.method != "vanilla" and self.epochs_stage_1 > 0


@dataclass(frozen=True)
class SeedResult:
    """The outcome of one seed."""

    seed: int
    metrics: Metrics
    """On the test data."""
    logits_NC: np.ndarray
    """[N, C] fp32, of the test data in its order."""
    seconds: float
    """Both stages and the evaluation."""


@dataclass(frozen=True)
class Result:
    """The outcome of a run: one SeedResult a seed, in the order of `Recipe.seeds`."""

    classes: Classes
    class_counts_C: tuple[int, ...]
    """Training rows of each class."""
    seeds: tuple[SeedResult, ...]
    warnings: tuple[str, ...] = ()

    @property
    def tail_class(self) -> int:
        """Index of the class with the fewest training rows."""
        return int(np.argmin(self.class_counts_C))


@dataclass(frozen=True)
class Datasets:
    """The tokenised data of a run."""

    train: StageData
    test: StageData
    augmented: StageData | None


def train_two_stage(
    model: str | Path,
    train: Table | tuple[list[str], list[str] | list[int]],
    test: Table | tuple[list[str], list[str] | list[int]],
    recipe: Recipe | None = None,
    *,
    augmented: Table | tuple[list[str], list[str] | list[int]] | None = None,
    on_report: Callable[[StepReport], None] | None = None,
    on_seed_end: Callable[[Result, BertClassifier], None] | None = None,
    show_progress: bool = False,
) -> Result:
    """Run the algorithm on data in memory; nothing is written and no global state is touched.

    model: folder with `config.json`, `model.safetensors` and a tokenizer.
    train, test, augmented: a Table or (texts, labels); labels are integers or strings.
    on_report: called every few steps. on_seed_end: called with the result so far and the seed's
    trained model, which is freed afterwards.
    Raises UsageError, DataError, ModelError or NonFiniteError.
    """
    recipe = recipe or Recipe()
    device = choose_device(recipe.device)
    train, test = _as_table(train, "train"), _as_table(test, "test")
    augmented = None if augmented is None else _as_table(augmented, "augmented")
    if recipe.method == "augment" and recipe.has_stage_1 and augmented is None:
        raise DataError("method 'augment' needs augmented data, and none was given")
    classes = find_classes(train)
    labels = {table.source: classes.encode(table) for table in (train, test, augmented) if table}

    checkpoint = load_checkpoint(model)
    tokenizer = load_tokenizer(model)
    _check_fit(recipe, checkpoint.config, tokenizer.get_vocab_size(), str(model))

    def prepare(table: Table) -> StageData:
        title = f"tokenizing {Path(table.source).name}"
        store = tokenize(
            tokenizer,
            table.texts,
            recipe.max_length,
            description=title,
            show_progress=show_progress,
        )
        return StageData(store, labels[table.source])

    data = Datasets(
        prepare(train),
        prepare(test),
        prepare(augmented) if augmented and recipe.method == "augment" else None,
    )
    counts_C = tuple(np.bincount(data.train.labels_N, minlength=len(classes)).tolist())
    result = Result(classes, counts_C, (), checkpoint.warnings)
    for seed in recipe.seeds:
        trained, seed_result = train_one_seed(
            checkpoint, data, recipe, seed, len(classes), device, on_report, show_progress
        )
        result = replace(result, seeds=(*result.seeds, seed_result))
        if on_seed_end is not None:
            on_seed_end(result, trained)
    return result


def train_one_seed(
    checkpoint: Checkpoint,
    data: Datasets,
    recipe: Recipe,
    seed: int,
    num_classes: int,
    device: torch.device,
    on_report: Callable[[StepReport], None] | None = None,
    show_progress: bool = False,
) -> tuple[BertClassifier, SeedResult]:
    """Fresh pretrained weights → stage 1 → stage 2 → evaluation. Returns the model and scores."""
    began = perf_counter()
    dtype = choose_precision(recipe.precision, device)
    generator = torch.Generator().manual_seed(derive_seed(HEAD_STREAM, seed))
    model = build_model(checkpoint, num_classes, generator).to(device)
    state = TrainingState(seed, model)

    if recipe.has_stage_1:
        state.begin_stage(1)
        freeze_below_top(model, recipe.stage_1_layers)
        stage_1_data = data.train if data.augmented is None else data.augmented
        augmenting = recipe.method == "augment"
        loss = make_loss(
            recipe.loss or ("ce" if augmenting else "ldam"),
            recipe.class_weights or ("none" if augmenting else "effective"),
            np.bincount(stage_1_data.labels_N, minlength=num_classes).tolist(),
            device,
            ldam_s=recipe.ldam_s,
            ldam_max_m=recipe.ldam_max_m,
        )
        settings = StageSettings(
            epochs=recipe.epochs_stage_1,
            learning_rate=recipe.learning_rate_stage_1,
            batch_size=recipe.batch_size,
            sampler=recipe.sampler,
            dtype=dtype,
            schedule_steps=upstream_steps(recipe, len(data.train)),
        )
        train_stage(
            state, stage_1_data, loss, settings, on_report=on_report, show_progress=show_progress
        )

    state.begin_stage(2)
    unfreeze(model)
    balanced_before = recipe.has_stage_1 and recipe.sampler == "class-balanced"
    settings = StageSettings(
        epochs=recipe.epochs_stage_2,
        learning_rate=recipe.learning_rate_stage_2,
        batch_size=recipe.batch_size,
        sampler="random" if balanced_before else recipe.sampler,
        dtype=dtype,
    )
    loss = make_loss("ce", "none", [], device)
    train_stage(state, data.train, loss, settings, on_report=on_report, show_progress=show_progress)

    logits_NC = predict_logits(model, data.test.store, dtype=dtype, show_progress=show_progress)
    metrics = compute_metrics(data.test.labels_N, logits_NC.numpy().argmax(axis=1), num_classes)
    return model, SeedResult(seed, metrics, logits_NC.numpy(), perf_counter() - began)


def freeze_below_top(model: BertClassifier, num_layers: int) -> None:
    """Leave only the last `num_layers` encoder layers, the pooler and the head to be trained."""
    model.requires_grad_(False)
    encoder = model.bert
    top = list(encoder.layers)[len(encoder.layers) - num_layers :]
    for module in (*top, encoder.pooler, model.classifier):
        module.requires_grad_(True)


def unfreeze(model: BertClassifier) -> None:
    """Let everything be trained."""
    model.requires_grad_(True)


def upstream_steps(recipe: Recipe, num_train: int) -> int | None:
    """Stage 1's schedule length as the published code counts it; None: its own length."""
    if not recipe.upstream_schedule:
        return None
    return recipe.epochs_stage_1 * -(-num_train // recipe.batch_size)


def _as_table(data: Table | tuple[list[str], list[str] | list[int]], name: str) -> Table:
    if isinstance(data, Table):
        return data
    texts, labels = data
    return Table(texts, labels, f"{name} data")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def _check_fit(recipe: Recipe, config: BertConfig, vocabulary: int, model: str) -> None:
    if recipe.max_length > config.max_position_embeddings:
        raise UsageError(
            f"max_length is {recipe.max_length}, but '{model}' has "
            f"{config.max_position_embeddings} positions"
        )
    if recipe.stage_1_layers > config.num_hidden_layers:
        raise UsageError(
            f"stage_1_layers is {recipe.stage_1_layers}, but '{model}' has "
            f"{config.num_hidden_layers} layers"
        )
    if vocabulary > config.vocab_size:
        raise ModelError(
            f"the tokenizer of '{model}' has {vocabulary} tokens, but its config.json says "
            f"vocab_size {config.vocab_size}"
        )
