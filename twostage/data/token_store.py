"""Tokenised texts, end to end.

Shapes: N texts.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class TokenStore:
    """Token ids of N texts, end to end."""

    ids: Tensor
    """[total tokens] int32."""
    offsets: Tensor
    """[N+1] int64: text i is `ids[offsets[i] : offsets[i+1]]`."""
    num_cut: int = 0
    """Texts that had more tokens than were kept."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """[N] int64, tokens of each text."""
        return self.offsets.diff()


@dataclass(frozen=True)
class StageData:
    """Tokenised training texts and their classes."""

    store: TokenStore
    labels_N: np.ndarray
    """[N] int64."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def class_counts(self, num_classes: int) -> list[int]:
        """Rows of each class, C of them."""
        counts_C: list[int] = np.bincount(self.labels_N, minlength=num_classes).tolist()
        return counts_C
