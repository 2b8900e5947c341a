"""Whole training steps as CUDA graphs.

At batch 16 a step of BERT-base is some four hundred kernels of a few microseconds each, and Python
takes longer to launch one than the GPU to run it. A CUDA graph records a step's launches; replaying
it is a single call: what is saved is the launching. Exact but for roundings: the same kernels on
the same inputs, with other filler. What it gives has not been measured on a GPU.

A graph repeats the same kernels on the same memory with the same shapes, so what changes from step
to step must lie on the device at a place that stays, and shapes be few:

    data         the texts of a window of steps (an epoch; with frozen layers see `trunk.py`) lie on
                 the device end to end, in the order in which the steps draw them
    tokens       a step's tokens are a stretch of that axis, as long as its bucket: what lies beyond
                 the step's own texts are texts of the next step, as filler that no output reads
    texts        `cu_seqlens` always has room for as many texts as the largest batch; the missing
                 ones have no tokens, and a label that no loss counts
    counters     where the step stands in the window, and from it the numbers of dropout, are read
                 from tables on the device, and the graph itself counts on
    the rest     weights, moments, gradients and loss scale never leave the device anyway

The host writes the learning rate, looks up the bucket and replays its graph. Buckets are few: token
counts are rounded up to multiples of 64, or a thirty-second of the next power of two; lengths to
the attention kernel's classes. All graphs share one pool of memory, so together they need that of
the largest.

A length class with steps enough is recorded, and all of its batches are then replayed: a rare
bucket uses the next larger graph, since filler means nothing, and a rare class that of a longer
one. What fits none, and texts too long for the kernels of short attention, run eagerly. Before the
stage's first step, one on texts without tokens compiles the kernels of each class, also where no
graphs are asked for. Recording runs nothing: no step is lost or taken twice.

Shapes: E tokens of a window, R steps of a window, B texts of the largest batch, T tokens of a
bucket, D hidden.
"""

from collections import Counter
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..data.packing import ROUND_TOKENS_TO, pack, send
from ..kernels import next_power_of_2
from ..kernels.attention import (
    MAX_SHORT_LENGTH,
    PackedLayout,
    block_of_keys,
    takes_short_texts,
)
from ..kernels.cross_entropy import IGNORED_LABEL
from ..kernels.dropout import DropoutCounters
from .step import Step, StepInputs, Window, epoch_key

MIN_USES = 4
"""Steps that must use a recording for it to be worth its time. Not measured on a GPU yet."""


def replay_graphs(step: Step, enabled: bool) -> None:
    """With impl `triton`, compile the kernels before the first step; replay graphs if `enabled`.

    A CPU, which has no graphs, runs a bucket's step eagerly from the same memory, for tests.
    """
    head_size = step.model.bert.config.head_size
    dtype = step.model.bert.pooler.weight.dtype
    can = step.impl == "triton" and takes_short_texts(head_size, dtype, step.device)
    assert can or not enabled, "the recipe has checked it"
    if can and step.places:
        step.take = StepGraphs(step, enabled).take


@dataclass(frozen=True, order=True)
class Bucket:
    """Batches that one graph can take."""

    num_tokens: int
    """Capacity in tokens."""
    max_length: int
    """Length class: the tokens of a text that the attention kernel is compiled for."""


def bucket_of(lengths_B: np.ndarray) -> Bucket | None:
    """The bucket of a batch with these lengths; None where the short attention cannot take it."""
    longest, tokens = int(lengths_B.max()), int(lengths_B.sum())
    if longest > MAX_SHORT_LENGTH:
        return None
    round_to = max(ROUND_TOKENS_TO, next_power_of_2(tokens) // 32)
    return Bucket(-(-tokens // round_to) * round_to, block_of_keys(longest))


def choose_graphs(uses: Counter[Bucket]) -> dict[Bucket | None, Bucket]:
    """The bucket whose graph takes each, largest first: no smaller, and of no shorter class."""
    of_class = Counter(bucket.max_length for bucket in uses.elements())
    buckets = sorted(uses, reverse=True)
    worth = [bucket for bucket in buckets if of_class[bucket.max_length] >= MIN_USES]
    largest = {bucket.max_length: bucket for bucket in reversed(worth)}
    recorded = [b for b in worth if uses[b] >= MIN_USES or b == largest[b.max_length]]
    recorded.sort(key=lambda bucket: (bucket.max_length, bucket.num_tokens))
    takers = {b: [r for r in recorded if r >= b and r.max_length >= b.max_length] for b in buckets}
    return {bucket: fitting[0] for bucket, fitting in takers.items() if fitting}


class StepGraphs:
    """Takes the steps of a stage by replaying graphs."""

    def __init__(self, step: Step, enabled: bool) -> None:
        self._step, self._enabled, self._device = step, enabled, step.device
        self._lengths_N = step.data.store.lengths.numpy()
        self._batch_size = max(len(place.rows_B) for place in step.places)
        buckets = [bucket_of(self._lengths_N[place.rows_B]) for place in step.places]
        uses = Counter(bucket for bucket in buckets if bucket is not None)
        self.graph_of = choose_graphs(uses)
        self._to_compile = {bucket.max_length: bucket for bucket in sorted(uses)}  # the largest
        self._is_compiled = False
        self._stream = torch.cuda.Stream(step.device) if step.device.type == "cuda" else None
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._results: dict[Bucket, tuple[Tensor, Tensor]] = {}  # where each graph writes its own
        self._tables: _DeviceTables | None = None
        self._steps = range(0)  # of the window in the tables
        self._next_step = -1  # at which the device's own counter stands

    def take(self, rows_B: np.ndarray, number: int, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Replay the step's graph, or take the step eagerly."""
        if not self._is_compiled:
            self.compile()
        bucket = self.find_bucket(rows_B) if self._enabled else None
        if bucket is None:
            return self._step.take_eagerly(rows_B, number, learning_rate)
        return self.replay(bucket, number, learning_rate)

    def compile(self) -> None:
        """Take a step on texts without tokens in each length class, on a GPU of each graph's size.

        This changes no weight, moment or counter.
        """
        window = self._step.find_window(self._step.state.step)
        began = perf_counter()
        # Where they are recorded, cuBLAS must have loaded its kernel for each size before.
        recorded = self.graph_of.values() if self._stream and self._enabled else ()
        self._step.skip.fill_(True)
        for bucket in dict.fromkeys([*self._to_compile.values(), *recorded]):
            room = (bucket.num_tokens, 1, self._batch_size)
            tables = _DeviceTables(room, window.hidden_ED, self._device)
            self._step.train_on(tables.step_inputs(bucket))
        self._step.skip.fill_(False)
        self._is_compiled = True
        self._step.capture_seconds += perf_counter() - began

    def find_bucket(self, rows_B: np.ndarray) -> Bucket | None:
        """The bucket whose graph takes this batch; None: its step is to run eagerly."""
        return self.graph_of.get(bucket_of(self._lengths_N[rows_B]))

    def replay(self, bucket: Bucket, number: int, learning_rate: float) -> tuple[Tensor, Tensor]:
        """Take step `number` by the graph of this bucket."""
        if number not in self._steps:
            self._begin_window(self._step.find_window(number))
        assert self._tables is not None
        if number != self._next_step:
            self._tables.row.fill_(number - self._steps.start)
        self._next_step = number + 1
        self._tables.learning_rate.fill_(learning_rate)
        if self._stream is None:
            return self._step.train_on(self._tables.step_inputs(bucket))
        self._graphs[bucket].replay()
        return self._results[bucket]

    def _begin_window(self, window: Window) -> None:
        """Put a window where the graphs look for it."""
        places = self._step.places[window.steps.start : window.steps.stop]
        labels = [self._step.data.labels_N[place.rows_B] for place in places]
        tables = _lay_out(window, labels, places[0].first_draw, self._batch_size)
        filler = next(iter(self.graph_of.values())).num_tokens
        num_tokens, num_steps = tables[0].shape[1] + filler, len(window.steps)
        hidden_ED = window.hidden_ED
        if self._tables is None or not self._tables.have_room(num_tokens, num_steps, hidden_ED):
            self._graphs.clear()  # they look at the old place
            self._results.clear()
            # With some room for larger windows.
            room = (num_tokens + num_tokens // 8, num_steps + num_steps // 2 + 8, self._batch_size)
            self._tables = _DeviceTables(room, hidden_ED, self._device)
            if self._stream is not None:
                self._capture(self._tables)
        state, epoch = self._step.state, places[0].epoch
        self._tables.fill(*tables, epoch_key(state.seed, state.stage, epoch, self._device))
        self._steps, self._next_step = window.steps, -1

    def _capture(self, tables: "_DeviceTables") -> None:
        """Record all graphs."""
        began = perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for bucket in dict.fromkeys(self.graph_of.values()):  # small ones use what large ones left
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool, self._stream):
                self._results[bucket] = self._step.train_on(tables.step_inputs(bucket))
            self._graphs[bucket] = graph
        self._step.capture_seconds += perf_counter() - began


def _lay_out(
    window: Window, labels: list[np.ndarray], first_draw: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """The window's tables on the CPU: tokens_3E, steps_RX. batch_size: B.

    tokens_3E, int32: id, position, and number of the text in the epoch. steps_RX, [R, 2·B + 2]
    int32: of each step `cu_seqlens` from 0, labels, and its first token of E.
    """
    num_texts_R1 = np.array([[len(rows)] for rows in window.batches])
    whole = pack(window.store, torch.from_numpy(np.concatenate(window.batches)), round_to=1)
    lengths_N = whole.cu_seqlens.diff()
    draws_N = torch.arange(len(lengths_N), dtype=torch.int32) + first_draw
    tokens = (whole.input_ids_T, whole.position_ids_T, draws_N.repeat_interleave(lengths_N))

    # Text b of a step is number `first + b` of the window; from the step's end on, b stays there.
    first_texts_R1 = np.cumsum(num_texts_R1, axis=0) - num_texts_R1
    places = first_texts_R1 + np.minimum(np.arange(batch_size + 1), num_texts_R1)
    starts_RB = whole.cu_seqlens.numpy()[places]
    labels_RB = np.full((len(window.batches), batch_size), IGNORED_LABEL)
    for labels_B, of_step in zip(labels_RB, labels, strict=True):
        labels_B[: len(of_step)] = of_step
    steps_RX = np.concatenate([starts_RB - starts_RB[:, :1], labels_RB, starts_RB[:, :1]], axis=1)
    return torch.stack(tokens), torch.from_numpy(steps_RX).int()


class _DeviceTables:
    """Tables at a place on the device that stays, and what a step reads of them."""

    def __init__(
        self, room: tuple[int, int, int], hidden_ED: Tensor | None, device: torch.device
    ) -> None:
        """Zeros. room: for tokens, also filler beyond the last step's; for steps; B."""
        num_tokens, num_steps, batch_size = room
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self._tokens_3E, self._steps_RX = zeros(3, num_tokens), zeros(num_steps, 2 * batch_size + 2)
        self._key = zeros(1, dtype=torch.int64)
        self._hidden_ED = hidden_ED
        self._generator = torch.Generator(device)  # of flash attention, which is not for graphs
        self.row = zeros(1, dtype=torch.int64)
        """[1]: the number of the step in the window."""
        self.learning_rate = zeros((), dtype=torch.float64)
        """The step's."""

    def have_room(self, num_tokens: int, num_steps: int, hidden_ED: Tensor | None) -> bool:
        """Whether these would fit in."""
        room = num_tokens <= self._tokens_3E.shape[1] and num_steps <= len(self._steps_RX)
        return room and hidden_ED is self._hidden_ED

    def fill(self, tokens_3E: Tensor, steps_RX: Tensor, key: Tensor) -> None:
        """Write a window's tables; beyond their end, what an earlier window left is filler."""
        device = self.row.device
        self._tokens_3E[:, : tokens_3E.shape[1]] = send(tokens_3E, device)
        self._steps_RX[: len(steps_RX)] = send(steps_RX, device)
        self._key.copy_(key)

    def step_inputs(self, bucket: Bucket) -> StepInputs:
        """Gathers the inputs of the step at `row`, which then counts on: all on the device."""
        step_X = self._steps_RX.index_select(0, self.row)[0]
        batch_size = len(step_X) // 2 - 1
        cu_seqlens, labels_B = step_X[: batch_size + 1], step_X[batch_size + 1 : -1].long()
        tokens_T = step_X[-1] + torch.arange(bucket.num_tokens, device=step_X.device)
        ids_T, positions_T, draws_T = self._tokens_3E.index_select(1, tokens_T)
        self.row.add_(1)
        # A text without tokens begins where the texts end, maybe beyond the last token.
        first_tokens_B = cu_seqlens[:-1].long().clamp(max=bucket.num_tokens - 1)
        return StepInputs(
            ids_T,
            positions_T,
            PackedLayout(cu_seqlens, first_tokens_B, bucket.max_length, None),
            labels_B,
            DropoutCounters(self._key, draws_T, positions_T, self._generator),
            None if self._hidden_ED is None else self._hidden_ED.index_select(0, ids_T),
            self.learning_rate,
        )
