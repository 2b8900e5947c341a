"""The working copy and its masters."""

import weakref
from collections.abc import Iterable
from contextlib import suppress

import pytest
import torch
from torch.nn import functional as F

from twostage.errors import UsageError
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training.optim import Moments, make_moments, update_weights
from twostage.training.precision import (
    ALIGN_TO,
    WorkingCopy,
    check_kernels,
    choose_device,
    choose_precision,
)


@pytest.fixture
def model(tiny_checkpoint: Checkpoint) -> BertClassifier:
    return build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0))


def run(model: BertClassifier) -> torch.Tensor:
    ids = torch.arange(1, 9)
    return model(ids, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.tensor([0, 4, 8]))


def step(
    work: WorkingCopy, gradients_P: torch.Tensor, rate: float, moments: Moments | None = None
) -> None:
    """One of AdamW: at first, of every weight with a gradient, by the learning rate."""
    moments = moments or make_moments(work.weights_P)
    learning_rate = torch.tensor(rate, dtype=torch.float64)
    update_weights(work, gradients_P, moments, learning_rate, torch.ones(()), torch.zeros(()))


def end_to_end(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """As the flat buffers have them: zeros fill each one's room."""
    return torch.cat([F.pad(t.flatten(), (0, -t.numel() % ALIGN_TO)) for t in tensors])


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def test_in_fp32_the_working_copy_has_the_models_own_weights(model: BertClassifier) -> None:
    with WorkingCopy(model, torch.float32) as work:
        pairs = zip(model.parameters(), work.model.parameters(), strict=True)
        assert all(shares_memory(master, twin) for master, twin in pairs)


def test_in_bf16_everything_but_embeddings_and_norms_is_rounded_and_the_masters_stay(
    model: BertClassifier,
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    work = WorkingCopy(model, torch.bfloat16)
    for name, copied in work.model.named_parameters():
        if name.startswith("bert.embeddings.") or "norm" in name:
            assert shares_memory(copied, model.get_parameter(name))
        else:
            assert torch.equal(copied, before[name].bfloat16())
    assert run(work.model).dtype == torch.bfloat16
    for name, master in model.named_parameters():
        assert torch.equal(master, before[name])


def test_gradients_reach_the_masters_in_fp32_and_new_weights_the_copy(
    model: BertClassifier,
) -> None:
    work = WorkingCopy(model, torch.bfloat16)
    run(work.model).float().square().sum().backward()
    gradients_P = work.take_gradients()
    assert gradients_P.dtype == torch.float32
    assert torch.equal(gradients_P, end_to_end(p.grad for p in model.parameters()))
    before = work.weights_P.clone()
    step(work, gradients_P, 1e-3)
    moved_P = 1e-3 * gradients_P / (gradients_P.abs() + 1e-8)
    torch.testing.assert_close(work.weights_P, before - moved_P)
    assert torch.equal(work.weights_P, end_to_end(model.parameters()))
    for (name, master), copied in zip(
        model.named_parameters(), work.model.parameters(), strict=True
    ):
        assert torch.equal(copied, master.to(copied.dtype)), name
    work.__exit__()
    assert all(p.grad is None for p in [*model.parameters(), *work.model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_gradients_and_copy_are_aligned_as_torchs_own(
    tiny_checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    """Three classes, so that a head of 50 features leaves every later parameter at an odd place."""
    model = build_model(tiny_checkpoint, 3, torch.Generator().manual_seed(0))
    assert sum(p.numel() % ALIGN_TO != 0 for p in model.parameters()) > 10
    assert torch.empty(1).data_ptr() % 64 == 0
    with WorkingCopy(model, dtype, torch.tensor([3, 8, 40])) as work:
        gradients = [master.grad for master in work.masters]
        for tensor in (*work.masters, *gradients, *work.model.parameters()):
            assert tensor is not None
            assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_last_backward_alone(
    model: BertClassifier, dtype: torch.dtype
) -> None:
    """Of the word embeddings too, which name the few rows that the batch has read."""
    ids = (torch.arange(1, 9), torch.tensor([5, 5, 90, 91, 92, 5, 5, 5]))
    positions, cu_seqlens = torch.tensor([0, 1, 2, 3] * 2), torch.tensor([0, 4, 8])
    with WorkingCopy(model, dtype) as work:
        for batch in ids:
            work.model(batch, positions, cu_seqlens).float().square().sum().backward()
            after_two = work.take_gradients().clone()
    with WorkingCopy(model, dtype) as work:
        work.model(ids[1], positions, cu_seqlens).float().square().sum().backward()
        assert torch.equal(after_two, work.take_gradients())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_fewer_tokens_the_copy_computes_the_same_and_its_rows_return_when_it_is_left(
    model: BertClassifier, dtype: torch.dtype
) -> None:
    used = torch.tensor([3, 8, 40])
    positions, cu_seqlens = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3])
    with WorkingCopy(model, dtype) as work:
        expected = work.model(used, positions, cu_seqlens)
    before = model.bert.embeddings.word.weight.detach().clone()
    work = WorkingCopy(model, dtype, used)
    assert torch.equal(work.model(torch.arange(3), positions, cu_seqlens), expected)
    assert sum(m.numel() for m in work.masters) == (
        sum(p.numel() for p in model.parameters()) - (101 - 3) * 24
    )
    with suppress(RuntimeError), work, torch.no_grad():
        work.model.bert.embeddings.word.weight += 1.0
        raise RuntimeError("left early")
    after = model.bert.embeddings.word.weight
    assert torch.equal(after[used], before[used] + 1.0)
    others = torch.ones(101, dtype=torch.bool).index_fill_(0, used, False)
    assert torch.equal(after[others], before[others])


def test_a_copy_that_was_left_is_freed_at_once(model: BertClassifier) -> None:
    with WorkingCopy(model, torch.bfloat16) as work:
        run(work.model).float().sum().backward()
        gone = weakref.ref(work)
    del work
    assert gone() is None, "no circle of references waits for the garbage collector"


def test_updates_below_bf16_resolution_add_up_in_the_masters(model: BertClassifier) -> None:
    work = WorkingCopy(model, torch.bfloat16)
    master, copied = (m.get_parameter("classifier.2.bias") for m in (model, work.model))
    with torch.no_grad():
        master.fill_(1.0)
    moments = make_moments(work.weights_P)
    for _ in range(100):  # bf16 cannot represent 1.0001: one at a time, all would be lost
        step(work, -torch.ones_like(work.weights_P), 1e-4, moments)
    assert copied.float().mean().item() == pytest.approx(1.01, abs=0.004)
    assert copied[0] != 1.0


def test_bf16_logits_stay_close_to_fp32(model: BertClassifier) -> None:
    exact, rounded = run(model), run(WorkingCopy(model, torch.bfloat16).model)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_frozen_parameters_have_no_master(model: BertClassifier) -> None:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    work = WorkingCopy(model, torch.bfloat16)
    assert len(work.masters) == 4
    run(work.model).float().sum().backward()
    assert all(p.grad is None for p in work.model.bert.parameters())


def test_device_names() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "gpu:0", "cuda:99", "meta", ""):
        with pytest.raises(UsageError, match=f"device is '{name}'"):
            choose_device(name)


def test_precision_names() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == torch.float32
    assert choose_precision("bf16", cpu) == torch.bfloat16
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert choose_precision("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert choose_precision("fp16", cpu) == torch.float16
    with pytest.raises(UsageError, match="'int8'"):
        choose_precision("int8", cpu)


def test_gradients_copied_all_at_once_are_those_copied_one_by_one(model: BertClassifier) -> None:
    """The one is the way on a GPU, the other on a CPU."""
    with WorkingCopy(model, torch.bfloat16) as work:
        work.model.bert.embeddings.word.sparse = False
        found = []
        for at_once in (False, True, True):
            work._copies_at_once = at_once
            run(work.model).square().sum().backward()
            found.append(work.take_gradients().clone())
    assert found[0].any()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_kernels_that_cannot_run_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for impl in ("auto", "torch"):
        check_kernels(impl, False, "auto", cpu)
    with pytest.raises(UsageError, match="kernels are 'cuda'; expected one of auto, torch, triton"):
        check_kernels("cuda", False, "auto", cpu)
    with pytest.raises(UsageError, match="graphs need kernels 'triton'; they are 'auto'"):
        check_kernels("auto", True, "bf16", cpu)
    with pytest.raises(UsageError, match="graphs need precision bf16 or fp16; it is fp32"):
        check_kernels("triton", True, "fp32", torch.device("cuda"))
    with pytest.raises(UsageError, match="graphs need a CUDA GPU, and the device is cpu"):
        check_kernels("triton", True, "bf16", cpu)
    monkeypatch.setattr("twostage.kernels._INTERPRETED", False)
    with pytest.raises(UsageError, match="need a CUDA GPU, and the device is cpu; leave"):
        check_kernels("triton", False, "auto", cpu)
    monkeypatch.setattr("twostage.kernels.triton", None)
    with pytest.raises(UsageError, match="Triton is not installed here"):
        check_kernels("triton", False, "auto", torch.device("cuda"))
