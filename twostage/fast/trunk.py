"""Frozen layers, computed for many steps at once.

In stage 1 the embeddings and all but the last layers are frozen: their output depends on the text
and on the dropout mask, never on what is being trained. So it need not be computed in steps of
16 texts. Here the texts of some dozens of coming steps go through them together, sorted by length
and in batches as large as the matrix units like, without anything kept for backward; the steps then
start from these hidden states, the features. Exact: dropout stays on, and a text drawn twice gets
two masks, so the trained layers see the same distribution as if each step ran the whole encoder.
What it gave: stage 1 at 1.54 times the speed on a CPU with matrix units, 1.07 times on one without
(batch 16; `benchmarks/README.md`).

Several seeds can share the features (`cache_features`): those of each epoch, with masks that all
seeds have in common, or, as an approximation of the recipe, one set without dropout.

A window, the steps whose features are computed together, is a function of the epoch's batches, and
its masks of (seed, stage, first step of the window): a stage that is left and re-entered anywhere
computes the same features again.

Shapes: N texts, E tokens of all of them, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..data.packing import pack
from ..data.samplers import cut_by_tokens, length_sorted_batches, tokens_at_once
from ..data.token_store import TokenStore
from ..kernels.attention import packed_layout
from ..model.assembly import round_classifier
from ..model.bert import BertClassifier
from ..progress import Bar, progress_bar
from ..training.state import SHARED_TRUNK_STREAM, TRUNK_STREAM, derive_seed
from .step import Masks, Step, Window, drawn_from, epoch_key

WINDOW_TOKENS = 32_768
"""Tokens of a window: memory for this many hidden states is all that is held."""


def run_frozen_layers_ahead(step: Step, features: Sequence["Features"] = ()) -> None:
    """Start the steps from hidden states that were computed before, where layers are frozen.

    features: every text's, by row, for each epoch or, if it is only one, for all; empty: they are
    computed window by window.
    """
    num_layers = count_frozen_layers(step.model)
    if num_layers == 0:
        return
    step.num_lower_layers = num_layers
    if not features:
        step.find_window = FrozenTrunk(step).find_window
        return
    for epoch, window in enumerate(step.epoch_windows):
        given = features[epoch % len(features)]
        step.epoch_windows[epoch] = replace(window, store=given.store, hidden_ED=given.hidden_ED)


@dataclass(frozen=True)
class Features:
    """Hidden states of N texts after the frozen layers."""

    hidden_ED: Tensor
    """The hidden states, in the precision of the model that computed them; there may be more rows
    than tokens."""
    store: TokenStore
    """The N texts; a token's id is its row of `hidden_ED`."""


def count_frozen_layers(model: BertClassifier) -> int:
    """How many layers from the bottom have nothing in them or below them that is trained.

    The last layer never counts: only the first token of each text is computed there (`Bert.pool`).
    """
    modules = [model.bert.embeddings, *list(model.bert.layers)[:-1]]
    frozen = [not any(p.requires_grad for p in module.parameters()) for module in modules]
    return max(0, [*frozen, False].index(False) - 1)


class FrozenTrunk:
    """Computes the features of the steps, window by window."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._windows: list[range] = []  # numbers of their steps
        most, lengths_N = 0, step.data.store.lengths.numpy()
        for epoch in step.epoch_windows:
            tokens = np.array([lengths_N[rows].sum() for rows in epoch.batches])
            for cut in cut_by_tokens(np.arange(len(tokens)), tokens, WINDOW_TOKENS):
                self._windows.append(epoch.steps[cut[0] : cut[-1] + 1])
                most = max(most, int(tokens[cut].sum()))
        weight = step.model.bert.pooler.weight
        self._hidden_ED = weight.new_zeros(most, weight.shape[1])  # all windows', in turn
        self._window: Window | None = None

    def find_window(self, number: int) -> Window:
        """The window of step `number`; its hidden states take the place of the last window's."""
        if self._window is None or number not in self._window.steps:
            self._window = self._compute(next(w for w in self._windows if number in w))
        return self._window

    def _compute(self, steps: range) -> Window:
        rows = [self._step.places[number].rows_B for number in steps]
        masks = self._step.make_masks(TRUNK_STREAM, steps.start)
        features = compute_features(
            self._step.model,
            self._step.data.store,
            np.concatenate(rows),
            self._step.num_lower_layers,
            masks,
            self._hidden_ED,
        )
        ends = np.cumsum([*map(len, rows)])
        batches = np.split(np.arange(ends[-1]), ends[:-1])
        return Window(steps, batches, features.store, features.hidden_ED)


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

    masks: turn dropout on (`step.Masks`). hidden_ED: where to put the hidden states; None: into new
    memory. bar: counts texts.
    """
    lengths_N = store.lengths[torch.from_numpy(rows_N)]
    offsets = torch.cat([lengths_N.new_zeros(1), lengths_N.cumsum(0)])
    num_tokens = int(offsets[-1])
    first_row_N = torch.empty_like(lengths_N)
    weight = model.bert.pooler.weight
    if hidden_ED is None:
        hidden_ED = weight.new_zeros(num_tokens, weight.shape[1])
    done = 0
    for texts in length_sorted_batches(lengths_N.numpy(), tokens_at_once(weight.device.type)):
        batch = pack(store, torch.from_numpy(rows_N[texts]), weight.device)
        ends_B = lengths_N[texts].cumsum(0)
        first_row_N[texts] = done + ends_B - lengths_N[texts]
        encoded_TD = model.bert(
            batch.input_ids_T,
            batch.position_ids_T,
            packed_layout(batch.cu_seqlens, weight.device),
            num_layers=num_layers,
            randomness=None if masks is None else masks(batch, texts),
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
    epochs. impl: how the operations run. Empty where nothing is frozen. Each takes 2·D bytes a
    token in bf16, as long as it is kept.
    """
    num_layers = count_frozen_layers(model)
    if num_layers == 0:
        return []
    rounded = round_classifier(model.bert.config, dict(model.named_parameters()), dtype, impl)
    rows_N, device = np.arange(len(store)), model.device
    found: list[Features] = []
    total = len(store) * (num_epochs or 1)
    with progress_bar("frozen layers", total, "text", show_progress) as bar:
        for epoch in range(num_epochs or 1):
            masks: Masks | None = None
            if num_epochs is not None:
                # Seed 0 for everyone: a result must not depend on which other seeds ran.
                generator = torch.Generator(device)
                generator.manual_seed(derive_seed(SHARED_TRUNK_STREAM, 0, 1, epoch))
                masks = drawn_from(generator)
                if impl == "triton":
                    from .randomness import counters_of

                    masks = partial(counters_of, epoch_key(0, 1, epoch, device), generator, 0)
            found.append(compute_features(rounded, store, rows_N, num_layers, masks, bar=bar))
    return found
