"""Flat weights, the rounded model and the words that occur train what the plain step trains."""

import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from twostage.data.token_store import TokenStore
from twostage.fast import step as step_module
from twostage.fast.step import make_step
from twostage.fast.weights import ALIGN_TO, FlatWeights, clip_divisor, renumber_tokens
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training.optim import clip_gradients
from twostage.training.stage import make_plain_step
from twostage.training.state import TrainingState

NEVER_USED = torch.arange(80, 101)
"""Tokens that no text of the data has."""


@pytest.fixture
def model(tiny_checkpoint: Checkpoint) -> BertClassifier:
    return build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0))


def run(model: BertClassifier) -> torch.Tensor:
    ids = torch.arange(1, 9)
    return model(ids, torch.tensor([0, 1, 2, 3, 0, 1, 2, 3]), torch.tensor([0, 4, 8]))


def flatten(
    model: BertClassifier, dtype: torch.dtype, used_tokens_V: torch.Tensor | None = None
) -> FlatWeights:
    return FlatWeights(TrainingState(7, model), dtype, used_tokens_V)


def update(flat: FlatWeights, gradients_P: torch.Tensor, rate: float) -> None:
    """AdamW's first update moves every weight with a gradient by the learning rate."""
    learning_rate = torch.tensor(rate, dtype=torch.float64)
    flat.update(gradients_P, learning_rate, torch.ones(()), torch.tensor(False))


def end_to_end(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """As the flat buffers have them: zeros fill each one's room."""
    return torch.cat([F.pad(t.flatten(), (0, -t.numel() % ALIGN_TO)) for t in tensors])


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr()


def test_in_fp32_the_rounded_model_has_the_models_own_weights(model: BertClassifier) -> None:
    with flatten(model, torch.float32) as flat:
        pairs = zip(model.parameters(), flat.model.parameters(), strict=True)
        assert all(shares_memory(master, twin) for master, twin in pairs)


def test_in_bf16_all_but_embeddings_and_norms_is_rounded(
    model: BertClassifier,
) -> None:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flat = flatten(model, torch.bfloat16)
    for name, rounded in flat.model.named_parameters():
        if name.startswith("bert.embeddings.") or "norm" in name:
            assert shares_memory(rounded, model.get_parameter(name))
        else:
            assert torch.equal(rounded, before[name].bfloat16())
    assert run(flat.model).dtype == torch.bfloat16
    for name, master in model.named_parameters():
        assert torch.equal(master, before[name])


def test_gradients_become_fp32_and_new_weights_are_rounded(
    model: BertClassifier,
) -> None:
    flat = flatten(model, torch.bfloat16)
    run(flat.model).float().square().sum().backward()
    gradients_P = flat.take_gradients()
    assert gradients_P.dtype == torch.float32
    assert torch.equal(gradients_P, end_to_end(p.grad for p in model.parameters()))
    before = flat.weights_P.clone()
    update(flat, gradients_P, 1e-3)
    moved_P = 1e-3 * gradients_P / (gradients_P.abs() + 1e-8)
    torch.testing.assert_close(flat.weights_P, before - moved_P)
    assert torch.equal(flat.weights_P, end_to_end(model.parameters()))
    for (name, master), rounded in zip(
        model.named_parameters(), flat.model.parameters(), strict=True
    ):
        assert torch.equal(rounded, master.to(rounded.dtype)), name
    flat.__exit__()
    assert all(p.grad is None for p in [*model.parameters(), *flat.model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_gradients_are_aligned_as_torchs_own(
    tiny_checkpoint: Checkpoint, dtype: torch.dtype
) -> None:
    """Three classes, so that a head of 50 features leaves every later parameter at an odd place."""
    model = build_model(tiny_checkpoint, 3, torch.Generator().manual_seed(0))
    assert sum(p.numel() % ALIGN_TO != 0 for p in model.parameters()) > 10
    assert torch.empty(1).data_ptr() % 64 == 0
    with flatten(model, dtype, torch.tensor([3, 8, 40])) as flat:
        gradients = [master.grad for master in flat.masters]
        for tensor in (*flat.masters, *gradients, *flat.model.parameters()):
            assert tensor is not None
            assert tensor.data_ptr() % 64 == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_last_backward_alone(
    model: BertClassifier, dtype: torch.dtype
) -> None:
    """The word embeddings' gradient names only the rows that the batch has read."""
    ids = (torch.arange(1, 9), torch.tensor([5, 5, 90, 91, 92, 5, 5, 5]))
    positions, cu_seqlens = torch.tensor([0, 1, 2, 3] * 2), torch.tensor([0, 4, 8])
    with flatten(model, dtype) as flat:
        for batch in ids:
            flat.model(batch, positions, cu_seqlens).float().square().sum().backward()
            after_two = flat.take_gradients().clone()
    with flatten(model, dtype) as flat:
        flat.model(ids[1], positions, cu_seqlens).float().square().sum().backward()
        assert torch.equal(after_two, flat.take_gradients())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fewer_tokens_change_nothing_and_their_rows_return(
    model: BertClassifier, dtype: torch.dtype
) -> None:
    used = torch.tensor([3, 8, 40])
    positions, cu_seqlens = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3])
    with flatten(model, dtype) as flat:
        expected = flat.model(used, positions, cu_seqlens)
    before = model.bert.embeddings.word.weight.detach().clone()
    flat = flatten(model, dtype, used)
    assert torch.equal(flat.model(torch.arange(3), positions, cu_seqlens), expected)
    assert sum(m.numel() for m in flat.masters) == (
        sum(p.numel() for p in model.parameters()) - (101 - 3) * 24
    )
    with suppress(RuntimeError), flat, torch.no_grad():
        flat.model.bert.embeddings.word.weight += 1.0
        raise RuntimeError("left early")
    after = model.bert.embeddings.word.weight
    assert torch.equal(after[used], before[used] + 1.0)
    others = torch.ones(101, dtype=torch.bool).index_fill_(0, used, False)
    assert torch.equal(after[others], before[others])


def test_flat_weights_that_were_left_are_freed_at_once(model: BertClassifier) -> None:
    with flatten(model, torch.bfloat16) as flat:
        run(flat.model).float().sum().backward()
        gone = weakref.ref(flat)
    del flat
    assert gone() is None, "no circle of references waits for the garbage collector"


def test_updates_below_bf16_resolution_add_up_in_the_masters(model: BertClassifier) -> None:
    flat = flatten(model, torch.bfloat16)
    master, rounded = (m.get_parameter("classifier.2.bias") for m in (model, flat.model))
    with torch.no_grad():
        master.fill_(1.0)
    for _ in range(100):  # bf16 cannot represent 1.0001: one at a time, all would be lost
        update(flat, -torch.ones_like(flat.weights_P), 1e-4)
    assert rounded.float().mean().item() == pytest.approx(1.01, abs=0.004)
    assert rounded[0] != 1.0


def test_bf16_logits_stay_close_to_fp32(model: BertClassifier) -> None:
    exact, rounded = run(model), run(flatten(model, torch.bfloat16).model)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_frozen_parameters_have_no_master(model: BertClassifier) -> None:
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    flat = flatten(model, torch.bfloat16)
    assert len(flat.masters) == 4
    run(flat.model).float().sum().backward()
    assert all(p.grad is None for p in flat.model.bert.parameters())


def test_gradients_copied_at_once_are_those_one_by_one(model: BertClassifier) -> None:
    """The one is the way on a GPU, the other on a CPU."""
    with flatten(model, torch.bfloat16) as flat:
        flat.model.bert.embeddings.word.sparse = False
        found = []
        for at_once in (False, True, True):
            flat._copies_at_once = at_once
            run(flat.model).square().sum().backward()
            found.append(flat.take_gradients().clone())
    assert found[0].any()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stage_2_has_the_plain_losses_and_weights(
    tiny_checkpoint: Checkpoint, train: Any, dtype: torch.dtype
) -> None:
    """Dropout's masks are the same; in bf16 the rounded weights are too."""
    loose = dtype == torch.bfloat16
    plain, fast = (
        train(tiny_checkpoint, 2, make, dropout=0.1, dtype=dtype, epochs=1)
        for make in (make_plain_step, make_step)
    )
    assert fast.losses == pytest.approx(plain.losses, rel=1e-2 if loose else 1e-5)
    untrained = build_model(tiny_checkpoint, 2, torch.Generator().manual_seed(0))
    ours_P, theirs_P, before_P = (
        torch.cat([p.detach().flatten() for p in model.parameters()])
        for model in (fast.state.model, plain.state.model, untrained)
    )
    # AdamW moves a weight whose gradient is nothing but rounding by its whole rate.
    assert (ours_P - theirs_P).norm() < (0.3 if loose else 0.03) * (theirs_P - before_P).norm()


def test_unseen_word_rows_stay_and_the_others_are_a_dense_trainings(
    tiny_checkpoint: Checkpoint, train: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same loop on the compact and on the whole table."""
    before = tiny_checkpoint.tensors["embeddings.word.weight"]
    tables, losses = [], []
    for renumber in (renumber_tokens, lambda store: (store, None)):
        monkeypatch.setattr(step_module, "renumber_tokens", renumber)
        trained = train(tiny_checkpoint, 2, make_step, dropout=0.1)
        losses.append(trained.losses)
        tables.append(trained.state.model.bert.embeddings.word.weight.detach())
        assert torch.equal(tables[-1][NEVER_USED], before[NEVER_USED])
        assert not torch.equal(tables[-1], before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("loss_factor", [1.0, 1024.0])
def test_the_divisor_clips_as_the_plain_step_does(size: float, loss_factor: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [size * torch.randn(shape, generator=generator) for shape in ((3, 4), (5,), (1,))]
    gradients_P = loss_factor * torch.cat([g.flatten() for g in gradients])
    norm, divisor = clip_divisor(gradients_P, torch.tensor(loss_factor))
    clipped, expected = clip_gradients(gradients)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(gradients_P / divisor, torch.cat([g.flatten() for g in clipped]))


def test_renumbered_tokens_are_the_used_ones_in_order_and_lead_back() -> None:
    ids, offsets = torch.tensor([7, 101, 7, 30_000, 0, 101]).int(), torch.tensor([0, 3, 4, 6])
    store = TokenStore(ids, offsets)
    renumbered, used_tokens_V = renumber_tokens(store)
    assert used_tokens_V.tolist() == [0, 7, 101, 30_000]
    assert renumbered.ids.tolist() == [1, 2, 1, 3, 0, 2]
    assert renumbered.ids.dtype == store.ids.dtype
    assert torch.equal(used_tokens_V[renumbered.ids.long()], store.ids.long())
