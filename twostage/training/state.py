"""Where a training run stands, and the random numbers that follow from it.

Batch order and dropout masks are pure functions of (seed, stage, epoch or step). So the weights,
what the optimizer remembers and these counters are all that a later process needs to go on.
"""

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from ..model.bert import BertClassifier


@dataclass
class TrainingState:
    """Where a run stands, between any two steps."""

    seed: int
    model: BertClassifier
    """fp32 weights; frozen ones require no gradient. While a stage runs by the fast step, the word
    embeddings are those from before it."""
    stage: int = 1
    """1 or 2."""
    step: int = 0
    """Steps of the stage so far."""
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    """What the step remembers, such as AdamW's moments; empty until the stage is entered. The names
    are those of the step that the stage began with, plain or fast."""


# The first number of a derived seed: what it is for.
HEAD_STREAM, DROPOUT_STREAM, TRUNK_STREAM, COUNTER_STREAM = 1, 2, 4, 5  # 3: samplers
SHARED_TRUNK_STREAM = 6


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed for a torch generator; neighbouring numbers give independent seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
