"""Batch order: random, class-balanced, token-budget.

Each sampler is a pure function of (seed, epoch), so that training can re-enter an epoch at any
batch. The generator is numpy's PCG64, seeded with these numbers alone; a stage passes (seed, stage)
as its seed.

A batch is an int64 array of row numbers. N rows, B rows a batch.
"""

import numpy as np

from ..errors import DataError, UsageError

_STREAM = 3
SAMPLERS = ("random", "class-balanced", "token-budget")


def epoch_batches(
    name: str,
    labels_N: np.ndarray,
    lengths_N: np.ndarray,
    batch_size: int,
    seed: tuple[int, ...],
    epoch: int,
) -> list[np.ndarray]:
    """The batches of one epoch by the sampler called `name`, one of SAMPLERS."""
    if name == "random":
        return random_batches(len(labels_N), batch_size, seed, epoch)
    if name == "class-balanced":
        return class_balanced_batches(labels_N, batch_size, seed, epoch)
    if name == "token-budget":
        # As many tokens a batch as `batch_size` texts of mean length have.
        budget = max(1, round(batch_size * float(np.mean(lengths_N))))
        return token_budget_batches(lengths_N, budget, seed, epoch)
    raise UsageError(f"sampler is {name!r}; expected one of {', '.join(SAMPLERS)}")


def random_batches(
    num_rows: int, batch_size: int, seed: tuple[int, ...], epoch: int
) -> list[np.ndarray]:
    """Each row once, in a fresh random order each epoch; the last batch may be smaller."""
    order = _generator(seed, epoch).permutation(num_rows)
    return _cut(order, batch_size)


def class_balanced_batches(
    labels_N: np.ndarray, batch_size: int, seed: tuple[int, ...], epoch: int
) -> list[np.ndarray]:
    """N draws in which each class has the same share; the draws within a class repeat evenly.

    Every draw first picks a class, then a row of it (class-balanced sampling, Kang et al. 2020,
    arXiv 1910.09217). Here classes take turns in a random order and a class's rows come from
    shuffles of the whole class, so that shares differ by at most one and no row of a class comes
    a second time before all of its rows have come once.
    """
    generator = _generator(seed, epoch)
    num_rows, num_classes = len(labels_N), int(labels_N.max()) + 1
    turns = -(-num_rows // num_classes)
    class_of_draw = np.concatenate([generator.permutation(num_classes) for _ in range(turns)])
    class_of_draw = class_of_draw[:num_rows]
    order = np.empty(num_rows, dtype=np.int64)
    for c in range(num_classes):
        rows = np.flatnonzero(labels_N == c)
        if len(rows) == 0:
            raise DataError(f"class {c} of {num_classes} has no training row to draw from")
        draws = np.flatnonzero(class_of_draw == c)
        shuffles = [generator.permutation(rows) for _ in range(-(-len(draws) // len(rows)))]
        order[draws] = np.concatenate(shuffles or [rows])[: len(draws)]
    return _cut(order, batch_size)


def token_budget_batches(
    lengths_N: np.ndarray, max_tokens: int, seed: tuple[int, ...], epoch: int
) -> list[np.ndarray]:
    """Each row once, in random order, cut into batches of at most `max_tokens` tokens.

    A text longer than the budget is a batch of its own.
    """
    order = _generator(seed, epoch).permutation(len(lengths_N))
    return cut_by_tokens(order, lengths_N, max_tokens)


def length_sorted_batches(lengths_N: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """Each row once, longest first, in batches of at most `max_tokens` tokens: for forward alone.

    Longest first, so that the largest memory is asked for at once.
    """
    order = np.argsort(-lengths_N, kind="stable")
    return cut_by_tokens(order, lengths_N, max_tokens)


def tokens_at_once(device_type: str) -> int:
    """Tokens of a batch that is not trained on: what a CPU's caches hold, or enough for a GPU."""
    return 2_048 if device_type == "cpu" else 16_384


def _cut(order: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def cut_by_tokens(order: np.ndarray, lengths_N: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    """`order` cut into runs of at most `max_tokens` tokens, or of one row that has more."""
    batches: list[np.ndarray] = []
    start = tokens = 0
    for i, length in enumerate(lengths_N[order].tolist()):
        if tokens + length > max_tokens and i > start:
            batches.append(order[start:i])
            start, tokens = i, 0
        tokens += length
    if len(order):
        batches.append(order[start:])
    return batches


def _generator(seed: tuple[int, ...], epoch: int) -> np.random.Generator:
    # The constant keeps these draws apart from others that the same seed is used for.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence((_STREAM, *seed, epoch))))
