"""Steps taken by replaying graphs, where the shapes are few, are the steps taken eagerly.

On a CPU, which has no graphs, a step runs eagerly from the same tables and places in memory.
"""

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from twostage.data.samplers import epoch_batches
from twostage.data.token_store import StageData, TokenStore
from twostage.errors import NonFiniteError
from twostage.fast import graphs as graphs_module
from twostage.fast import monitor, trunk
from twostage.fast.graphs import Bucket, StepGraphs, bucket_of, choose_graphs
from twostage.fast.step import Step, StepInputs, epoch_key, make_step
from twostage.fast.trunk import Features, cache_features
from twostage.kernels import adamw
from twostage.kernels.cross_entropy import IGNORED_LABEL, fused_cross_entropy
from twostage.kernels.dropout import DropoutCounters
from twostage.model.assembly import round_classifier
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.progress import StepReport
from twostage.recipe import Recipe
from twostage.training import stage as stage_module
from twostage.training.losses import cross_entropy
from twostage.training.stage import StageSettings, make_plain_step, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top, stage_1_signal

MIN_USES = graphs_module.MIN_USES
CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SETTINGS = StageSettings(epochs=2, learning_rate=5e-4, batch_size=4)
# On a GPU, the kernel of short attention is one for matrix units.
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


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
def as_many_uses_as_set(every_step_counts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "MIN_USES", MIN_USES)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the steps that were taken by a graph."""
    steps: list[int] = []
    original = StepGraphs.replay

    def replay(self: StepGraphs, bucket: Bucket, number: int, rate: float) -> tuple[Tensor, Tensor]:
        steps.append(number)
        return original(self, bucket, number, rate)

    monkeypatch.setattr(StepGraphs, "replay", replay)
    return steps


def start(checkpoint: Checkpoint, stage: int) -> TrainingState:
    model = build_model(checkpoint, 2, torch.Generator().manual_seed(0)).to(DEVICE)
    if stage == 1:
        freeze_below_top(model, 1)
    return TrainingState(7, model, stage)


def train(
    state: TrainingState,
    settings: StageSettings = SETTINGS,
    data: StageData = DATA,
    *,
    dtype: torch.dtype = DTYPE,
    impl: str = "triton",
    graphs: bool = True,
    **how: Any,
) -> list[StepReport]:
    """A report a step. how: for `make_step`, but `on_report`, `loss` and `make`."""
    reports: list[StepReport] = []
    on_report = how.pop("on_report", reports.append)
    loss = how.pop("loss", stage_1_signal(data, None, 2, Recipe(), DEVICE)[1])
    make = how.pop("make", partial(make_step, impl=impl, graphs=graphs, **how))
    train_stage(state, data, loss, settings, dtype=dtype, make_step=make, on_report=on_report)
    return reports


CheckSteps = Callable[..., None]


@pytest.fixture
def check_steps(
    short_heads_checkpoint: Checkpoint, measure_spread: Any, monkeypatch: pytest.MonkeyPatch
) -> CheckSteps:
    """Two runs of a stage have the same steps but for roundings (`conftest.py`)."""

    def check(
        ours: list[StepReport],
        theirs: list[StepReport],
        stage: int,
        settings: StageSettings = SETTINGS,
    ) -> None:
        def run(checkpoint: Checkpoint) -> list[Tensor]:
            reports = train(start(checkpoint, stage), settings, impl="torch", graphs=False)
            return numbers(reports)

        measure_spread(run, short_heads_checkpoint, DTYPE).check(numbers(ours), numbers(theirs))
        for mine, its in zip(ours, theirs, strict=True):
            assert (mine.step, mine.learning_rate) == (its.step, its.learning_rate)

    return check


def numbers(reports: list[StepReport]) -> list[Tensor]:
    """Each step's loss, and its gradient's norm."""
    return [torch.tensor([getattr(r, name) for r in reports]) for name in ("loss", "grad_norm")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sampler", "epochs"),
    [(2, "random", 1), (2, "token-budget", 1), (1, "class-balanced", 2), (1, "random", 1)],
)
def test_each_replayed_step_is_the_eager_step(
    short_heads_checkpoint: Checkpoint,
    replayed: list[int],
    check_steps: CheckSteps,
    stage: int,
    sampler: str,
    epochs: int,
) -> None:
    settings = replace(SETTINGS, sampler=sampler, epochs=epochs)
    states = [start(short_heads_checkpoint, stage) for _ in range(2)]
    ours = train(states[0], settings)
    assert replayed == list(range(len(ours)))
    theirs = train(states[1], settings, graphs=False)
    check_steps(ours, theirs, stage, settings)
    assert max(abs(a.loss / b.loss - 1) for a, b in zip(ours[1:], ours, strict=False)) > 0.02


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_each_replayed_step_is_the_plain_step_without_dropout(
    short_heads_checkpoint: Checkpoint, replayed: list[int], check_steps: CheckSteps, stage: int
) -> None:
    config = replace(
        short_heads_checkpoint.config, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    checkpoint = replace(short_heads_checkpoint, config=config)
    ours = train(start(checkpoint, stage))
    assert replayed
    check_steps(ours, train(start(checkpoint, stage), make=make_plain_step), stage)


@pytest.mark.slow
def test_given_features_are_read_where_they_lie(
    short_heads_checkpoint: Checkpoint, replayed: list[int], check_steps: CheckSteps
) -> None:
    model = start(short_heads_checkpoint, 1).model
    features = cache_features(model, DATA.store, DTYPE, "triton", num_epochs=2)
    ours, theirs = (
        train(start(short_heads_checkpoint, 1), graphs=graphs, features=features)
        for graphs in (True, False)
    )
    assert replayed
    check_steps(ours, theirs, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "epochs"), [(1, 2), (2, 1)])
def test_a_stage_that_is_left_and_entered_again_goes_on_as_if_it_had_not_been(
    short_heads_checkpoint: Checkpoint, check_steps: CheckSteps, stage: int, epochs: int
) -> None:
    """In the middle of an epoch, and of a window."""
    settings = replace(SETTINGS, epochs=epochs)
    whole = train(start(short_heads_checkpoint, stage), settings)

    class Leave(Exception):
        pass

    state, first = start(short_heads_checkpoint, stage), list[StepReport]()

    def leave(report: StepReport) -> None:
        first.append(report)
        if report.step == 3:
            raise Leave

    with pytest.raises(Leave):
        train(state, settings, on_report=leave)
    check_steps([*first, *train(state, settings)], whole, stage, settings)


@pytest.mark.slow
def test_long_texts_and_rare_classes_run_eagerly(
    short_heads_checkpoint: Checkpoint,
    replayed: list[int],
    check_steps: CheckSteps,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(graphs_module, "MAX_SHORT_LENGTH", 12)
    ours = train(start(short_heads_checkpoint, 1))
    batches = [b for e in (0, 1) for b in _batches(e)]
    long = [i for i, rows in enumerate(batches) if max(DATA.store.lengths[rows]) > 12]
    assert 2 <= len(long) <= len(ours) - 2
    assert replayed == [i for i in range(len(ours)) if i not in long]
    replayed.clear()
    monkeypatch.setattr(graphs_module, "MIN_USES", 100)
    check_steps(train(start(short_heads_checkpoint, 1)), ours, 1)
    assert not replayed


def _batches(epoch: int) -> list[np.ndarray]:
    lengths_N = DATA.store.lengths.numpy()
    return epoch_batches("random", DATA.labels_N, lengths_N, 4, (7, 1), epoch)


@pytest.mark.slow
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
        loss = fused_cross_entropy(logits_BC, labels_B, impl="triton")
        return torch.where((labels_B == 1).any(), float("nan"), loss)

    with pytest.raises(NonFiniteError, match=r"rows .*\b7\b"):
        train(state, replace(SETTINGS, epochs=6), data, loss=loss_function)
    assert state.step <= len(replayed) - 1
    assert all(torch.isfinite(p).all() for p in state.model.parameters())
    if DEVICE.type == "cpu":  # the only length class calls the loss, and then each step
        torch.testing.assert_close(list(state.model.parameters()), weights[1 + state.step])


# What is compiled before the first step.


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_compiling_leaves_no_trace(
    short_heads_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stage: int, graphs: bool
) -> None:
    """Weights, moments, loss scale and the numbers that torch draws stay as they are."""

    class Leave(Exception):
        pass

    state, calls = start(short_heads_checkpoint, stage), list[int]()
    original, train_on = StepGraphs.compile, Step.train_on

    def compile_watched(self: StepGraphs) -> None:
        step = self._step
        names = ("updates", "loss_factor", "calm_steps")
        for number, name in enumerate(names):
            state.optimizer[name].fill_(64.0 * 2**number)  # as in the middle of a stage
        state.optimizer["exp_avg_P"].normal_()
        tensors = [*state.optimizer.values(), *state.model.parameters()]
        before = [*(t.detach().clone() for t in tensors), torch.get_rng_state()]
        original(self)
        for tensor, its in zip([*tensors, torch.get_rng_state()], before, strict=True):
            assert torch.equal(tensor, its)
        for check in step.checks:
            check(9)  # nothing was found
        raise Leave

    def train_and_count(self: Step, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        calls.append(inputs.layout.max_length)
        return train_on(self, inputs)

    monkeypatch.setattr(StepGraphs, "compile", compile_watched)
    monkeypatch.setattr(Step, "train_on", train_and_count)
    with pytest.raises(Leave):
        train(state, dtype=torch.float16, graphs=graphs)
    assert calls == [16, 32], "the lengths in DATA are up to 20"
    assert state.step == 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_steps_are_the_same_had_nothing_been_compiled(
    short_heads_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    settings = replace(SETTINGS, epochs=1)
    ours = train(start(short_heads_checkpoint, stage), settings)
    monkeypatch.setattr(StepGraphs, "compile", lambda self: None)
    # Where there are graphs, what they record must have run before.
    theirs = train(start(short_heads_checkpoint, stage), settings, graphs=DEVICE.type == "cpu")
    if DEVICE.type == "cpu":
        assert [(r.loss, r.grad_norm) for r in ours] == [(r.loss, r.grad_norm) for r in theirs]
    assert len(ours) == len(theirs) == 4


@pytest.mark.slow
def test_the_time_of_compiling_is_told(short_heads_checkpoint: Checkpoint) -> None:
    seconds: list[float] = []

    @contextmanager
    def make(*arguments: Any) -> Iterator[Step]:
        with make_step(*arguments, impl="triton") as step:
            yield step
            seconds.append(step.capture_seconds)

    train(start(short_heads_checkpoint, 1), replace(SETTINGS, epochs=1), make=make)
    assert seconds[0] > 0


def test_a_stage_without_steps_has_no_graphs(short_heads_checkpoint: Checkpoint) -> None:
    assert train(start(short_heads_checkpoint, 2), replace(SETTINGS, epochs=0)) == []


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("stage", [1, 2])
def test_no_step_asks_for_another_kernel(
    short_heads_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, stage: int, graphs: bool
) -> None:
    """Nothing is launched but what has been: same kernel, types, constants, divisible numbers."""
    seen: set[Any] = set()
    late: list[Any] = []
    compiled = computing_features = False
    launcher = type(adamw.adamw_kernel)

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> None:
        names = list(inspect.signature(self.fn).parameters)
        given = dict(zip(names, arguments, strict=False)) | more
        key = (self.fn.__name__, *((name, kind_of(value)) for name, value in given.items()))
        if compiled and not computing_features and key not in seen:
            late.append(key)
        seen.add(key)

    original_compile, original_compute = StepGraphs.compile, trunk.compute_features

    def compile_first(self: StepGraphs) -> None:
        nonlocal compiled
        original_compile(self)
        compiled = True

    def compute_features(*arguments: Any) -> Features:
        nonlocal computing_features
        computing_features = True
        features = original_compute(*arguments)
        computing_features = False
        return features

    monkeypatch.setattr(launcher, "run", run)
    monkeypatch.setattr(StepGraphs, "compile", compile_first)
    monkeypatch.setattr(trunk, "compute_features", compute_features)
    # Nothing runs, so nothing that is computed means anything.
    monkeypatch.setattr(monitor.Monitor, "check", lambda self, number: None)
    data = texts([3, 9, 5, 17, 4, 4, 12, 2, 6, 7, 3, 5, 20, 3, 9, 33, 2, 8] * 4)
    assert len(data) % SETTINGS.batch_size == 0
    if graphs:  # which have room for as many texts in every step
        data = texts([*data.store.lengths.tolist(), 5])
    checkpoint = replace(
        short_heads_checkpoint,
        config=replace(short_heads_checkpoint.config, max_position_embeddings=64),
        tensors=short_heads_checkpoint.tensors
        | {"embeddings.position.weight": torch.zeros(64, 64)},
    )
    train(start(checkpoint, stage), replace(SETTINGS, epochs=1), data, graphs=graphs)
    assert compiled
    assert len({key[0] for key in seen}) > 8
    assert not late


def kind_of(value: Any) -> Any:
    """What Triton compiles a kernel anew for."""
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool) and value != 1 and value % 16 == 0:
        return "divisible"
    return value


# What a graph reads.


def inputs_of_steps(
    checkpoint: Checkpoint, batches: list[list[int]], data: StageData
) -> tuple[list[StepInputs], list[Bucket]]:
    """What each step of the second epoch reads, and its bucket."""
    rows = [np.array(batch) for batch in batches]
    state, seen = start(checkpoint, 2), list[StepInputs]()
    make = partial(make_step, impl="triton", graphs=True)
    with (
        make(state, data, cross_entropy, [rows, rows], torch.float32) as step,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(Step, "train_on", lambda self, inputs: seen.append(inputs))
        graphs = StepGraphs(step, enabled=True)
        buckets = [graphs.find_bucket(r) for r in rows]
        for number, bucket in enumerate(buckets, len(rows)):
            assert bucket is not None
            graphs.replay(bucket, number, 1 / (1 + number))
            seen[-1] = replace(seen[-1], learning_rate=seen[-1].learning_rate.clone())
    return seen, [bucket for bucket in buckets if bucket]


def test_the_tables_give_each_step_its_texts_labels_masks_and_learning_rate(
    short_heads_checkpoint: Checkpoint,
) -> None:
    batches = [[3, 0], [1, 2, 3], [4]]
    # All words of the vocabulary occur: none is renumbered.
    data = StageData(
        TokenStore(
            torch.cat([DATA.store.ids, torch.arange(101).int()]),
            torch.cat([DATA.store.offsets, DATA.store.offsets[-1:] + 101]),
        ),
        np.append(DATA.labels_N, 0),
    )
    seen, buckets = inputs_of_steps(short_heads_checkpoint, batches, data)
    draws = iter(range(6))
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
        assert isinstance(inputs.randomness, DropoutCounters)
        assert inputs.randomness.draws_T[: ends[-1]].tolist() == expected
        assert int(inputs.randomness.key) == int(epoch_key(7, 2, 1, CPU))
        assert inputs.learning_rate.dtype == torch.float64
        assert float(inputs.learning_rate) == 1 / (4 + step)
        assert (inputs.layout.first_tokens_B < bucket.num_tokens).all()


def test_a_missing_text_begins_within_the_bucket_where_there_is_no_filler(
    short_heads_checkpoint: Checkpoint,
) -> None:
    data = texts([32, 32, 5, 5, 5])
    (full, _), (bucket, _) = inputs_of_steps(short_heads_checkpoint, [[0, 1], [2, 3, 4]], data)
    assert full.layout.cu_seqlens.tolist() == [0, 32, 64, 64]
    assert bucket.num_tokens == 64
    assert full.layout.first_tokens_B.tolist() == [0, 32, 63]


def _spans(rows: list[int]) -> list[tuple[int, int]]:
    return [(int(DATA.store.offsets[r]), int(DATA.store.offsets[r + 1])) for r in rows]


@pytest.mark.slow
def test_filler_tokens_and_missing_texts_have_gradients_of_exactly_zero(
    short_heads_checkpoint: Checkpoint, nudged: Any
) -> None:
    """The filler of a step is the next step's texts: words that the step itself does not have."""
    data = texts([4, 6, 5, 9, 101])
    data.store.ids[:15] = data.store.ids[:15] % 40 + 1
    data.store.ids[15:24] = 60 + torch.arange(9).int()
    data.store.ids[24:] = torch.arange(101).int()  # no word is renumbered
    (first, _), _ = inputs_of_steps(short_heads_checkpoint, [[0, 1], [3, 2, 0]], data)
    assert set(range(60, 69)) <= set(first.input_ids_T.tolist())

    def gradients(
        checkpoint: Checkpoint, num_tokens: int, cu_seqlens: Tensor, labels_B: Tensor
    ) -> dict[str, Tensor]:
        plain = build_model(checkpoint, 2, torch.Generator().manual_seed(0))
        parameters = dict(plain.named_parameters())
        model = round_classifier(plain.bert.config, parameters, DTYPE, "triton").to(DEVICE)
        rows = torch.arange(num_tokens)
        assert isinstance(first.randomness, DropoutCounters)
        counters = first.randomness.take(rows)
        key, draws_T, positions_T = (
            x.to(DEVICE) for x in (counters.key, counters.draws_T, counters.positions_T)
        )
        layout = replace(
            first.layout,
            cu_seqlens=cu_seqlens.to(DEVICE),
            first_tokens_B=cu_seqlens[:-1].long().to(DEVICE),
        )
        randomness = DropoutCounters(key, draws_T, positions_T, torch.Generator(DEVICE))
        below_last = len(model.bert.layers) - 1
        inputs = (first.input_ids_T[rows].to(DEVICE), first.position_ids_T[rows].to(DEVICE))
        hidden_TD = model.bert(*inputs, layout, num_layers=below_last, randomness=randomness)
        logits_BC = model.classifier(model.bert.pool(hidden_TD, layout, below_last, randomness))
        fused_cross_entropy(logits_BC, labels_B.to(DEVICE), impl="triton").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    cu_seqlens = first.layout.cu_seqlens
    assert cu_seqlens.tolist() == [0, 4, 10, 10], "two texts, and one without tokens"
    whole = gradients(short_heads_checkpoint, len(first.input_ids_T), cu_seqlens, first.labels_B)
    words = whole["bert.embeddings.word.weight"]
    assert words[1:41].any()
    assert torch.equal(words[60:69], torch.zeros_like(words[60:69]))

    def gradients_alone(checkpoint: Checkpoint) -> dict[str, Tensor]:
        return gradients(checkpoint, 10, cu_seqlens[:3], first.labels_B[:2])

    alone = gradients_alone(short_heads_checkpoint)
    others = [gradients_alone(nudged(short_heads_checkpoint, DTYPE, i)) for i in range(3)]
    for name, gradient in alone.items():
        by_rounding = max(float((other[name] - gradient).norm()) for other in others)
        allowed = 4 * (by_rounding + torch.finfo(DTYPE).eps * float(gradient.norm()))
        assert float((whole[name] - gradient).norm()) <= allowed, name


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


@pytest.mark.slow
def test_buckets_are_few_and_none_has_texts_too_long_for_the_short_attention() -> None:
    at_16 = {bucket_of(np.array([26] * 15 + [extra])) for extra in range(1, 120)}
    assert len(at_16) <= 5
    sizes = {bucket_of(np.array([1] * n)).num_tokens for n in range(8_193, 16_385)}
    assert len(sizes) == 16
    assert bucket_of(np.array([5, 129])) is None


@pytest.mark.usefixtures("as_many_uses_as_set")
def test_a_rare_bucket_uses_the_next_larger_graph() -> None:
    a, b, c, d = (Bucket(64 * n, 32) for n in (1, 2, 3, 4))
    uses = Counter({a: 1, b: MIN_USES, c: 2, d: 1, Bucket(64, 128): MIN_USES - 1})
    assert choose_graphs(uses) == {d: d, c: d, b: b, a: b}
    assert list(choose_graphs(uses)) == [d, c, b, a], "largest first"


@pytest.mark.usefixtures("as_many_uses_as_set")
def test_a_class_counts_all_of_its_steps() -> None:
    uses = Counter(Bucket(64 * n, 16) for n in range(1, MIN_USES + 1))
    assert set(choose_graphs(uses).values()) == {max(uses)}
    uses.pop(max(uses))
    assert choose_graphs(uses) == {}


@pytest.mark.usefixtures("as_many_uses_as_set")
def test_a_rare_class_uses_a_longer_ones_graph() -> None:
    rare, too_large, long = Bucket(64, 16), Bucket(192, 16), Bucket(128, 64)
    uses = Counter({rare: MIN_USES - 2, too_large: 1, long: MIN_USES})
    assert choose_graphs(uses) == {long: long, rare: long}


@pytest.mark.usefixtures("as_many_uses_as_set")
def test_a_batch_is_given_its_graph_by_its_lengths(
    short_heads_checkpoint: Checkpoint,
) -> None:
    data = texts([10, 60, 100])
    batches = [np.array(rows) for rows in [[0]] * 4 + [[1, 2]] * 3 + [[2]]]
    config = replace(short_heads_checkpoint.config, max_position_embeddings=128)
    tensors = short_heads_checkpoint.tensors | {"embeddings.position.weight": torch.zeros(128, 64)}
    state = start(replace(short_heads_checkpoint, config=config, tensors=tensors), 2)
    make = partial(make_step, impl="triton")
    with make(state, data, cross_entropy, [batches], torch.float32) as step:
        graphs = StepGraphs(step, enabled=True)
        assert graphs.find_bucket(np.array([0])) == Bucket(64, 16)
        assert graphs.find_bucket(np.array([2])) == Bucket(192, 128)
        assert graphs.find_bucket(np.array([1])) is None, "no batch of the stage"
