"""What must hold on every device: run on the CPU, and on a CUDA GPU where there is one.

Needs no network: the models are small and random.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.data.packing import pack
from twostage.data.token_store import StageData
from twostage.errors import NonFiniteError
from twostage.fast.step import make_step
from twostage.fast.weights import WORD_EMBEDDINGS
from twostage.kernels.attention import packed_attention, packed_layout
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.kernels.dropout import dropout
from twostage.kernels.residual_norm import (
    dropout_residual_norm,
    reference_dropout_residual_norm,
)
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.progress import StepReport
from twostage.training import evaluation
from twostage.training.evaluation import predict_logits
from twostage.training.losses import cross_entropy, ldam
from twostage.training.stage import StageSettings, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NO_GPU)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device in turn, multiplying fp32 in full precision."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(previous)


@pytest.fixture
def data(random_store: Any) -> StageData:
    """60 texts of 2 to 30 tokens; the label is whether the second token is number 50."""
    store, labels_N = random_store(60, 30, 50), np.arange(60) % 2
    store.ids[store.offsets[:-1][torch.from_numpy(labels_N == 1)] + 1] = 50
    return StageData(store, labels_N)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    difference = ours.detach().double().cpu() - exact.detach().double().cpu()
    return float(difference.norm() / exact.detach().double().norm())


def run_stage(
    checkpoint: Checkpoint,
    data: StageData,
    device: torch.device,
    settings: StageSettings,
    stage: int = 2,
    dtype: torch.dtype = torch.float32,
) -> tuple[TrainingState, list[StepReport]]:
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0)).to(device)
    if stage == 1:
        freeze_below_top(model, 1)
    state = TrainingState(7, model, stage=stage)
    reports: list[StepReport] = []
    train_stage(
        state,
        data,
        cross_entropy,
        settings,
        dtype=dtype,
        make_step=make_step,
        on_report=reports.append,
    )
    return state, reports


def without_dropout(checkpoint: Checkpoint) -> Checkpoint:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    fields = {**vars(checkpoint.config), **off}
    return Checkpoint(type(checkpoint.config)(**fields), checkpoint.tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_within_twice_torchs_error_of_float64(
    device: torch.device, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC = 4 * torch.randn(37, 5, generator=generator)
    labels_B = torch.randint(5, (37,), generator=generator)
    weights_C, margins_C = torch.rand(2, 5, generator=generator) + 0.1

    def run(operation: Any, logits: Tensor, to: torch.device) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().to(to).requires_grad_()
        kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
        weights, margins = (t.to(to, kind) for t in (weights_C, margins_C))
        settings = {"margins_C": margins, "class_weights_C": weights, "scale": 2.0}
        loss: Tensor = partial(operation, **settings)(leaf, labels_B.to(to))
        loss.backward()
        assert leaf.grad is not None
        return loss, leaf.grad

    rounded = logits_BC.to(dtype)
    exact = run(ldam, rounded.double(), torch.device("cpu"))
    ours = run(fused_cross_entropy, rounded, device)
    theirs = run(ldam, rounded, device)
    for mine, their, true in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, true) <= 2 * relative_error(their, true) + 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attention_equals_torchs_sequence_by_sequence(
    device: torch.device, dtype: torch.dtype, bound: float
) -> None:
    lengths, heads, size = [1, 17, 128, 5], 3, 8
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths) + 9, 3 * heads * size, generator=generator).to(dtype)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    exact_in = qkv.double().requires_grad_()
    contexts = []
    for part in exact_in[: sum(lengths)].split(lengths):
        q, k, v = part.view(-1, 3, heads, size).permute(1, 2, 0, 3)
        contexts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    exact = torch.cat(contexts)
    exact.sum().backward()
    ours_in = qkv.to(device).requires_grad_()
    layout = packed_layout(cu_seqlens.to(device))
    ours = packed_attention(ours_in, layout, heads)
    ours.sum().backward()
    assert ours_in.grad is not None
    assert exact_in.grad is not None
    assert relative_error(ours[: sum(lengths)], exact) < bound
    assert relative_error(ours_in.grad, exact_in.grad) < bound
    assert not ours[sum(lengths) :].any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_dropout_residual_norm_equals_its_parts(
    device: torch.device, dtype: torch.dtype, bound: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(70, 48), (70, 48), (48,), (48,)]
    leaves = [torch.randn(shape, generator=generator) for shape in shapes]
    leaves[:2] = [leaf.to(dtype) for leaf in leaves[:2]]
    if device.type == "cuda":  # there the norm's weights are of the input's type
        leaves = [leaf.to(dtype) for leaf in leaves]
    ones = torch.ones(70, 48, device=device)
    for p in (0.0, 0.3):
        mask = dropout(ones, p, torch.Generator(device).manual_seed(1)).cpu().double()
        exact_in = [leaf.double().requires_grad_() for leaf in leaves]
        x, residual, weight, bias = exact_in
        exact = reference_dropout_residual_norm(x * mask, residual, weight, bias, 1e-12)
        exact.sin().sum().backward()
        ours_in = [leaf.detach().to(device).requires_grad_() for leaf in leaves]
        seeded = torch.Generator(device).manual_seed(1)
        x, residual, weight, bias = ours_in
        ours = dropout_residual_norm(x, residual, weight, bias, 1e-12, p, seeded)
        ours.sin().sum().backward()
        assert relative_error(ours, exact) < bound
        for mine, true in zip(ours_in, exact_in, strict=True):
            assert mine.grad is not None
            assert relative_error(mine.grad, true.grad) < bound


def test_dropout_drops_its_share_and_repeats_with_its_seed(device: torch.device) -> None:
    generator = torch.Generator(device)
    ones = torch.ones(1_000_003, device=device)
    masks = [dropout(ones, 0.1, generator.manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    share = float((masks[0] == 0).double().mean())
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / len(ones)) ** 0.5
    both = float(((masks[0] == 0) & (masks[2] == 0)).double().mean())
    assert abs(both - 0.01) < 4 * (0.01 * 0.99 / len(ones)) ** 0.5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_logits_equal_those_of_the_float64_model(
    tiny_checkpoint: Checkpoint,
    data: StageData,
    device: torch.device,
    dtype: torch.dtype,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0))
    exact_model = build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        exact_NC = exact_model(*pack(data.store, torch.arange(60)))
    monkeypatch.setattr(evaluation, "tokens_at_once", lambda device: 100)
    logits_NC = predict_logits(model.to(device), data.store, dtype=dtype)
    assert logits_NC.device.type == "cpu"
    assert relative_error(logits_NC, exact_NC) < bound


@pytest.mark.parametrize("stage", [1, 2])
def test_training_without_dropout_follows_the_cpu_in_fp32(
    tiny_checkpoint: Checkpoint, data: StageData, device: torch.device, stage: int
) -> None:
    settings = StageSettings(epochs=3, learning_rate=1e-3, batch_size=6)
    checkpoint = without_dropout(tiny_checkpoint)
    expected = run_stage(checkpoint, data, torch.device("cpu"), settings, stage)[1]
    reports = run_stage(checkpoint, data, device, settings, stage)[1]
    assert len(reports) == 3
    for ours, theirs in zip(reports, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_learns_with_dropout_and_repeats(
    tiny_checkpoint: Checkpoint, data: StageData, device: torch.device, dtype: torch.dtype
) -> None:
    settings = StageSettings(epochs=20, learning_rate=3e-3, batch_size=6)
    reports = run_stage(tiny_checkpoint, data, device, settings, dtype=dtype)[1]
    assert reports[-1].loss < 0.5 * reports[0].loss
    again = run_stage(tiny_checkpoint, data, device, settings, dtype=dtype)[1]
    assert again[0].loss == pytest.approx(reports[0].loss, rel=1e-3)


def test_a_step_that_is_not_finite_changes_no_weight(
    tiny_checkpoint: Checkpoint, data: StageData, device: torch.device
) -> None:
    settings = StageSettings(epochs=1, learning_rate=1e-3, batch_size=6)
    model = build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0)).to(device)
    state = TrainingState(7, model, stage=2)
    calls: list[list[Tensor]] = []

    def loss_function(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        calls.append([p.detach().clone() for p in model.parameters()])
        factor = float("nan") if len(calls) == 4 else 1.0
        return cross_entropy(logits_BC, labels_B) * factor

    with pytest.raises(NonFiniteError, match="step 4"):
        train_stage(state, data, loss_function, settings, make_step=make_step)
    assert state.step == 3
    for before, (name, parameter) in zip(calls[3], model.named_parameters(), strict=True):
        assert torch.isfinite(parameter).all()
        # The word table is brought up to date when the stage is left.
        assert torch.equal(before, parameter) == (name != WORD_EMBEDDINGS)


@NO_GPU
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # that it is a prototype
def test_the_host_waits_for_the_gpu_at_reports_alone(
    tiny_checkpoint: Checkpoint, data: StageData
) -> None:
    settings = StageSettings(epochs=1, learning_rate=1e-3, batch_size=4)
    model = build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0)).to("cuda")
    state = TrainingState(7, model, stage=2)

    def loss_function(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        # from the third step to the end of the eighth: then comes the first report
        torch.cuda.set_sync_debug_mode("error" if 2 <= state.step < 8 else "default")
        return cross_entropy(logits_BC, labels_B)

    try:
        train_stage(state, data, loss_function, settings, make_step=make_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 15
