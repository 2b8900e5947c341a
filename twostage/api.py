"""Two-stage fine-tuning on data in memory: every seed trained, timed and evaluated.

The algorithm itself is `two_stage.fine_tune`; here is what surrounds it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import torch

from .data.classes import Classes
from .data.containers import LabelledTexts
from .data.token_store import StageData
from .fast.step import make_step as make_fast_step
from .machine import choose_device, choose_precision
from .model.bert import BertClassifier
from .model.checkpoint import Checkpoint, build_model
from .preparation import Datasets, PreparedRun, prepare_run
from .progress import StepReport
from .recipe import Recipe
from .training.evaluation import predict_logits
from .training.losses import Loss
from .training.metrics import Metrics, compute_metrics
from .training.stage import MakeStep, StageSettings, make_plain_step, train_stage
from .training.state import TrainingState
from .two_stage import fine_tune, freeze_below_top, stage_1_signal

if TYPE_CHECKING:
    from .fast.trunk import Features


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
    make_step = choose_step(run.checkpoint, run.data, run.recipe, show_progress)
    result = Result(run.classes, run.class_counts_C)
    for seed in run.recipe.seeds:
        trained, seed_result = train_one_seed(
            run.checkpoint, run.data, run.recipe, seed, make_step, on_report, show_progress
        )
        result = replace(result, seeds=(*result.seeds, seed_result))
        if on_seed_end is not None:
            on_seed_end(result, trained)
        del trained  # before the next seed's model is built
    return result


def train_one_seed(
    checkpoint: Checkpoint,
    data: Datasets,
    recipe: Recipe,
    seed: int,
    make_step: MakeStep,
    on_report: Callable[[StepReport], None] | None = None,
    show_progress: bool = False,
) -> tuple[BertClassifier, SeedResult]:
    """The trained model of one seed, and its scores on the test data."""
    device = choose_device(recipe.device)
    dtype = choose_precision(recipe.precision, device)
    began = began_stage_2 = perf_counter()

    def run_stage(
        state: TrainingState, stage_data: StageData, loss: Loss, settings: StageSettings
    ) -> None:
        nonlocal began_stage_2
        if state.stage == 2:
            began_stage_2 = perf_counter()
        train_stage(
            state,
            stage_data,
            loss,
            settings,
            dtype=dtype,
            make_step=make_step,
            on_report=on_report,
            show_progress=show_progress,
        )

    model = fine_tune(
        checkpoint,
        data.train,
        data.num_classes,
        recipe,
        seed,
        augmented=data.augmented,
        device=device,
        run_stage=run_stage,
    )
    ended_training = perf_counter()
    logits_NC = predict_logits(
        model, data.test.store, dtype=dtype, impl=recipe.kernels, show_progress=show_progress
    ).numpy()
    metrics = compute_metrics(data.test.labels_N, logits_NC)
    return model, SeedResult(
        seed,
        metrics,
        logits_NC,
        seconds_stage_1=began_stage_2 - began,
        seconds_stage_2=ended_training - began_stage_2,
        seconds_evaluation=perf_counter() - ended_training,
    )


def choose_step(
    checkpoint: Checkpoint, data: Datasets, recipe: Recipe, show_progress: bool = False
) -> MakeStep:
    """The step that the recipe asks for, and what all seeds share of it."""
    if recipe.engine == "plain":
        return make_plain_step
    features: Sequence[Features] = ()
    if recipe.has_stage_1 and (recipe.cache_trunk or recipe.share_trunk):
        features = compute_stage_1_features(checkpoint, data, recipe, show_progress)
    return partial(make_fast_step, impl=recipe.kernels, graphs=recipe.graphs, features=features)


def compute_stage_1_features(
    checkpoint: Checkpoint, data: Datasets, recipe: Recipe, show_progress: bool = False
) -> "Sequence[Features]":
    """What stage 1 leaves frozen is the same for all seeds: compute its output once for them."""
    from .fast.trunk import cache_features  # here: training does without it

    device = choose_device(recipe.device)
    dtype = choose_precision(recipe.precision, device)
    model = build_model(checkpoint, data.num_classes, torch.Generator()).to(device)
    freeze_below_top(model, recipe.stage_1_layers)
    stage_1_data, _ = stage_1_signal(data.train, data.augmented, data.num_classes, recipe)
    num_epochs = recipe.epochs_stage_1 if recipe.share_trunk else None
    return cache_features(
        model, stage_1_data.store, dtype, recipe.kernels, num_epochs, show_progress=show_progress
    )
