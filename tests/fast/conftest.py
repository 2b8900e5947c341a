"""How far two runs of the same training may part: as far as roundings of its own size drive it.

AdamW divides a gradient by its own size, so the rounding error of a tiny gradient becomes a step of
the learning rate, and no fixed tolerance holds on every machine. So each test measures its own: it
trains again from weights that are off by half a spacing, three times, and sees how far these runs
part from the first. Two implementations that differ by roundings alone part by as much; a wrong
gradient, mask or rate parts them by its own size at the first update.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from twostage.data.token_store import StageData, TokenStore
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.progress import StepReport
from twostage.recipe import Recipe
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import MakeStep, StageSettings, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top, stage_1_signal

FACTOR = 4.0
"""Two, as both runs that are compared are off; and two, as three runs may miss the worst."""


@dataclass(frozen=True)
class Spread:
    """Allowed differences, relative."""

    steps: list[Tensor]
    """One tensor for each measured number, with an entry for each step."""

    def check(self, ours: list[Tensor], theirs: list[Tensor]) -> None:
        """Each step's numbers are as near to each other as the spread allows."""
        for i, (mine, its, allowed) in enumerate(zip(ours, theirs, self.steps, strict=True)):
            apart = ((mine - its) / its).abs()
            assert (apart <= allowed).all(), f"number {i}: {apart} apart, {allowed} allowed"


MeasureSpread = Callable[[Callable[[Checkpoint], list[Tensor]], Checkpoint, torch.dtype], Spread]


def nudge(checkpoint: Checkpoint, dtype: torch.dtype, seed: int) -> Checkpoint:
    """Each weight off by up to half the spacing of `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.finfo(dtype).eps / 2
    tensors = {
        name: t * (1 + half * (2 * torch.rand(t.shape, generator=generator) - 1))
        for name, t in checkpoint.tensors.items()
    }
    return replace(checkpoint, tensors=tensors)


@pytest.fixture(scope="session")
def nudged() -> Callable[[Checkpoint, torch.dtype, int], Checkpoint]:
    return nudge


@pytest.fixture(scope="session")
def measure_spread() -> MeasureSpread:
    """Takes what trains a checkpoint and returns a number a step, for each of several numbers."""

    def measure(
        run: Callable[[Checkpoint], list[Tensor]], checkpoint: Checkpoint, dtype: torch.dtype
    ) -> Spread:
        exact = run(checkpoint)
        others = [run(nudge(checkpoint, dtype, seed)) for seed in range(3)]
        # Differences grow, but not at each step: what was reached may be reached again.
        apart = [
            torch.stack([((o[i] - e) / e).abs() for o in others]).amax(0).cummax(0).values
            for i, e in enumerate(exact)
        ]
        return Spread([FACTOR * (a + torch.finfo(dtype).eps) for a in apart])

    return measure


@pytest.fixture
def data(random_store: Callable[[int, int, int], TokenStore]) -> StageData:
    """50 texts of 2 to 19 tokens, of two classes; no text has one of the tokens from 80 on."""
    return StageData(random_store(50, 19, 80), np.arange(50) % 3 // 2)


@dataclass(frozen=True)
class Trained:
    """A stage that was trained."""

    state: TrainingState
    reports: list[StepReport]
    """One a step."""

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.reports]


Train = Callable[..., Trained]


@pytest.fixture
def start() -> Callable[..., TrainingState]:
    """Takes a checkpoint, a stage and the probability of dropout."""

    def start_stage(checkpoint: Checkpoint, stage: int, dropout: float = 0.0) -> TrainingState:
        config = replace(
            checkpoint.config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
        checkpoint = replace(checkpoint, config=config)
        model = build_model(checkpoint, 2, torch.Generator().manual_seed(0))
        if stage == 1:
            freeze_below_top(model, 1)
        return TrainingState(7, model, stage)

    return start_stage


@pytest.fixture
def train(
    start: Callable[..., TrainingState], data: StageData, monkeypatch: pytest.MonkeyPatch
) -> Train:
    """Trains a stage by a step, at a rate that moves the loss by tenths."""
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)

    def train_by(
        checkpoint: Checkpoint,
        stage: int,
        make_step: MakeStep,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> Trained:
        state, reports = start(checkpoint, stage, dropout), list[StepReport]()
        loss = stage_1_signal(data, None, 2, Recipe())[1] if stage == 1 else cross_entropy
        hyperparameters = {"epochs": 2, "learning_rate": 1e-3, "batch_size": 8} | settings
        train_stage(
            state,
            data,
            loss,
            StageSettings(**hyperparameters),
            dtype=dtype,
            make_step=make_step,
            on_report=reports.append,
        )
        return Trained(state, reports)

    return train_by
