"""Training with the Triton kernels is training without them."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from twostage.data.packing import TokenStore
from twostage.kernels import adamw
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training import inputs, masks, trunk
from twostage.training import stage as stage_module
from twostage.training.losses import Loss, cross_entropy, make_loss
from twostage.training.stage import StageData, StageSettings, StepReport, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative, of each step's loss: steps let roundings grow, and those of bf16 are 2^-8, or, where
Triton's interpreter cuts off what a GPU rounds, twice that."""


@pytest.fixture
def data() -> StageData:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 20, (60,), generator=generator)
    ids = torch.randint(1, 90, (int(lengths.sum()),), generator=generator).int()
    offsets = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)])
    labels_N = (torch.arange(60) % 3 == 0).long().numpy()
    return StageData(TokenStore(ids, offsets), labels_N)


def train(
    checkpoint: Checkpoint, data: StageData, settings: StageSettings, stage: int, loss: Loss
) -> list[StepReport]:
    """Ten steps, a report after each."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0)).to(device)
    state = TrainingState(7, model)
    if stage == 1:
        freeze_below_top(model, 1)
    state.begin_stage(stage)
    reports: list[StepReport] = []
    train_stage(state, data, loss, settings, on_report=reports.append)
    assert len(reports) == 10
    return reports


@pytest.fixture
def always_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain path takes counted masks too; of itself it would draw them from a generator."""

    def count(*arguments: Any) -> masks.Masks:
        return masks.seed_masks(*arguments[:-1], "triton")

    monkeypatch.setattr(inputs, "seed_masks", count)
    monkeypatch.setattr(trunk, "seed_masks", count)
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


@pytest.mark.usefixtures("always_counted")
@pytest.mark.parametrize(("stage", "dtype"), [(1, torch.float32), *((2, d) for d in TOLERANCE)])
def test_ten_steps_with_and_without_kernels_have_the_same_losses(
    short_heads_checkpoint: Checkpoint,
    data: StageData,
    launched: set[str],
    kernel_names: set[str],
    stage: int,
    dtype: torch.dtype,
) -> None:
    settings = StageSettings(epochs=1, learning_rate=2e-3, batch_size=6, dtype=dtype)
    losses, norms = [], []
    for impl, rate in (("torch", 1e-30), ("torch", 2e-3), ("triton", 2e-3)):
        loss: Loss = partial(cross_entropy, impl=impl)
        if stage == 1:
            counts = data.class_counts(2)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            loss = make_loss("ldam", "effective", counts, device, impl=impl)
        assert not launched
        now = replace(settings, impl=impl, learning_rate=rate)
        reports = train(short_heads_checkpoint, data, now, stage, loss)
        losses.append(torch.tensor([report.loss for report in reports]))
        norms.append(torch.tensor([report.grad_norm for report in reports]))
    assert ((losses[1] - losses[0]).abs() / losses[1]).max() > 0.06, "the updates matter"
    torch.testing.assert_close(losses[2], losses[1], rtol=TOLERANCE[dtype], atol=0)
    if dtype == torch.float32:  # in 16 bits, the norm of a small gradient is mostly roundings
        torch.testing.assert_close(norms[2], norms[1], rtol=10 * TOLERANCE[dtype], atol=0)
    # Else torch could have been compared with torch. In stage 1 the embeddings are frozen.
    without = {"embedding_backward_kernel"} if stage == 1 else set()
    if dtype == torch.float32 and torch.cuda.is_available():  # attention's are for 16 bits there
        without |= {name for name in kernel_names if name.startswith("attention_")}
    assert launched == kernel_names - without
