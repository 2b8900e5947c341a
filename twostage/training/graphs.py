"""Whole training steps as CUDA graphs.

At batch 16 a step of BERT-base is some four hundred kernels of a few microseconds each, and Python
takes longer to launch one than the GPU to run it. A CUDA graph is the recording of a step's
launches; replaying it is a single call. But a recording repeats the same kernels on the same memory
with the same shapes, so whatever changes from step to step must lie on the device at a place that
stays, and shapes must be few. How that is done here:

    data         the texts of a run of steps (an epoch; in a frozen trunk's stage, a window) lie on
                 the device end to end, in the order in which the steps draw them
    tokens       a step's tokens are a stretch of that axis, as long as its bucket: what lies beyond
                 the step's own texts are texts of the next step, as filler that nobody reads
    texts        `cu_seqlens` always has room for as many texts as the largest batch; the missing
                 ones have no tokens, and a label that no loss counts
    counters     where the step stands in the run, and from it the learning rate and the numbers of
                 dropout, are read from tables on the device, and the graph itself counts on
    the rest     weights, moments, gradients, clipping, loss scale and the search for numbers that
                 are not finite never leave the device anyway (`stage.py`)

The host looks up the bucket and replays its graph. Buckets are few: token counts are rounded up to
multiples of 64, or a thirty-second of the next power of two; lengths to what the attention kernel
is compiled for. All graphs share one pool of memory, so together they need that of the largest.

A bucket is recorded when it comes often enough to be worth it; other batches, and those with texts
too long for the kernels of short attention, take their step as it comes. The first batch of each
length class takes its step from the tables, but launch by launch, by which its kernels are compiled
before they are recorded. Recording runs nothing: no step is lost or taken twice. The masks are the
same with graphs and without, and losses are equal to rounding.

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
"""Steps that a bucket must have for a recording to be worth its time. Not measured on a GPU yet."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Batches that one graph can take."""

    num_tokens: int
    """At most."""
    max_length: int
    """Tokens of their longest texts, at most."""


def bucket_of(lengths_B: np.ndarray) -> Bucket | None:
    """For a batch with texts of these lengths; None where the short attention cannot take it."""
    longest, tokens = int(lengths_B.max()), int(lengths_B.sum())
    if longest > MAX_SHORT_LENGTH:
        return None
    round_to = max(ROUND_TOKENS_TO, next_power_of_2(tokens) // 32)
    return Bucket(-(-tokens // round_to) * round_to, block_of_keys(longest))


class StepGraphs:
    """Takes the steps of a stage by replaying graphs. Close it to free their memory."""

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

        On a CPU, which has no graphs, a bucket's step runs as it comes: to test all the rest.
        """
        self._take_step, self._lengths_N = take_step, lengths_N
        self._learning_rate_at, self._device = learning_rate_at, device
        self._batch_size = 0
        uses: Counter[Bucket | None] = Counter()
        for rows in all_batches:
            self._batch_size = max(self._batch_size, len(rows))
            uses[bucket_of(lengths_N[rows])] += 1
        self.buckets = sorted((b for b, n in uses.items() if b and n >= MIN_USES), reverse=True)
        """Largest first: of a length class, smaller ones then fit into what these have left."""
        self.capture_seconds = 0.0
        """Spent on recording so far."""
        self._has_graphs = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._has_graphs else None
        self._graphs: dict[Bucket, torch.cuda.CUDAGraph] = {}
        self._compiled: set[int] = set()  # length classes
        self._tables: _DeviceTables | None = None
        self._steps = range(0)  # of the run in the tables
        self._next_step = -1  # at which the device's own counter stands

    def find_bucket(self, rows: np.ndarray) -> Bucket | None:
        """The bucket whose graph takes this batch; None when the batch is to come without."""
        bucket = bucket_of(self._lengths_N[rows])
        return bucket if bucket in self.buckets else None

    def replay(self, bucket: Bucket, step: int, find_run: Callable[[], Run]) -> None:
        """Take step number `step` of the stage. find_run: the run that it is in."""
        if step not in self._steps:
            self._begin_run(find_run())
        assert self._tables is not None
        is_compiled = bucket.max_length in self._compiled
        if self._has_graphs and is_compiled and bucket not in self._graphs:
            self._capture(bucket.max_length)
        if step != self._next_step:
            self._tables.row.fill_(step - self._steps.start)
        if bucket in self._graphs:
            self._graphs[bucket].replay()
        else:
            self._take_step_of(bucket)
            self._compiled.add(bucket.max_length)
        self._next_step = step + 1

    def close(self) -> None:
        """Free the graphs' memory."""
        for graph in self._graphs.values():
            graph.reset()
        self._graphs.clear()

    def _begin_run(self, run: Run) -> None:
        """Put a run where the graphs look for it."""
        tables = _lay_out(run, self._batch_size, self._learning_rate_at)
        filler = self.buckets[0].num_tokens
        if self._tables is None or not self._tables.have_room(tables, filler, run.hidden_ED):
            self.close()  # what has been recorded looks at the old place
            self._tables = _DeviceTables(tables, filler, run.hidden_ED, self._device)
        self._tables.fill(tables, run.masks.key)
        self._steps = range(run.first_step, run.first_step + len(run.batches))
        self._next_step = -1

    def _capture(self, max_length: int) -> None:
        """Record all buckets of a length class."""
        began = perf_counter()
        pool = next((graph.pool() for graph in self._graphs.values()), None)
        pool = pool or torch.cuda.graph_pool_handle()  # not one whose graphs are all gone
        for bucket in self.buckets:
            if bucket.max_length == max_length:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.device(self._device), torch.cuda.graph(graph, pool, self._stream):
                    self._take_step_of(bucket)
                self._graphs[bucket] = graph
        self.capture_seconds += perf_counter() - began

    def _take_step_of(self, bucket: Bucket) -> None:
        """What is recorded, or runs launch by launch."""
        assert self._tables is not None
        self._take_step(self._tables.step_inputs(bucket))
        self._tables.row.add_(1)


@dataclass(frozen=True)
class _Tables:
    """A run, laid out."""

    tokens_3E: Tensor
    """[3, E] int32: id, position, and number of the text in the epoch."""
    steps_RX: Tensor
    """[R, 2·B + 2] int32: of each step `cu_seqlens` from 0, labels, and its first token of E."""
    learning_rates_R: Tensor
    """[R] fp64."""


def _lay_out(run: Run, batch_size: int, learning_rate_at: Callable[[int], float]) -> _Tables:
    """On the CPU. batch_size: B."""
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
    return _Tables(torch.stack(tokens), torch.from_numpy(steps_RX).int(), learning_rates_R)


class _DeviceTables:
    """Tables at a place on the device that stays, and what a step reads of them."""

    def __init__(
        self, tables: _Tables, filler: int, hidden_ED: Tensor | None, device: torch.device
    ) -> None:
        """Like these, with some room for larger ones. filler: tokens beyond the last step's."""
        num_steps, num_tokens = len(tables.steps_RX), tables.tokens_3E.shape[1] + filler
        most_steps, most_tokens = num_steps + num_steps // 2 + 8, num_tokens + num_tokens // 8
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self._tokens_3E = zeros(3, most_tokens)
        self._steps_RX = zeros(most_steps, tables.steps_RX.shape[1])
        self._learning_rates_R = zeros(most_steps, dtype=torch.float64)
        self._key = zeros(1, dtype=torch.int64)
        self._hidden_ED = hidden_ED
        self._generator = torch.Generator(device)  # of flash attention, which is not for graphs
        self.row = zeros(1, dtype=torch.int64)
        """[1]: the number of the step in the run."""

    def have_room(self, tables: _Tables, filler: int, hidden_ED: Tensor | None) -> bool:
        """Whether these would fit in."""
        enough_tokens = tables.tokens_3E.shape[1] + filler <= self._tokens_3E.shape[1]
        enough_steps = len(tables.steps_RX) <= len(self._steps_RX)
        return enough_tokens and enough_steps and hidden_ED is self._hidden_ED

    def fill(self, tables: _Tables, key: Tensor | None) -> None:
        """What is left beyond their end, of an earlier run, is as good a filler as any."""
        assert key is not None, "masks are counted"
        device, num_tokens = self.row.device, tables.tokens_3E.shape[1]
        self._tokens_3E[:, :num_tokens] = send(tables.tokens_3E, device)
        self._steps_RX[: len(tables.steps_RX)] = send(tables.steps_RX, device)
        rates_R = tables.learning_rates_R
        self._learning_rates_R[: len(rates_R)] = send(rates_R, device)
        self._key.copy_(key)

    def step_inputs(self, bucket: Bucket) -> StepInputs:
        """Of the step at `row`: gathers on the device."""
        step_X = self._steps_RX.index_select(0, self.row)[0]
        batch_size = len(step_X) // 2 - 1
        cu_seqlens, labels_B = step_X[: batch_size + 1], step_X[batch_size + 1 : -1].long()
        tokens_T = step_X[-1] + torch.arange(bucket.num_tokens, device=step_X.device)
        ids_T, positions_T, draws_T = self._tokens_3E.index_select(1, tokens_T)
        # A text without tokens begins where the texts end, maybe beyond the last token.
        first_tokens_B = cu_seqlens[:-1].long().clamp(max=bucket.num_tokens - 1)
        return StepInputs(
            ids_T,
            positions_T,
            PackedLayout(cu_seqlens, first_tokens_B, bucket.max_length, None),
            labels_B,
            DropoutCounters(self._key, draws_T, positions_T, self._generator),
            None if self._hidden_ED is None else self._hidden_ED.index_select(0, ids_T),
            self._learning_rates_R.index_select(0, self.row)[0],
        )
