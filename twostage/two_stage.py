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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from .data.classes import Classes
from .data.containers import LabelledTexts
from .model.bert import BertClassifier
from .model.checkpoint import Checkpoint, build_model
from .preparation import Datasets, PreparedRun, prepare_run
from .recipe import Recipe
from .training.evaluation import predict_logits
from .training.losses import cross_entropy
from .training.metrics import Metrics, compute_metrics
from .training.precision import choose_device, choose_precision
from .training.stage import StepReport, train_stage
from .training.state import HEAD_STREAM, TrainingState, derive_seed
from .training.trunk import Features, cache_features


@dataclass(frozen=True)
class SeedResult:
    """The outcome of one seed."""

    seed: int
    metrics: Metrics
    """On the test data."""
    logits_NC: np.ndarray
    """[N, C] fp32, of the test data in its order."""
    seconds_stage_1: float
    """Building the model included."""
    seconds_stage_2: float
    seconds_evaluation: float

    @property
    def seconds(self) -> float:
        """Both stages and the evaluation."""
        return self.seconds_stage_1 + self.seconds_stage_2 + self.seconds_evaluation


@dataclass(frozen=True)
class Result:
    """The outcome of a run: one SeedResult a seed, in the order of `Recipe.seeds`."""

    classes: Classes
    class_counts_C: tuple[int, ...]
    """Training rows of each class."""
    seeds: tuple[SeedResult, ...] = ()

    @property
    def tail_class(self) -> int:
        """Index of the class with the fewest training rows."""
        return int(np.argmin(self.class_counts_C))


def train_one_seed(
    checkpoint: Checkpoint,
    data: Datasets,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    on_report: Callable[[StepReport], None] | None = None,
    show_progress: bool = False,
) -> tuple[BertClassifier, SeedResult]:
    """THE ALGORITHM for one seed. Returns the trained model and its scores on the test data."""
    dtype = choose_precision(recipe.precision, device)
    run_stage = partial(train_stage, on_report=on_report, show_progress=show_progress)

    times = [perf_counter()]
    generator = torch.Generator().manual_seed(derive_seed(HEAD_STREAM, seed))
    model = build_model(checkpoint, data.num_classes, generator).to(device)
    state = TrainingState(seed, model)

    if recipe.has_stage_1:
        freeze_below_top(model, recipe.stage_1_layers)
        state.begin_stage(1)
        loss = recipe.stage_1_loss(data.stage_1.class_counts(data.num_classes), device)
        settings = recipe.stage_1_settings(dtype, len(data.train))
        run_stage(state, data.stage_1, loss, settings, features=data.stage_1_features)
    times.append(perf_counter())

    unfreeze(model)
    state.begin_stage(2)
    loss = partial(cross_entropy, impl=recipe.kernels)
    run_stage(state, data.train, loss, recipe.stage_2_settings(dtype))
    times.append(perf_counter())

    logits_NC = predict_logits(
        model, data.test.store, dtype=dtype, impl=recipe.kernels, show_progress=show_progress
    ).numpy()
    metrics = compute_metrics(data.test.labels_N, logits_NC)
    times.append(perf_counter())
    return model, SeedResult(seed, metrics, logits_NC, *np.diff(times).tolist())


def compute_stage_1_features(
    checkpoint: Checkpoint,
    data: Datasets,
    recipe: Recipe,
    device: torch.device,
    show_progress: bool = False,
) -> Sequence[Features]:
    """What stage 1 leaves frozen is the same for all seeds: compute its output once for them."""
    model = build_model(checkpoint, data.num_classes, torch.Generator()).to(device)
    freeze_below_top(model, recipe.stage_1_layers)
    dtype = choose_precision(recipe.precision, device)
    num_epochs = recipe.epochs_stage_1 if recipe.share_trunk else None
    return cache_features(
        model, data.stage_1.store, dtype, recipe.kernels, num_epochs, show_progress=show_progress
    )


def freeze_below_top(model: BertClassifier, num_layers: int) -> None:
    """Leave only the last `num_layers` encoder layers, the pooler and the head to be trained."""
    model.requires_grad_(False)
    layers = list(model.bert.layers)
    for module in (*layers[len(layers) - num_layers :], model.bert.pooler, model.classifier):
        module.requires_grad_(True)


def unfreeze(model: BertClassifier) -> None:
    """Let everything be trained."""
    model.requires_grad_(True)


def train_two_stage(
    model: str | Path,
    train: LabelledTexts,
    test: LabelledTexts,
    recipe: Recipe | None = None,
    *,
    augmented: LabelledTexts | None = None,
    on_report: Callable[[StepReport], None] | None = None,
    on_seed_end: Callable[[Result, BertClassifier], None] | None = None,
    show_progress: bool = False,
) -> Result:
    """Run every seed on data in memory; no file is written and no global state is touched.

    model: folder with `config.json`, `model.safetensors` and a tokenizer.
    train, test, augmented: a Table, (texts, labels), (text, label) pairs, or a mapping or frame
    with the columns text and label. `data.classes` says which class a label means.
    on_report: called every few steps. on_seed_end: called with the result so far and the seed's
    trained model, which is freed afterwards.
    Raises UsageError, DataError, ModelError or NonFiniteError.
    """
    recipe = recipe or Recipe()
    run = prepare_run(model, train, test, recipe, augmented, show_progress=show_progress)
    return train_seeds(run, on_report, on_seed_end, show_progress)


def train_seeds(
    run: PreparedRun,
    on_report: Callable[[StepReport], None] | None = None,
    on_seed_end: Callable[[Result, BertClassifier], None] | None = None,
    show_progress: bool = False,
) -> Result:
    """Run every seed of the recipe; the parameters are those of `train_two_stage`."""
    recipe, checkpoint, data = run.recipe, run.checkpoint, run.data
    device = choose_device(recipe.device)
    if recipe.has_stage_1 and (recipe.cache_trunk or recipe.share_trunk):
        features = compute_stage_1_features(checkpoint, data, recipe, device, show_progress)
        data = replace(data, stage_1_features=features)

    result = Result(run.classes, run.class_counts_C)
    for seed in recipe.seeds:
        trained, seed_result = train_one_seed(
            checkpoint, data, recipe, seed, device, on_report, show_progress
        )
        result = replace(result, seeds=(*result.seeds, seed_result))
        if on_seed_end is not None:
            on_seed_end(result, trained)
        del trained  # before the next seed's model is built
    return result
