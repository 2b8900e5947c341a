"""Training with the Triton kernels is training without them."""

from functools import partial
from typing import Any

import pytest
import torch

from twostage.data.token_store import StageData
from twostage.fast.randomness import counted_masks
from twostage.fast.step import Step, make_step
from twostage.kernels import adamw
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.progress import StepReport
from twostage.recipe import Recipe
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import StageSettings, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top, stage_1_signal

RATE = 5e-4
"""Moves the loss by tenths in ten steps, and lets roundings in 16 bits grow to hundredths."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def data(random_store: Any) -> StageData:
    return StageData(random_store(60, 19, 90), (torch.arange(60) % 3 == 0).long().numpy())


def train(
    checkpoint: Checkpoint, data: StageData, stage: int, dtype: torch.dtype, impl: str, rate: float
) -> list[StepReport]:
    """Ten steps, a report after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0)).to(device)
    if stage == 1:
        freeze_below_top(model, 1)
    reports: list[StepReport] = []
    train_stage(
        TrainingState(7, model, stage),
        data,
        stage_1_signal(data, None, 2, Recipe(), device)[1] if stage == 1 else cross_entropy,
        StageSettings(1, rate, batch_size=6),
        dtype=dtype,
        make_step=partial(make_step, impl=impl),
        on_report=reports.append,
    )
    assert len(reports) == 10
    return reports


@pytest.fixture
def always_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without kernels masks are counted too; else they would be drawn from a generator."""

    def count_masks(step: Step) -> None:
        step.make_masks = partial(counted_masks, step)

    monkeypatch.setattr("twostage.fast.randomness.count_masks", count_masks)
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the kernels that have run."""
    names: set[str] = set()
    launcher = type(adamw.adamw_kernel)  # compiled, or interpreted
    original = launcher.run

    def run(self: Any, *arguments: Any, **more: Any) -> Any:
        names.add(self.fn.__name__)
        return original(self, *arguments, **more)

    monkeypatch.setattr(launcher, "run", run)
    return names


@pytest.mark.slow
@pytest.mark.usefixtures("always_counted")
@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float32), *((2, d) for d in DTYPES)])
def test_losses_are_those_without_kernels(
    short_heads_checkpoint: Checkpoint,
    data: StageData,
    launched: set[str],
    kernel_names: set[str],
    measure_spread: Any,
    stage: int,
    dtype: torch.dtype,
) -> None:
    """Each step's loss and gradient norm, as far as roundings let it (`conftest.py`)."""

    def run(checkpoint: Checkpoint, impl: str = "torch", rate: float = RATE) -> list[torch.Tensor]:
        reports = train(checkpoint, data, stage, dtype, impl, rate)
        return [torch.tensor([getattr(r, name) for r in reports]) for name in ("loss", "grad_norm")]

    spread = measure_spread(run, short_heads_checkpoint, dtype)
    theirs = run(short_heads_checkpoint)
    still = run(short_heads_checkpoint, rate=1e-30)
    moved = ((still[0] - theirs[0]) / theirs[0]).abs().max()
    assert moved > 3 * spread.steps[0].max(), "the updates matter"
    assert not launched
    spread.check(run(short_heads_checkpoint, "triton"), theirs)
    # Else torch could have been compared with torch. In stage 1 the embeddings are frozen.
    without = {"embedding_backward_kernel"} if stage == 1 else set()
    if dtype == torch.float32 and torch.cuda.is_available():  # attention's are for 16 bits there
        without |= {name for name in kernel_names if name.startswith("attention_")}
    assert launched == kernel_names - without
