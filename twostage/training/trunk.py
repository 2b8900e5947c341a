"""The frozen trunk: what lies below the trained layers in stage 1, computed for many steps at once.

In stage 1 the embeddings and all but the last layers are frozen: their output depends on the text
and on the dropout mask, never on what is being trained. So it need not be computed in steps of
16 texts. Here the texts of some dozens of coming steps go through the trunk together, sorted by
length and in batches as large as the matrix units like, without anything kept for backward; the
steps then start from these hidden states, the features. Dropout stays on, and a text drawn twice
gets two masks: the trained layers see the same distribution as if each step ran the whole encoder.

A window, the steps whose features are computed together, is a function of the epoch's batches, and
its masks of (seed, stage, first step of the window): a stage that is left and re-entered
anywhere computes the same features again.

Shapes: N texts, T tokens, D hidden, B texts of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.packing import PackedBatch, TokenStore, pack
from ..data.samplers import cut_by_tokens, length_sorted_batches
from ..model.bert import BertClassifier
from .evaluation import tokens_at_once
from .masks import Masks, seed_masks
from .precision import cast_model
from .state import TRUNK_STREAM, TrainingState

WINDOW_TOKENS = 32_768
"""Tokens of a window: memory for this many hidden states is all that the trunk holds."""


@dataclass(frozen=True)
class Features:
    """Hidden states of N texts after the trunk."""

    hidden_TD: Tensor
    """In the precision of the model that computed them."""
    store: TokenStore
    """Of the N texts; a token's id is its row of `hidden_TD`."""
    num_layers: int
    """Of the trunk."""


def count_frozen_layers(model: BertClassifier) -> int:
    """How many layers from the bottom have nothing in them or below them that is trained.

    The last layer never counts: only the first token of each text is computed there (`Bert.pool`).
    """
    modules = [model.bert.embeddings, *list(model.bert.layers)[:-1]]
    frozen = [not any(p.requires_grad for p in module.parameters()) for module in modules]
    return max(0, [*frozen, False].index(False) - 1)


@torch.no_grad()
def compute_features(
    model: BertClassifier,
    store: TokenStore,
    rows_N: np.ndarray,
    num_layers: int,
    masks: Masks | None = None,
) -> Features:
    """Features of the texts `rows_N` of the store, in that order; a row may come repeatedly.

    masks: turns dropout on.
    """
    lengths_N = store.lengths[torch.from_numpy(rows_N)]
    offsets = torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)])
    num_tokens = int(offsets[-1])
    first_row_N = torch.empty_like(lengths_N)
    weight = model.bert.pooler.weight
    hidden_TD = weight.new_empty(num_tokens, weight.shape[1])
    done = 0
    for texts in length_sorted_batches(lengths_N.numpy(), tokens_at_once(weight.device)):
        batch = pack(store, torch.from_numpy(rows_N[texts]), weight.device)
        ends_B = lengths_N[texts].cumsum(0)
        first_row_N[texts] = done + ends_B - lengths_N[texts]
        encoded_TD = model.bert(
            batch.input_ids_T,
            batch.position_ids_T,
            batch.layout,
            num_layers=num_layers,
            randomness=None if masks is None else masks.of_batch(batch, texts),
        )
        hidden_TD[done : done + batch.num_tokens] = encoded_TD[: batch.num_tokens]
        done += batch.num_tokens
    # Token t of text n is at first_row_n + (t - offsets_n).
    shift_N = first_row_N - offsets[:-1]
    ids = torch.arange(num_tokens) + shift_N.repeat_interleave(lengths_N)
    return Features(hidden_TD, TokenStore(ids.int(), offsets), num_layers)


def cache_features(
    model: BertClassifier, store: TokenStore, dtype: torch.dtype, impl: str = "auto"
) -> Features | None:
    """Features of every text of the store, by row, without dropout; None without frozen layers.

    They take 2·D bytes a token in bf16, as long as they are kept. impl: of the operations.
    """
    num_layers = count_frozen_layers(model)
    if num_layers == 0:
        return None
    work = cast_model(model.bert.config, dict(model.named_parameters()), dtype, impl)
    return compute_features(work, store, np.arange(len(store)), num_layers)


class FrozenTrunk:
    """Gives each step its features, and computes them window by window unless they are given."""

    def __init__(
        self,
        model: BertClassifier,
        store: TokenStore,
        num_layers: int,
        features: Features | None = None,
        impl: str = "auto",
    ) -> None:
        """features: of every text of the store, by row. impl: of the model's operations."""
        self.model, self.store, self.num_layers, self.impl = model, store, num_layers, impl
        self._all_features = features
        self._epoch = -1
        self._windows: list[np.ndarray] = []  # the epoch's batches, by their numbers
        self._window: Features | None = None
        self._steps = range(0)  # the window's
        self._draws: list[Tensor] = []  # the texts of each step, numbered within the window

    def take_batch(
        self, state: TrainingState, batches: Sequence[np.ndarray]
    ) -> tuple[Tensor, PackedBatch]:
        """Features of batch `state.batch` of the epoch, [T, D], and the batch itself."""
        if self._all_features is not None:
            features, rows_B = self._all_features, torch.from_numpy(batches[state.batch])
        else:
            features, rows_B = self._features_of(state, batches)
        batch = pack(features.store, rows_B, features.hidden_TD.device)
        return features.hidden_TD.index_select(0, batch.input_ids_T), batch

    def _features_of(
        self, state: TrainingState, batches: Sequence[np.ndarray]
    ) -> tuple[Features, Tensor]:
        """The window that has the texts of batch `state.batch`, and their rows in it, [B]."""
        if self._window is None or state.step not in self._steps:
            self._window = None  # freed before the next is made
            if state.epoch != self._epoch:
                self._epoch, self._windows = state.epoch, self._cut_windows(batches)
            window = next(window for window in self._windows if window[-1] >= state.batch)
            first = state.step - (state.batch - int(window[0]))
            self._steps = range(first, first + len(window))
            rows = [batches[b] for b in window]
            first_draw = sum(map(len, batches[: window[0]]))
            generator = torch.Generator(self.model.device)
            masks = seed_masks(state, TRUNK_STREAM, first, first_draw, generator, self.impl)
            self._window = compute_features(
                self.model, self.store, np.concatenate(rows), self.num_layers, masks
            )
            self._draws = list(torch.arange(sum(map(len, rows))).split([len(r) for r in rows]))
        return self._window, self._draws[state.step - self._steps[0]]

    def _cut_windows(self, batches: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs of consecutive batches that go through the trunk together."""
        lengths_N = self.store.lengths.numpy()
        tokens = np.array([lengths_N[rows].sum() for rows in batches])
        return cut_by_tokens(np.arange(len(batches)), tokens, WINDOW_TOKENS)
