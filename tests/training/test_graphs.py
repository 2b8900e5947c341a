"""Steps taken by replaying graphs, where the shapes are few, are the steps taken as they come.

On a CPU, which has no graphs, a step runs as it comes from the same tables and places in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twostage.data.packing import TokenStore
from twostage.errors import NonFiniteError
from twostage.kernels.cross_entropy import IGNORED_LABEL, fused_cross_entropy
from twostage.kernels.dropout import DropoutCounters
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training import graphs as graphs_module
from twostage.training import stage as stage_module
from twostage.training import trunk
from twostage.training.graphs import Bucket, StepGraphs, bucket_of
from twostage.training.inputs import Run, StepInputs
from twostage.training.losses import cross_entropy, make_loss
from twostage.training.masks import Masks
from twostage.training.precision import cast_model
from twostage.training.stage import StageData, StageSettings, StepReport, train_stage
from twostage.training.state import TrainingState
from twostage.training.trunk import Features, cache_features
from twostage.two_stage import freeze_below_top

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GRAPHED = StageSettings(
    epochs=2, learning_rate=2e-3, batch_size=4, dtype=torch.float32, impl="triton", graphs=True
)
if DEVICE.type == "cuda":  # where the kernel of short attention is one for matrix units
    GRAPHED = replace(GRAPHED, dtype=torch.bfloat16)
CLOSE = 1e-4 if DEVICE.type == "cpu" else 2e-2


def texts(lengths: Sequence[int]) -> StageData:
    """Random texts of two classes."""
    generator = torch.Generator().manual_seed(1)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(1, 90, (int(offsets[-1]),), generator=generator).int()
    return StageData(TokenStore(ids, offsets), np.arange(len(lengths)) % 3 // 2)


DATA = texts([3, 9, 5, 17, 4, 4, 12, 2, 6, 7, 3, 5, 20, 3])


@pytest.fixture(autouse=True)
def every_step_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every bucket is worth a graph, every step has a report, and windows are of some steps."""
    monkeypatch.setattr(graphs_module, "MIN_USES", 1)
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    monkeypatch.setattr(trunk, "WINDOW_TOKENS", 60)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the steps that were taken by a graph."""
    steps: list[int] = []
    original = StepGraphs.replay

    def replay(self: StepGraphs, bucket: Bucket, step: int, find_run: Any) -> None:
        steps.append(step)
        original(self, bucket, step, find_run)

    monkeypatch.setattr(StepGraphs, "replay", replay)
    return steps


def start(checkpoint: Checkpoint, stage: int) -> TrainingState:
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0)).to(DEVICE)
    state = TrainingState(7, model)
    if stage == 1:
        freeze_below_top(model, 1)
    state.begin_stage(stage)
    return state


def train(
    state: TrainingState,
    settings: StageSettings,
    data: StageData = DATA,
    features: Sequence[Features] = (),
) -> list[StepReport]:
    """A report a step."""
    loss = make_loss("ldam", "effective", data.class_counts(2), DEVICE, impl=settings.impl)
    reports: list[StepReport] = []
    train_stage(state, data, loss, settings, features=features, on_report=reports.append)
    return reports


def assert_equal_steps(ours: list[StepReport], theirs: list[StepReport]) -> None:
    assert len(ours) == len(theirs) > 0
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.loss == pytest.approx(its.loss, rel=CLOSE)
        assert mine.grad_norm == pytest.approx(its.grad_norm, rel=10 * CLOSE)
        assert (mine.step, mine.learning_rate) == (its.step, its.learning_rate)


@pytest.mark.parametrize(
    ("stage", "sampler", "epochs"),
    [(2, "random", 1), (2, "token-budget", 1), (1, "class-balanced", 2), (1, "random", 1)],
)
def test_each_step_has_the_loss_and_gradient_of_the_step_as_it_comes(
    short_heads_checkpoint: Checkpoint, replayed: list[int], stage: int, sampler: str, epochs: int
) -> None:
    settings = replace(GRAPHED, sampler=sampler, epochs=epochs)
    states = [start(short_heads_checkpoint, stage) for _ in range(2)]
    ours = train(states[0], settings)
    assert replayed == list(range(len(ours)))
    assert (ours[-1].capture_seconds > 0) == (DEVICE.type == "cuda")
    theirs = train(states[1], replace(settings, graphs=False))
    assert_equal_steps(ours, theirs)
    assert max(abs(a.loss / b.loss - 1) for a, b in zip(ours[1:], ours, strict=False)) > 0.02
    for mine, its in zip(states[0].model.parameters(), states[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-2, atol=5 * CLOSE)


def test_given_features_are_read_where_they_lie(
    short_heads_checkpoint: Checkpoint, replayed: list[int]
) -> None:
    model = start(short_heads_checkpoint, 1).model
    features = cache_features(model, DATA.store, GRAPHED.dtype, "triton", num_epochs=2)
    settings = [replace(GRAPHED, graphs=graphs) for graphs in (True, False)]
    ours, theirs = (train(start(short_heads_checkpoint, 1), s, features=features) for s in settings)
    assert replayed
    assert_equal_steps(ours, theirs)


@pytest.mark.parametrize(("stage", "epochs"), [(1, 2), (2, 1)])
def test_a_stage_that_is_left_and_entered_again_goes_on_as_if_it_had_not_been(
    short_heads_checkpoint: Checkpoint, stage: int, epochs: int
) -> None:
    """In the middle of an epoch, and of a window."""
    settings = replace(GRAPHED, epochs=epochs)
    whole = train(start(short_heads_checkpoint, stage), settings)

    class Leave(Exception):
        pass

    state, first = start(short_heads_checkpoint, stage), []
    loss = make_loss("ldam", "effective", DATA.class_counts(2), DEVICE, impl="triton")

    def leave(report: StepReport) -> None:
        first.append(report)
        if report.step == 3:
            raise Leave

    with pytest.raises(Leave):
        train_stage(state, DATA, loss, settings, on_report=leave)
    assert_equal_steps([*first, *train(state, settings)], whole)


def test_batches_with_longer_texts_and_rare_buckets_come_without_a_graph(
    short_heads_checkpoint: Checkpoint, replayed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_SHORT_LENGTH", 12)
    ours = train(start(short_heads_checkpoint, 1), GRAPHED)
    batches = [b for e in (0, 1) for b in _batches(e)]
    long = [i for i, rows in enumerate(batches) if max(DATA.store.lengths[rows]) > 12]
    assert 2 <= len(long) <= len(ours) - 2
    assert replayed == [i for i in range(len(ours)) if i not in long]
    replayed.clear()
    monkeypatch.setattr(graphs_module, "MIN_USES", 100)
    assert_equal_steps(train(start(short_heads_checkpoint, 1), GRAPHED), ours)
    assert not replayed


def _batches(epoch: int) -> list[np.ndarray]:
    lengths_N = DATA.store.lengths.numpy()
    return stage_module.epoch_batches("random", DATA.labels_N, lengths_N, 4, (7, 1), epoch)


def test_a_step_that_is_not_finite_is_found_and_changes_nothing(
    short_heads_checkpoint: Checkpoint, replayed: list[int]
) -> None:
    """The step with the only text of class 1."""
    data = texts([5] * 12)
    data.labels_N[:] = np.arange(12) == 7
    state = start(short_heads_checkpoint, 1)
    weights: list[list[Tensor]] = []

    def loss_function(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        weights.append([p.detach().clone() for p in state.model.parameters()])
        loss = cross_entropy(logits_BC, labels_B, impl="triton")
        return torch.where((labels_B == 1).any(), float("nan"), loss)

    settings = replace(GRAPHED, epochs=6)
    with pytest.raises(NonFiniteError, match=r"rows .*\b7\b"):
        train_stage(state, data, loss_function, settings)
    assert state.step < len(replayed) + 2
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    if DEVICE.type == "cpu":  # each step calls the loss
        torch.testing.assert_close(list(state.model.parameters()), weights[state.step])


# What a graph reads.


def inputs_of_steps(
    batches: list[list[int]], data: StageData
) -> tuple[list[StepInputs], list[Bucket]]:
    """Those of each step of a run, and its bucket."""
    seen: list[StepInputs] = []
    lengths_N = data.store.lengths.numpy()
    rows = [np.array(batch) for batch in batches]
    graphs = StepGraphs(seen.append, rows * 2, lengths_N, lambda step: 1 / (1 + step), CPU)
    masks = Masks(torch.Generator(), torch.tensor([5]), first_draw=40)
    labels = [data.labels_N[r] for r in rows]
    run = Run(10, rows, data.store, labels, masks, None)
    buckets = [bucket_of(lengths_N[r]) for r in rows]
    for step, bucket in enumerate(buckets):
        assert bucket is not None
        graphs.replay(bucket, 10 + step, lambda: run)
    return seen, [bucket for bucket in buckets if bucket]


CPU = torch.device("cpu")


def test_the_tables_give_each_step_its_texts_labels_masks_and_learning_rate() -> None:
    batches = [[3, 0], [1, 2, 3], [4]]
    seen, buckets = inputs_of_steps(batches, DATA)
    draws = iter(range(40, 46))
    for step, (inputs, rows, bucket) in enumerate(zip(seen, batches, buckets, strict=True)):
        texts = [DATA.store.ids[a:b].tolist() for a, b in _spans(rows)]
        ends = np.cumsum([len(text) for text in texts]).tolist()
        missing = 3 - len(rows)
        assert inputs.layout.cu_seqlens.tolist() == [0, *ends, *[ends[-1]] * missing]
        assert inputs.layout.max_length == bucket.max_length >= max(map(len, texts))
        assert len(inputs.input_ids_T) == len(inputs.position_ids_T) == bucket.num_tokens
        assert inputs.input_ids_T[: ends[-1]].tolist() == [*chain(*texts)]
        positions = [i for text in texts for i in range(len(text))]
        assert inputs.position_ids_T[: ends[-1]].tolist() == positions
        labels = [*DATA.labels_N[rows], *[IGNORED_LABEL] * missing]
        assert inputs.labels_B.tolist() == labels
        numbers = [next(draws) for _ in rows]
        expected = [n for n, text in zip(numbers, texts, strict=True) for _ in text]
        assert inputs.randomness.draws_T[: ends[-1]].tolist() == expected
        assert int(inputs.randomness.key) == 5
        assert inputs.learning_rate.dtype == torch.float64
        assert float(inputs.learning_rate) == 1 / (11 + step)
        assert (inputs.layout.first_tokens_B < bucket.num_tokens).all()


def test_a_missing_text_begins_within_the_bucket_where_there_is_no_filler() -> None:
    data = texts([32, 32, 5, 5, 5])
    (full, _), (bucket, _) = inputs_of_steps([[0, 1], [2, 3, 4]], data)
    assert full.layout.cu_seqlens.tolist() == [0, 32, 64, 64]
    assert bucket.num_tokens == 64
    assert full.layout.first_tokens_B.tolist() == [0, 32, 63]


def _spans(rows: list[int]) -> list[tuple[int, int]]:
    return [(int(DATA.store.offsets[r]), int(DATA.store.offsets[r + 1])) for r in rows]


def test_filler_tokens_and_missing_texts_have_gradients_of_exactly_zero(
    short_heads_checkpoint: Checkpoint,
) -> None:
    """The filler of a step is the next step's texts: words that the step itself does not have."""
    data = texts([4, 6, 5, 9])
    data.store.ids[:15] = data.store.ids[:15] % 40 + 1
    data.store.ids[15:] = 60 + torch.arange(9).int()
    (first, _), _ = inputs_of_steps([[0, 1], [3, 2, 0]], data)
    plain = build_model(short_heads_checkpoint, 2, torch.Generator().manual_seed(0))
    parameters = dict(plain.named_parameters())
    model = cast_model(plain.bert.config, parameters, GRAPHED.dtype, "triton").to(DEVICE)
    assert set(range(60, 69)) <= set(first.input_ids_T.tolist())

    def gradients(num_tokens: int, cu_seqlens: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        rows = torch.arange(num_tokens)
        counters = first.randomness.take(rows)
        here = [x.to(DEVICE) for x in (counters.key, counters.draws_T, counters.positions_T)]
        layout = replace(
            first.layout,
            cu_seqlens=cu_seqlens.to(DEVICE),
            first_tokens_B=cu_seqlens[:-1].long().to(DEVICE),
        )
        logits_BC = model(
            first.input_ids_T[rows].to(DEVICE),
            first.position_ids_T[rows].to(DEVICE),
            layout.cu_seqlens,
            layout=layout,
            randomness=DropoutCounters(*here, torch.Generator(DEVICE)),
        )
        fused_cross_entropy(logits_BC, labels_B.to(DEVICE), impl="triton").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    cu_seqlens = first.layout.cu_seqlens
    assert cu_seqlens.tolist() == [0, 4, 10, 10], "two texts, and one without tokens"
    whole = gradients(len(first.input_ids_T), cu_seqlens, first.labels_B)
    words = whole["bert.embeddings.word.weight"]
    assert words[1:41].any()
    assert torch.equal(words[60:69], torch.zeros_like(words[60:69]))
    alone = gradients(10, cu_seqlens[:3], first.labels_B[:2])
    for name, gradient in alone.items():
        torch.testing.assert_close(whole[name], gradient, rtol=CLOSE, atol=CLOSE / 100, msg=name)


# Buckets.


@given(st.lists(st.integers(1, 128), min_size=1, max_size=600))
def test_a_bucket_holds_its_batch_with_little_to_spare(lengths: list[int]) -> None:
    bucket = bucket_of(np.array(lengths))
    assert bucket is not None
    tokens, longest = sum(lengths), max(lengths)
    assert tokens <= bucket.num_tokens < tokens + max(64, tokens // 16 + 1)
    assert bucket.num_tokens % 64 == 0
    assert bucket.max_length in (16, 32, 64, 128)
    assert longest <= bucket.max_length < max(17, 2 * longest)


def test_buckets_are_few_and_none_has_texts_too_long_for_the_short_attention() -> None:
    at_16 = {bucket_of(np.array([26] * 15 + [extra])) for extra in range(1, 120)}
    assert len(at_16) <= 5
    sizes = {bucket_of(np.array([1] * n)).num_tokens for n in range(8_193, 16_385)}
    assert len(sizes) == 16
    assert bucket_of(np.array([5, 129])) is None


def test_only_buckets_that_come_often_enough_are_recorded_largest_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs_module, "MIN_USES", 3)
    lengths_N = np.array([10, 60, 100])
    batches = [np.array([0])] * 4 + [np.array([1, 2])] * 3 + [np.array([2])] * 2
    graphs = StepGraphs(lambda inputs: None, batches, lengths_N, float, CPU)
    assert graphs.buckets == [Bucket(192, 128), Bucket(64, 16)]
    assert graphs.find_bucket(np.array([2])) is None
    assert graphs.find_bucket(np.array([0])) == Bucket(64, 16)
