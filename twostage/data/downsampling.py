"""Making balanced data imbalanced: the published down-sampling of SST-2.

Keep every positive text and, for `rate` times as many, negatives; then shuffle. The rate is thus
the ratio of the two classes, not the share of the negatives that stays. The draws are those of
pandas' `sample(random_state=42)`, written with numpy's legacy generator, so that our files are byte
for byte the published ones. Source: ValizadehAslani et al. 2022 (arXiv 2207.10858) and its code.
"""

from pathlib import Path
from typing import Unpack

import numpy as np

from ..errors import DataError, UsageError
from .classes import Classes
from .tables import Table, TableOptions, find_table, read_table, write_table

CLASSES = Classes(("0", "1"), "SST-2 (0 = negative, 1 = positive)")
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


def downsample(table: Table, rate: float, seed: int = 42) -> tuple[list[str], list[int]]:
    """Texts and labels (0, 1) with all positives and `floor(n_positive * rate)` negatives.

    Raises DataError when a label is neither 0 nor 1, when a class would have no row left, or when
    there are fewer negatives than that.
    """
    check_draw(rate, seed)
    labels = CLASSES.encode(table)
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    keep = int(np.floor(len(positives) * rate))  # the float64 product: 90 × 0.7 gives 62
    for name, left in (("1 (positive)", len(positives)), ("0 (negative)", keep)):
        if left == 0:
            raise DataError(f"{table.source} at rate {rate}: class {name} has no row left")
    if keep > len(negatives):
        raise DataError(
            f"{table.source} has {len(negatives)} negatives; rate {rate} of its {len(positives)} "
            f"positives asks for {keep}: give a lower rate"
        )
    kept = negatives[np.random.RandomState(seed).choice(len(negatives), size=keep, replace=False)]
    rows = np.concatenate([positives, kept])
    rows = rows[np.random.RandomState(seed).choice(len(rows), size=len(rows), replace=False)]
    return [table.texts[i] for i in rows], [int(labels[i]) for i in rows]


def check_draw(rate: float, seed: int) -> None:
    """Raise UsageError for a rate or a seed that cannot be used."""
    if not 0 < rate <= 1:
        raise UsageError(f"the rate is {rate}; expected a number above 0, at most 1")
    if not 0 <= seed < 2**32:
        raise UsageError(f"the seed is {seed}; expected a whole number from 0 to 2**32 - 1")


def downsample_folder(
    input_path: Path,
    output_path: Path,
    rates: tuple[float, ...] = RATES,
    seed: int = 42,
    **options: Unpack[TableOptions],
) -> list[tuple[Path, int, int]]:
    """`train.tsv`, `dev.tsv` → `OUT/<rate>/train.csv`, `test.csv` (all of dev) for each rate.

    options: of both tables. Returns (folder, positives, negatives) of each training file.
    """
    for rate in rates:
        check_draw(rate, seed)
    train, dev = (read_table(find_table(input_path, name), **options) for name in ("train", "dev"))
    dev_labels = [int(label) for label in CLASSES.encode(dev)]
    written = []
    for rate in rates:
        folder = output_path / str(rate)
        texts, labels = downsample(train, rate, seed)
        write_table(folder / "train.csv", ("text", "label"), zip(texts, labels, strict=True))
        write_table(folder / "test.csv", ("text", "label"), zip(dev.texts, dev_labels, strict=True))
        written.append((folder, sum(labels), len(labels) - sum(labels)))
    return written
