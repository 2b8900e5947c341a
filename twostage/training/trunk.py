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

Shapes: N texts, E tokens of all of them, T tokens and B texts of a step, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..data.packing import PackedBatch, TokenStore, pack
from ..data.samplers import cut_by_tokens, length_sorted_batches
from ..model.bert import BertClassifier
from ..progress import Bar, progress_bar
from .evaluation import tokens_at_once
from .masks import Masks, seed_masks
from .precision import cast_model
from .state import SHARED_TRUNK_STREAM, TRUNK_STREAM, TrainingState

WINDOW_TOKENS = 32_768
"""Tokens of a window: memory for this many hidden states is all that the trunk holds."""


@dataclass(frozen=True)
class Features:
    """Hidden states of N texts after the trunk."""

    hidden_ED: Tensor
    """In the precision of the model that computed them; there may be more rows than tokens."""
    store: TokenStore
    """Of the N texts; a token's id is its row of `hidden_ED`."""


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
    hidden_ED: Tensor | None = None,
    *,
    bar: Bar | None = None,
) -> Features:
    """Features of the texts `rows_N` of the store, in that order; a row may come repeatedly.

    masks: turns dropout on. hidden_ED: where to put the hidden states, if there are rows enough.
    bar: counts texts.
    """
    lengths_N = store.lengths[torch.from_numpy(rows_N)]
    offsets = torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)])
    num_tokens = int(offsets[-1])
    first_row_N = torch.empty_like(lengths_N)
    weight = model.bert.pooler.weight
    if hidden_ED is None or len(hidden_ED) < num_tokens:
        hidden_ED = weight.new_zeros(num_tokens, weight.shape[1])
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
        hidden_ED[done : done + batch.num_tokens] = encoded_TD[: batch.num_tokens]
        done += batch.num_tokens
        if bar is not None:
            bar.update(len(texts))
    # Token t of text n is at first_row_n + (t - offsets_n).
    shift_N = first_row_N - offsets[:-1]
    ids = torch.arange(num_tokens) + shift_N.repeat_interleave(lengths_N)
    return Features(hidden_ED, TokenStore(ids.int(), offsets))


def cache_features(
    model: BertClassifier,
    store: TokenStore,
    dtype: torch.dtype,
    impl: str = "auto",
    num_epochs: int | None = None,
    *,
    show_progress: bool = False,
) -> list[Features]:
    """Features of every text of the store, by row, to be used by several seeds.

    num_epochs: one for each epoch, each with masks of its own; None: one without dropout, for all
    epochs. impl: of the operations. Empty where nothing is frozen. Each takes 2·D bytes a token in
    bf16, as long as it is kept.
    """
    num_layers = count_frozen_layers(model)
    if num_layers == 0:
        return []
    work = cast_model(model.bert.config, dict(model.named_parameters()), dtype, impl)
    rows_N = np.arange(len(store))
    # Of no seed, so that a seed's result does not depend on which others share them.
    state, generator = TrainingState(0, model), torch.Generator(model.device)
    found: list[Features] = []
    total = len(store) * (num_epochs or 1)
    with progress_bar("frozen layers", total, "text", show_progress) as bar:
        for epoch in range(num_epochs or 1):
            masks, state.epoch = None, epoch
            if num_epochs is not None:
                masks = seed_masks(state, SHARED_TRUNK_STREAM, epoch, 0, generator, impl)
            found.append(compute_features(work, store, rows_N, num_layers, masks, bar=bar))
    return found


@dataclass(frozen=True)
class Window:
    """Steps that share their features."""

    first_step: int
    """Of the stage."""
    features: Features
    batches: Sequence[np.ndarray]
    """Of each step, the rows of its texts in `features.store`."""


class FrozenTrunk:
    """Gives each step its features, and computes them window by window unless they are given."""

    def __init__(
        self,
        model: BertClassifier,
        store: TokenStore,
        num_layers: int,
        features: Sequence[Features] = (),
        impl: str = "auto",
    ) -> None:
        """features: of every text of the store, by row, for each epoch or, if it is only one, for
        all. impl: of the model's operations."""
        self.model, self.store, self.num_layers, self.impl = model, store, num_layers, impl
        self._given = features
        self._epoch = -1
        self._cuts: list[np.ndarray] = []  # the epoch's windows: the numbers of their batches
        self._hidden_ED: Tensor | None = None  # all windows', one after the other
        self._window: Window | None = None

    def take_batch(
        self, state: TrainingState, batches: Sequence[np.ndarray]
    ) -> tuple[Tensor, PackedBatch]:
        """Features of batch `state.batch` of the epoch, [T, D], and the batch itself."""
        window = self.find_window(state, batches)
        rows_B = torch.from_numpy(window.batches[state.step - window.first_step])
        features = window.features
        batch = pack(features.store, rows_B, features.hidden_ED.device)
        return features.hidden_ED.index_select(0, batch.input_ids_T), batch

    def find_window(self, state: TrainingState, batches: Sequence[np.ndarray]) -> Window:
        """The one that has batch `state.batch` of the epoch; where features are given, the epoch.

        The next window's hidden states take the place of this one's.
        """
        if self._given:
            features = self._given[state.epoch % len(self._given)]
            return Window(state.step - state.batch, features, batches)
        window = self._window
        if window is None or not 0 <= state.step - window.first_step < len(window.batches):
            window = self._window = self._compute_window(state, batches)
        return window

    def _compute_window(self, state: TrainingState, batches: Sequence[np.ndarray]) -> Window:
        tokens = np.array([self.store.lengths.numpy()[rows].sum() for rows in batches])
        if state.epoch != self._epoch:
            self._epoch = state.epoch
            self._cuts = cut_by_tokens(np.arange(len(batches)), tokens, WINDOW_TOKENS)
        if self._hidden_ED is None:
            most = max(min(WINDOW_TOKENS, int(tokens.sum())), int(tokens.max()))
            weight = self.model.bert.pooler.weight
            self._hidden_ED = weight.new_zeros(most, weight.shape[1])
        cut = next(cut for cut in self._cuts if cut[-1] >= state.batch)
        rows = [batches[b] for b in cut]
        first_step = state.step - (state.batch - int(cut[0]))
        first_draw = sum(map(len, batches[: cut[0]]))
        generator = torch.Generator(self.model.device)
        masks = seed_masks(state, TRUNK_STREAM, first_step, first_draw, generator, self.impl)
        features = compute_features(
            self.model, self.store, np.concatenate(rows), self.num_layers, masks, self._hidden_ED
        )
        self._hidden_ED = features.hidden_ED
        ends = np.cumsum([*map(len, rows)])
        return Window(first_step, features, np.split(np.arange(ends[-1]), ends[:-1]))
