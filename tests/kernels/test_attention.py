"""Packed attention against torch's, one sequence at a time."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels.attention import packed_attention, packed_layout

HEADS, HEAD_SIZE = 3, 4


def packed_inputs(lengths: list[int], filler: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv_T3D in float64, position_ids_T, cu_seqlens."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths) + filler
    qkv = torch.randn(total, 3 * HEADS * HEAD_SIZE, generator=generator, dtype=torch.float64)
    positions = torch.cat([*(torch.arange(n) for n in lengths), torch.zeros(filler).long()])
    return qkv, positions, torch.tensor([0, *lengths]).cumsum(0)


def one_by_one(qkv_T3D: Tensor, lengths: list[int]) -> Tensor:
    contexts = []
    for qkv in qkv_T3D[: sum(lengths)].split(lengths):
        q, k, v = qkv.view(-1, 3, HEADS, HEAD_SIZE).permute(1, 2, 0, 3)
        contexts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


@pytest.mark.parametrize(
    ("lengths", "filler"),
    [([1], 0), ([1, 1, 1], 5), ([5], 3), ([7, 7], 0), ([1, 9, 2, 30], 22), ([128, 3], 61)],
)
def test_context_and_gradient_equal_torchs_attention_sequence_by_sequence(
    lengths: list[int], filler: int
) -> None:
    qkv, positions, cu_seqlens = packed_inputs(lengths, filler)
    layout = packed_layout(cu_seqlens, positions, sum(lengths), max(lengths))
    ours_in, theirs_in = (qkv.clone().requires_grad_() for _ in range(2))
    ours, theirs = packed_attention(ours_in, layout, HEADS), one_by_one(theirs_in, lengths)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    ours.backward(upstream)
    theirs.backward(upstream[: sum(lengths)])
    torch.testing.assert_close(ours[: sum(lengths)], theirs)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)
    assert not ours[sum(lengths) :].any(), "filler tokens attend to nothing"
    assert not ours_in.grad[sum(lengths) :].any(), "and nothing attends to them"


def test_in_bf16_the_softmax_loses_no_more_than_torchs_own() -> None:
    """With 300 keys of nearly equal score, a softmax in bf16 would be off by several per cent."""
    lengths = [300, 300]
    qkv, positions, cu_seqlens = packed_inputs(lengths, 0)
    qkv[:, : 2 * HEADS * HEAD_SIZE] *= 0.05
    qkv[:, 2 * HEADS * HEAD_SIZE :] += 1.0
    layout = packed_layout(cu_seqlens, positions, 600, 300)
    half = qkv.bfloat16()
    exact = one_by_one(half.double(), lengths)
    ours = packed_attention(half, layout, HEADS)
    theirs = one_by_one(half, lengths)
    assert ours.dtype == torch.bfloat16
    error, allowed = ((x.double() - exact).norm() / exact.norm() for x in (ours, theirs))
    assert error <= 2 * allowed + 1e-4


def test_dropout_of_probabilities_keeps_the_mean() -> None:
    lengths = [6, 3]
    qkv, positions, cu_seqlens = packed_inputs(lengths, 0)
    layout = packed_layout(cu_seqlens, positions, 9, 6)
    plain = packed_attention(qkv, layout, HEADS)
    generator = torch.Generator().manual_seed(0)
    draws = [packed_attention(qkv, layout, HEADS, 0.1, generator) for _ in range(4_000)]
    assert not torch.equal(draws[0], plain)
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, rtol=0, atol=0.05)
