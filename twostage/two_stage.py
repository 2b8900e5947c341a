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

from .data.token_store import StageData
from .model.bert import BertClassifier
from .model.checkpoint import Checkpoint, build_model
from .recipe import Recipe
from .training.losses import Loss, cross_entropy, ldam, ldam_margins, make_class_weights
from .training.stage import train_stage
from .training.state import HEAD_STREAM, TrainingState, derive_seed

CPU = torch.device("cpu")


def fine_tune(
    checkpoint: Checkpoint,
    train: StageData,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    *,
    augmented: StageData | None = None,
    device: torch.device = CPU,
    train_stage: Callable[..., None] = train_stage,
) -> BertClassifier:
    """THE ALGORITHM: a trained classifier for one seed.

    train: the imbalanced data. augmented: class-balanced data, for method `augment`.
    train_stage: the loop, for another step or a report.
    """
    generator = torch.Generator().manual_seed(derive_seed(HEAD_STREAM, seed))
    model = build_model(checkpoint, num_classes, generator).to(device)

    # Stage 1: the top learns alone, from a signal in which every class counts the same: balanced
    # data (`augment`) or a balanced loss on the data as they are (`reweight`).
    if recipe.has_stage_1:
        freeze_below_top(model, recipe.stage_1_layers)
        data = train
        if recipe.method == "augment":
            assert augmented is not None, "method 'augment' needs augmented data"
            data = augmented
        loss = stage_1_loss(data, num_classes, recipe, device)
        settings = recipe.stage_1_settings(len(train))
        train_stage(TrainingState(seed, model, stage=1), data, loss, settings)

    # Stage 2: standard fine-tuning of everything, on the data as they are.
    model.requires_grad_(True)
    settings = recipe.stage_2_settings()
    train_stage(TrainingState(seed, model, stage=2), train, cross_entropy, settings)
    return model


def stage_1_loss(
    data: StageData, num_classes: int, recipe: Recipe, device: torch.device = CPU
) -> Loss:
    """LDAM with class weights; for `augment`, unless the recipe differs, plain cross-entropy."""
    counts_C = data.class_counts(num_classes)
    # A rare class weighs more ...
    weights_C = make_class_weights(recipe.stage_1_class_weights, counts_C)
    if weights_C is not None:
        weights_C = weights_C.to(device)
    if recipe.stage_1_loss == "ce":
        return partial(cross_entropy, class_weights_C=weights_C)
    # ... and must win by more.
    margins_C = ldam_margins(counts_C, recipe.ldam_max_m).to(device)
    return partial(ldam, margins_C=margins_C, class_weights_C=weights_C, scale=recipe.ldam_s)


def freeze_below_top(model: BertClassifier, num_layers: int) -> None:
    """Leave only the last `num_layers` encoder layers, the pooler and the head to be trained."""
    model.requires_grad_(False)
    layers = list(model.bert.layers)
    for module in (*layers[len(layers) - num_layers :], model.bert.pooler, model.classifier):
        module.requires_grad_(True)
