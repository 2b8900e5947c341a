"""The published walk that makes the classes equal, and the table that comes out of it.

The walk: go through the training rows in order, again and again, and ask for one paraphrase of each
row in each pass; skip the rows of a class that already has more than 1.01 · n_majority paraphrases;
end at the end of a pass, once every class has at least that many. A tail row is thus asked for many
paraphrases, a row of the majority for one or two.

Published, the walk waits for each answer before the next call. Here calls overlap, and who
answers first must not decide which rows are asked how often. So the k-th draw of a class is fixed
before the first call: row k mod n_c of the class's n_c rows, in pass k // n_c. The walk without
failures takes the first draws of each class (`count_draws`); where a draw is given up, the class
goes on with its next one. Same data, same answers: same table.

The table (`choose_rows`): the paraphrases ordered by (source row, draw); of each class, in
ascending order, n_majority of them; all shuffled. The draws are those of pandas'
`sample(random_state=42)`. Source: the code of ValizadehAslani et al. 2024 (Neurocomputing
592:127801).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SURPLUS = 1.01
"""Paraphrases that the walk wants for each one that the table takes."""
SEED = 42


class Draw(NamedTuple):
    """One paraphrase that is wanted."""

    row: int
    """Of the training table, from 0."""
    pass_: int
    """How many paraphrases this row was asked for before."""
    repeat: int
    """How many this text was asked for before, in whichever row it stands."""


def count_draws(counts_C: Sequence[int]) -> list[int]:
    """[C] paraphrases that the walk asks of each class when no draw is given up.

    counts_C: training rows of each class, none of them 0
    """
    wanted = SURPLUS * max(counts_C)
    most = math.floor(wanted) + 1  # a class is skipped once it has more than `wanted`
    drawn_C = [0] * len(counts_C)
    while min(drawn_C) < wanted:
        drawn_C = [min(most, n + rows) for n, rows in zip(drawn_C, counts_C, strict=True)]
    return drawn_C


class Walk:
    """Deals out the draws, class by class or all together, in the order of the walk."""

    def __init__(self, texts: Sequence[str], labels_N: np.ndarray) -> None:
        """labels_N: [N] class indices 0 … C-1, each of which occurs."""
        self._texts = texts
        self._rows_C = [np.flatnonzero(labels_N == c) for c in range(int(labels_N.max()) + 1)]
        self._dealt_C = [0] * len(self._rows_C)
        self._repeats: Counter[str] = Counter()

    def deal(self, wanted_C: Sequence[int]) -> list[Draw]:
        """The next draws, so many of each class, ordered by pass and row."""
        next_draws: list[tuple[int, int]] = []
        for c, (rows, wanted) in enumerate(zip(self._rows_C, wanted_C, strict=True)):
            for k in range(self._dealt_C[c], self._dealt_C[c] + wanted):
                next_draws.append((k // len(rows), int(rows[k % len(rows)])))
            self._dealt_C[c] += wanted
        dealt = []
        for pass_, row in sorted(next_draws):
            text = self._texts[row]
            dealt.append(Draw(row, pass_, self._repeats[text]))
            self._repeats[text] += 1
        return dealt


def choose_rows(pool_labels: np.ndarray, num_classes: int, num_majority: int) -> np.ndarray:
    """Positions in the pool of the rows of `aug.csv`, in their order.

    pool_labels: [P] class of each paraphrase, the pool ordered by (source row, draw)
    num_majority: rows to take of each class; all are taken of a class that has fewer
    """
    chosen = []
    for c in range(num_classes):
        of_class = np.flatnonzero(pool_labels == c)
        size = min(num_majority, len(of_class))
        order = np.random.RandomState(SEED).choice(len(of_class), size=size, replace=False)
        chosen.append(of_class[order])
    rows = np.concatenate(chosen)
    return rows[np.random.RandomState(SEED).choice(len(rows), size=len(rows), replace=False)]
