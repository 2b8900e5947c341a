"""Two-stage fine-tuning for class-imbalanced text: the algorithm. Start reading here.

Standard fine-tuning on long-tailed data starves the tail classes: most batches hold few of their
examples or none. Two-stage fine-tuning first lets only the top of the pretrained encoder learn,
from a class-balanced signal, then fine-tunes everything in the standard way. Stage 2 alone is
vanilla fine-tuning. `training/stage.py` has the loop, `training/losses.py` the formulas.

Source: ValizadehAslani et al. 2022, "Two-Stage Fine-Tuning: A Novel Strategy for Learning
Class-Imbalanced Data" (arXiv 2207.10858). With ChatGPT augmentation: Neurocomputing 592:127801,
2024.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .data.packing import CPU
from .data.token_store import StageData
from .model.bert import BertClassifier
from .model.checkpoint import Checkpoint, build_model
from .recipe import Recipe
from .training.losses import Loss, cross_entropy, ldam, ldam_margins, make_class_weights
from .training.stage import StageSettings, train_stage
from .training.state import HEAD_STREAM, TrainingState, derive_seed


def fine_tune(
    checkpoint: Checkpoint,
    train: StageData,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    *,
    augmented: StageData | None = None,
    device: torch.device = CPU,
    run_stage: Callable[[TrainingState, StageData, Loss, StageSettings], None] = train_stage,
) -> BertClassifier:
    """THE ALGORITHM: a trained classifier for one seed.

    train: the imbalanced data. augmented: class-balanced data, for method `augment`.
    run_stage: the loop, for another step, precision or report.
    """
    generator = torch.Generator().manual_seed(derive_seed(HEAD_STREAM, seed))
    model = build_model(checkpoint, num_classes, generator).to(device)

    # Stage 1: the top learns alone, from a signal in which every class counts the same.
    if recipe.has_stage_1:
        freeze_below_top(model, recipe.stage_1_layers)
        data, loss = stage_1_signal(train, augmented, num_classes, recipe, device)
        settings = recipe.stage_1_settings(len(train))
        run_stage(TrainingState(seed, model, stage=1), data, loss, settings)

    # Stage 2: standard fine-tuning of everything, on the data as they are.
    model.requires_grad_(True)
    state, settings = TrainingState(seed, model, stage=2), recipe.stage_2_settings()
    run_stage(state, train, cross_entropy, settings)
    return model


def stage_1_signal(
    train: StageData,
    augmented: StageData | None,
    num_classes: int,
    recipe: Recipe,
    device: torch.device = CPU,
) -> tuple[StageData, partial[Tensor]]:
    """Balance the data (`augment`), or balance the loss (`reweight`)."""
    if recipe.method == "augment":
        assert augmented is not None, "method 'augment' needs augmented data"
        data, loss, class_weights = augmented, "ce", "none"
    else:
        data, loss, class_weights = train, "ldam", "effective"
    counts_C = data.class_counts(num_classes)
    # A rare class weighs more ...
    weights_C = make_class_weights(recipe.class_weights or class_weights, counts_C)
    if weights_C is not None:
        weights_C = weights_C.to(device)
    if (recipe.loss or loss) == "ce":
        return data, partial(cross_entropy, class_weights_C=weights_C)
    # ... and must win by more.
    margins_C = ldam_margins(counts_C, recipe.ldam_max_m).to(device)
    return data, partial(ldam, margins_C=margins_C, class_weights_C=weights_C, scale=recipe.ldam_s)


def freeze_below_top(model: BertClassifier, num_layers: int) -> None:
    """Leave only the last `num_layers` encoder layers, the pooler and the head to be trained."""
    model.requires_grad_(False)
    layers = list(model.bert.layers)
    for module in (*layers[len(layers) - num_layers :], model.bert.pooler, model.classifier):
        module.requires_grad_(True)
