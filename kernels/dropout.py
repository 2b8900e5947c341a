"""Dropout from explicit randomness, in two ways.

torch's own dropout draws from the process-wide generator, one Bernoulli variate an element. Here
the source is an argument, so that a training step can be replayed alone; and it is drawn in lanes
of 16 bits: an element is kept when its lane is at least p · 65536. That represents p = 0.1 to 6e-6
(a byte would make it 0.1016); kept values are divided by the keep probability that the lanes really
have, so the expectation is exact.

    A torch.Generator    bulk random bits, 64 at a draw: the fast way on a CPU. The mask depends on
                         what was drawn before it.
    DropoutCounters      the mask is a pure function of where an element stands in training:

        Philox(key = (seed, stage, epoch);  counter = (feature / 8, position, draw, site))

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") is ten rounds of
multiplying and mixing that turn a key of 64 bits and a counter of 128 bits into 128 random bits,
here the lanes of eight neighbouring features. There is no state to keep: a Triton kernel computes
the mask where it needs it and again in backward, and never stores it. It does not matter in which
batch, order or padding a text comes. In attention the features of a query are its keys, by their
positions: key j of head h is feature h · 65,536 + j.

Shapes: T rows (packed tokens), D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import Pointer, jit, tl

_LANE_VALUES = 65_536

HEAD_FEATURES = 65_536
"""Features of an attention head: more than there can be keys."""


@dataclass(frozen=True)
class DropoutCounters:
    """Where in training the rows of a batch stand."""

    key: Tensor
    """[1] int64 on the device: a number derived from (seed, stage, epoch)."""
    draws_T: Tensor
    """[T] int32: how many texts the epoch had drawn before this row's text."""
    positions_T: Tensor
    """[T] int32: the row's position in its text."""
    generator: torch.Generator
    """For flash attention, which has randomness of its own (`flash_attention.py`)."""

    def take(self, rows: Tensor) -> "DropoutCounters":
        """Those of some rows, [R] integer."""
        return replace(self, draws_T=self.draws_T[rows], positions_T=self.positions_T[rows])


Randomness = torch.Generator | DropoutCounters


def dropout(x: Tensor, p: float, randomness: Randomness | None, site: int = 0) -> Tensor:
    """Zero each element of `x` with probability p and scale the rest by 1 / (1 - p).

    x: any shape; [T, D] for counters. randomness: on x's device; None means evaluation, and returns
    `x` itself. site: tells the dropouts of a model apart; a generator does not need it.
    """
    if randomness is None or p == 0.0:
        return x
    mask, scale = dropout_mask(x.shape, p, randomness, x.dtype, site)
    # The scale stays a number: as a bf16 tensor 1 / 0.9 would be 1.109, and the mean 0.15 % low.
    return (x * mask).mul(scale)


def dropout_mask(
    shape: Sequence[int], p: float, randomness: Randomness, dtype: torch.dtype, site: int = 0
) -> tuple[Tensor, float]:
    """(mask, scale): 0 with probability p and else 1, in `dtype`; and 1 / (1 - p)."""
    drop_below, scale = lane_threshold(p)
    if isinstance(randomness, DropoutCounters):
        lanes = _counted_lanes(randomness, site, shape[1])
    else:
        lanes = _random_lanes(shape, randomness)
    # Written back as int16 and then cast: on a CPU a fifth of the time of the way over bool, for
    # which torch has no vector code.
    torch.ge(lanes, drop_below - _LANE_VALUES // 2, out=lanes)
    return lanes.to(dtype), scale


def dropout_mask_at(
    key: Tensor,
    draws: Tensor,
    positions: Tensor,
    features: Tensor,
    site: int,
    p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, float]:
    """`dropout_mask` of single elements, named by counters whose shapes broadcast to the mask's.

    Eight times the work for each, of which seven eighths are thrown away: for where no kernel is.
    """
    drop_below, scale = lane_threshold(p)
    features = features.long()
    counter = (features // 8, positions.long(), draws.long(), torch.full_like(features, site))
    words_4 = torch.stack(torch.broadcast_tensors(*philox(key, counter)))
    lane = (features % 8).expand(words_4.shape[1:])
    word = words_4.gather(0, (lane // 2)[None])[0]
    return ((word >> 16 * (lane % 2)) & 0xFFFF >= drop_below).to(dtype), scale


def lane_threshold(p: float) -> tuple[int, float]:
    """(the least lane, from 0, that is kept; 1 / (1 - p) with the p that this makes)."""
    drop_below = min(round(p * _LANE_VALUES), _LANE_VALUES - 1)
    return drop_below, 1.0 / (1.0 - drop_below / _LANE_VALUES)


def counter_tensors(
    randomness: Randomness | None, p: float
) -> tuple[Tensor, Tensor, Tensor] | tuple[None, None, None]:
    """What a Triton launcher takes: (key, draws_T, positions_T), or nothing without dropout."""
    if randomness is None or p == 0.0:
        return None, None, None
    if not isinstance(randomness, DropoutCounters):
        raise TypeError("the Triton kernels draw their masks from DropoutCounters, not a Generator")
    return randomness.key, randomness.draws_T, randomness.positions_T


def _random_lanes(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """int16 of this shape, uniform over all 65,536 values."""
    count = torch.Size(shape).numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(shape)


def _counted_lanes(counters: DropoutCounters, site: int, num_features: int) -> Tensor:
    """[T, D] int16, -32,768 for a lane of 0: what `keep_mask` computes in Triton."""
    groups = torch.arange(-(-num_features // 8), device=counters.key.device)
    counter = (
        groups[None, :],
        counters.positions_T.long()[:, None],
        counters.draws_T.long()[:, None],
        groups.new_full((1, 1), site),
    )
    words_TG4 = torch.stack(torch.broadcast_tensors(*philox(counters.key, counter)), dim=-1)
    lanes_TD = words_TG4.to(torch.int32).view(torch.int16).flatten(1)[:, :num_features]
    return lanes_TD ^ -(_LANE_VALUES // 2)  # the order of unsigned numbers, in signed ones


_WORD = 0xFFFF_FFFF


def philox(key: Tensor, counter: Sequence[Tensor]) -> Sequence[Tensor]:
    """Philox4x32-10: four random words of 32 bits, from a 64-bit key and four words of a counter.

    All are int64 tensors of shapes that broadcast; words lie in 0 … 2^32 - 1.
    Source: Salmon et al. 2011, section 3.3 and table 2.
    """
    k0, k1 = key & _WORD, (key >> 32) & _WORD
    c0, c1, c2, c3 = counter
    for _ in range(10):
        # The product wraps around at 64 bits, which leaves both of its halves right.
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high_0, high_2 = (product_0 >> 32) & _WORD, (product_2 >> 32) & _WORD
        c0, c1, c2, c3 = high_2 ^ c1 ^ k0, product_2 & _WORD, high_0 ^ c3 ^ k1, product_0 & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


@jit
def keep_mask(
    key: "Pointer",
    draws_T: "Pointer",
    positions_T: "Pointer",
    rows_R: "Pointer",
    is_row_R: "Pointer",
    site: int,
    drop_below: int,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> "Pointer":
    """Triton: [BLOCK_R, BLOCK_D] bool, whether an element is kept.

    rows_R, is_row_R: a block of rows, and which of them there are.
    """
    draws_R = tl.load(draws_T + rows_R, mask=is_row_R, other=0)
    positions_R = tl.load(positions_T + rows_R, mask=is_row_R, other=0)
    return keep_mask_at(key, draws_R, positions_R, 0, site, drop_below, BLOCK_R, BLOCK_D)


@jit
def keep_mask_at(
    key: "Pointer",
    draws_R: "Pointer",
    positions_R: "Pointer",
    first_group: int,
    site: int,
    drop_below: int,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> "Pointer":
    """Triton: `keep_mask` of rows whose counters are in registers, from feature 8 · first_group on.

    One Philox serves the eight features that a thread holds side by side, at some 12 integer
    operations each.
    """
    zero_RG = tl.zeros([BLOCK_R, BLOCK_D // 8], tl.int32)
    w0, w1, w2, w3 = tl.philox(
        tl.load(key),
        zero_RG + first_group + tl.arange(0, BLOCK_D // 8)[None, :],
        zero_RG + positions_R[:, None],
        zero_RG + draws_R[:, None],
        zero_RG + site,
    )
    # join() appends an axis of two: index (i, j) of the last two axes is word 2·i + j.
    words_RG22 = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    lanes_RG222 = tl.join(words_RG22 & 0xFFFF, words_RG22 >> 16)
    return tl.reshape(lanes_RG222, [BLOCK_R, BLOCK_D]) >= drop_below
