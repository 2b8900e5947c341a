"""The whole state of a run, in one object.

Batch order and dropout masks are pure functions of (seed, stage, epoch or step), so the generators
need no state of their own: the counters below are their state. With the weights and the
optimizer's moments they are all that a later process needs to go on as if nothing had happened.
"""

from dataclasses import dataclass

import numpy as np

from ..model.bert import BertClassifier
from .loss_scale import LossScale
from .optim import Moments


@dataclass
class TrainingState:
    """Where a run stands. A stage advances it in place, one batch at a time."""

    seed: int
    model: BertClassifier
    """fp32 master weights. While a stage runs, its word embeddings are those from before."""
    stage: int = 1
    """1 or 2."""
    epoch: int = 0
    """Epoch of the stage, from 0."""
    batch: int = 0
    """The next batch of the epoch, from 0."""
    step: int = 0
    """Optimizer steps of the stage so far."""
    moments: Moments | None = None
    """AdamW's, None until the stage is entered. Without weight decay those of the word embeddings
    have a row for each token of the stage's data, in order, and no others."""
    loss_scale: LossScale | None = None
    """None until the stage is entered."""

    def begin_stage(self, stage: int) -> None:
        """Enter `stage` at its first batch, with a new optimizer and schedule."""
        self.stage, self.epoch, self.batch, self.step = stage, 0, 0, 0
        self.moments = self.loss_scale = None


# The first number of a derived seed: what it is for.
HEAD_STREAM, DROPOUT_STREAM, TRUNK_STREAM, COUNTER_STREAM = 1, 2, 4, 5  # 3: samplers
SHARED_TRUNK_STREAM = 6


def derive_seed(*numbers: int) -> int:
    """A 63-bit seed for a torch generator, as unrelated for neighbouring numbers as for any."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
