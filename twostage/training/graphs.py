"""Whole training steps as CUDA graphs.

At batch 16 a step of BERT-base is some four hundred kernels of a few microseconds each, and Python
takes longer to launch one than the GPU to run it. A CUDA graph records a step's launches; replaying
it is a single call. But it repeats the same kernels on the same memory with the same shapes, so
what changes from step to step must lie on the device at a place that stays, and shapes be few:

    data         the texts of a run of steps (an epoch; in a frozen trunk's stage, a window) lie on
                 the device end to end, in the order in which the steps draw them
    tokens       a step's tokens are a stretch of that axis, as long as its bucket: what lies beyond
                 the step's own texts are texts of the next step, as filler that is not read
    texts        `cu_seqlens` always has room for as many texts as the largest batch; the missing
                 ones have no tokens, and a label that no loss counts
    counters     where the step stands in the run, and from it the learning rate and the numbers of
                 dropout, are read from tables on the device, and the graph itself counts on
    the rest     weights, moments, gradients and loss scale never leave the device anyway

The host looks up the bucket and replays its graph. Buckets are few: token counts are rounded up to
multiples of 64, or a thirty-second of the next power of two; lengths to the attention kernel's
classes. All graphs share one pool of memory, so together they need that of the largest.

A length class with steps enough is recorded, and all of its batches are then replayed: a rare
bucket uses the next larger graph, since filler means nothing, and a rare class that of a longer
one. What fits none, and texts too long for the kernels of short attention, run eagerly. Before the
stage's first step, one on texts without tokens compiles the kernels of each class. Recording runs
nothing: no step is lost or taken twice. Masks are the same with graphs, losses equal to rounding.

Shapes: E tokens of a run, R steps of a run, B texts of the largest batch, T tokens of a bucket,
D hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from ..data.packing import ROUND_TOKENS_TO, pack, send
from ..kernels import next_power_of_2
from ..kernels.attention import MAX_SHORT_LENGTH, PackedLayout, block_of_keys
from ..kernels.cross_entropy import IGNORED_LABEL
from ..kernels.dropout import DropoutCounters
from .inputs import Run, StepInputs

MIN_USES = 4
"""Steps that must use a recording for it to be worth its time. Not measured on a GPU yet."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Batches that one graph can take."""

    num_tokens: int
    """Capacity."""
    max_length: int
    """Length class: the tokens of a text that the attention kernel is compiled for."""


def bucket_of(lengths_B: np.ndarray) -> Bucket | None:
    """For a batch with texts of these lengths; None where the short attention cannot take it."""
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

    def __init__(
        self,
        take_step: Callable[[StepInputs], None],
        all_batches: Iterable[np.ndarray],
        lengths_N: np.ndarray,
        learning_rate_at: Callable[[int], float],
        device: torch.device,
    ) -> None:
        """take_step: what it does with its inputs stays on the device, in memory that stays where
        it is. all_batches: rows of every step that the stage can have. lengths_N: tokens of each
        row. learning_rate_at: by the number of the step.

        A CPU, which has no graphs, runs a bucket's step eagerly: to test all the rest.
        """
        self._take_step, self._lengths_N = take_step, lengths_N
        self._learning_rate_at, self._device = learning_rate_at, device
        lengths = [lengths_N[rows] for rows in all_batches]
        self._batch_size = max(map(len, lengths))
        uses = Counter(bucket for bucket in map(bucket_of, lengths) if bucket is not None)
        self.graph_of = choose_graphs(uses)
        self._to_compile = {bucket.max_length: bucket for bucket in sorted(uses)}  # the largest
        self.capture_seconds = 0.0
        """Spent on compiling and recording so far."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._tables: _DeviceTables | None = None
        self._steps = range(0)  # of the run in the tables
        self._next_step = -1  # at which the device's own counter stands

    def compile(self, take_step: Callable[[StepInputs], None], hidden_ED: Tensor | None) -> None:
        """Take a step on texts without tokens in each length class, on a GPU of each graph's size.

        take_step: leaves no trace. hidden_ED: rows like the features', where layers are frozen.
        """
        began = perf_counter()
        # Where they are recorded, cuBLAS must have loaded its kernel for each size before.
        recorded = self.graph_of.values() if self._stream else ()
        for bucket in dict.fromkeys([*self._to_compile.values(), *recorded]):
            room = (bucket.num_tokens, 1, self._batch_size)
            take_step(_DeviceTables(room, hidden_ED, self._device).step_inputs(bucket))
        self.capture_seconds += perf_counter() - began

    def find_bucket(self, rows_B: np.ndarray) -> Bucket | None:
        """The bucket whose graph takes this batch; None: its step is to run eagerly."""
        return self.graph_of.get(bucket_of(self._lengths_N[rows_B]))

    def replay(self, bucket: Bucket, step: int, find_run: Callable[[], Run]) -> None:
        """Take step number `step` of the stage. find_run: the run that it is in."""
        if step not in self._steps:
            self._begin_run(find_run())
        assert self._tables is not None
        if step != self._next_step:
            self._tables.row.fill_(step - self._steps.start)
        if self._stream is None:
            self._take_step(self._tables.step_inputs(bucket))
        else:
            self._graphs[bucket].replay()
        self._next_step = step + 1

    def _begin_run(self, run: Run) -> None:
        """Put a run where the graphs look for it."""
        tables = _lay_out(run, self._batch_size, self._learning_rate_at)
        filler = next(iter(self.graph_of.values())).num_tokens
        num_tokens, num_steps = tables[0].shape[1] + filler, len(run.batches)
        if self._tables is None or not self._tables.have_room(num_tokens, num_steps, run.hidden_ED):
            self._graphs.clear()  # they look at the old place
            # With some room for larger runs.
            room = (num_tokens + num_tokens // 8, num_steps + num_steps // 2 + 8, self._batch_size)
            self._tables = _DeviceTables(room, run.hidden_ED, self._device)
            if self._stream is not None:
                self._capture(self._tables)
        self._tables.fill(*tables, run.masks.key)
        self._steps = range(run.first_step, run.first_step + num_steps)
        self._next_step = -1

    def _capture(self, tables: "_DeviceTables") -> None:
        """Record all graphs."""
        began = perf_counter()
        pool = torch.cuda.graph_pool_handle()
        for bucket in dict.fromkeys(self.graph_of.values()):  # small ones use what large ones left
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.device(self._device), torch.cuda.graph(graph, pool, self._stream):
                self._take_step(tables.step_inputs(bucket))
            self._graphs[bucket] = graph
        self.capture_seconds += perf_counter() - began


def _lay_out(
    run: Run, batch_size: int, learning_rate_at: Callable[[int], float]
) -> tuple[Tensor, Tensor, Tensor]:
    """The run's tables on the CPU: tokens_3E, steps_RX, learning_rates_R. batch_size: B.

    tokens_3E, int32: id, position, and number of the text in the epoch. steps_RX, [R, 2·B + 2]
    int32: of each step `cu_seqlens` from 0, labels, and its first token of E.
    """
    num_texts_R1 = np.array([[len(rows)] for rows in run.batches])
    whole = pack(run.store, torch.from_numpy(np.concatenate(run.batches)), round_to=1)
    lengths_N = whole.cu_seqlens.diff()
    draws_N = torch.arange(len(lengths_N), dtype=torch.int32) + run.masks.first_draw
    tokens = (whole.input_ids_T, whole.position_ids_T, draws_N.repeat_interleave(lengths_N))

    # Text b of a step is number `first + b` of the run; from the step's end on, b stays there.
    first_texts_R1 = np.cumsum(num_texts_R1, axis=0) - num_texts_R1
    places = first_texts_R1 + np.minimum(np.arange(batch_size + 1), num_texts_R1)
    starts_RB = whole.cu_seqlens.numpy()[places]
    labels_RB = np.full((len(run.batches), batch_size), IGNORED_LABEL)
    for labels_B, of_step in zip(labels_RB, run.labels, strict=True):
        labels_B[: len(of_step)] = of_step
    steps_RX = np.concatenate([starts_RB - starts_RB[:, :1], labels_RB, starts_RB[:, :1]], axis=1)

    rates = [learning_rate_at(run.first_step + r) for r in range(len(run.batches))]
    learning_rates_R = torch.tensor(rates, dtype=torch.float64)
    return torch.stack(tokens), torch.from_numpy(steps_RX).int(), learning_rates_R


class _DeviceTables:
    """Tables at a place on the device that stays, and what a step reads of them."""

    def __init__(
        self, room: tuple[int, int, int], hidden_ED: Tensor | None, device: torch.device
    ) -> None:
        """Zeros. room: for tokens, also filler beyond the last step's; for steps; B."""
        num_tokens, num_steps, batch_size = room
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self._tokens_3E, self._steps_RX = zeros(3, num_tokens), zeros(num_steps, 2 * batch_size + 2)
        self._learning_rates_R = zeros(num_steps, dtype=torch.float64)
        self._key = zeros(1, dtype=torch.int64)
        self._hidden_ED = hidden_ED
        self._generator = torch.Generator(device)  # of flash attention, which is not for graphs
        self.row = zeros(1, dtype=torch.int64)
        """[1]: the number of the step in the run."""

    def have_room(self, num_tokens: int, num_steps: int, hidden_ED: Tensor | None) -> bool:
        """Whether these would fit in."""
        room = num_tokens <= self._tokens_3E.shape[1] and num_steps <= len(self._steps_RX)
        return room and hidden_ED is self._hidden_ED

    def fill(
        self, tokens_3E: Tensor, steps_RX: Tensor, rates_R: Tensor, key: Tensor | None
    ) -> None:
        """From the beginning on; beyond the end, what an earlier run left is filler."""
        assert key is not None, "masks are counted"
        device = self.row.device
        self._tokens_3E[:, : tokens_3E.shape[1]] = send(tokens_3E, device)
        self._steps_RX[: len(steps_RX)] = send(steps_RX, device)
        self._learning_rates_R[: len(rates_R)] = send(rates_R, device)
        self._key.copy_(key)

    def step_inputs(self, bucket: Bucket) -> StepInputs:
        """Gathers the inputs of the step at `row`, which then counts on: all on the device."""
        step_X = self._steps_RX.index_select(0, self.row)[0]
        batch_size = len(step_X) // 2 - 1
        cu_seqlens, labels_B = step_X[: batch_size + 1], step_X[batch_size + 1 : -1].long()
        tokens_T = step_X[-1] + torch.arange(bucket.num_tokens, device=step_X.device)
        ids_T, positions_T, draws_T = self._tokens_3E.index_select(1, tokens_T)
        learning_rate = self._learning_rates_R.index_select(0, self.row)[0]
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
            learning_rate,
        )
