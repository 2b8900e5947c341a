"""Attention in padded blocks against torch's, one sequence at a time."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels.attention import (
    PackedLayout,
    first_token_attention,
    packed_attention,
    packed_layout,
)
from twostage.kernels.dropout import dropout_mask
from twostage.kernels.padded_attention import attend, reference_attend

HEADS, HEAD_SIZE = 3, 4
WIDTH = HEADS * HEAD_SIZE
LENGTHS = [
    ([1], 0),
    ([1, 1, 1], 5),
    ([5], 3),
    ([7, 7], 0),
    ([1, 9, 2, 30], 22),
    ([60, 31, 12, 28, 9], 0),
    ([128, 3], 61),
]


def packed_inputs(lengths: list[int], filler: int) -> tuple[Tensor, PackedLayout]:
    """qkv_T3D in float64, and the layout."""
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths) + filler
    qkv = torch.randn(total, 3 * WIDTH, generator=generator, dtype=torch.float64)
    return qkv, packed_layout(torch.tensor([0, *lengths]).cumsum(0))


def one_by_one(qkv_T3D: Tensor, lengths: list[int]) -> Tensor:
    contexts = []
    for qkv in qkv_T3D[: sum(lengths)].split(lengths):
        q, k, v = qkv.view(-1, 3, HEADS, HEAD_SIZE).permute(1, 2, 0, 3)
        contexts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


@pytest.mark.parametrize(("lengths", "filler"), LENGTHS)
def test_context_and_gradient_equal_torchs_attention_sequence_by_sequence(
    lengths: list[int], filler: int
) -> None:
    qkv, layout = packed_inputs(lengths, filler)
    ours_in, theirs_in = (qkv.clone().requires_grad_() for _ in range(2))
    ours, theirs = packed_attention(ours_in, layout, HEADS), one_by_one(theirs_in, lengths)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    ours.backward(upstream)
    theirs.backward(upstream[: sum(lengths)])
    torch.testing.assert_close(ours[: sum(lengths)], theirs)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)
    assert not ours[sum(lengths) :].any(), "filler tokens attend to nothing"
    assert not ours_in.grad[sum(lengths) :].any(), "and nothing attends to them"


@pytest.mark.parametrize(("lengths", "filler"), LENGTHS)
def test_first_tokens_alone_have_the_context_and_gradient_of_the_full_attention(
    lengths: list[int], filler: int
) -> None:
    qkv, layout = packed_inputs(lengths, filler)
    ours_in, full_in = (qkv.clone().requires_grad_() for _ in range(2))
    first_B = layout.first_tokens_B
    ours = first_token_attention(ours_in[first_B, :WIDTH], ours_in[:, WIDTH:], layout, HEADS)
    full = packed_attention(full_in, layout, HEADS)[first_B]
    upstream = torch.randn(full.shape, dtype=torch.float64)
    ours.backward(upstream)
    full.backward(upstream)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(ours_in.grad, full_in.grad)


def test_short_texts_share_a_strip_with_long_ones_where_that_makes_the_block_smaller() -> None:
    def block(lengths: list[int]) -> list[int]:
        mask_S1LL = packed_layout(torch.tensor([0, *lengths]).cumsum(0)).block.mask_S1LL
        return [len(mask_S1LL), mask_S1LL.shape[-1]]

    assert block([12, 60, 28, 31]) == [2, 72], "60 with 12 and 31 with 28, rounded up to 8"
    assert block([12, 60, 28, 31, 9]) == [3, 72], "the middle one alone"
    assert block([32, 32, 32, 32]) == [4, 32], "in pairs: 2 x 64 x 64, twice as much"


def test_a_layout_places_every_token_once_and_its_inverses_undo_it() -> None:
    block = packed_layout(torch.tensor([0, 60, 91, 103, 131, 140])).block
    tokens_N = torch.arange(140)
    assert len(block.rows_N.unique()) == 140
    assert torch.equal(block.tokens_R[block.rows_N], tokens_N)
    assert torch.equal(block.sequences_SW[block.slots_B], torch.arange(5))
    assert torch.isfinite(block.mask_S1LL).any(-1).all(), "each query has a key, or 0 / 0 follows"


@pytest.mark.parametrize("queries", [1, 2, 9])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_written_out_gradients_are_autograds(queries: int, dropout_p: float) -> None:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(2, HEADS, queries, HEAD_SIZE), *[(2, HEADS, 9, HEAD_SIZE)] * 2]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    mask = torch.zeros(2, 1, queries, 9)
    mask[1, :, :, 6:] = float("-inf")
    outcomes = []
    for operation in (attend, reference_attend):
        inputs = q, k, v = [leaf.clone().requires_grad_() for leaf in leaves]
        kept, scale = None, 1.0
        if dropout_p:
            drawn = torch.Generator().manual_seed(3)
            kept, scale = dropout_mask((2, HEADS, queries, 9), dropout_p, drawn, torch.float64)
        context = operation(q, k, v, mask, kept, scale)
        (context * torch.linspace(-1, 2, context.numel()).view_as(context)).sum().backward()
        outcomes.append([context, *(leaf.grad for leaf in inputs)])
    for ours, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, reference)


def test_in_bf16_context_and_gradients_lose_no_more_than_torchs_own() -> None:
    """With 300 keys of nearly equal score, a softmax in bf16 would be off by several per cent."""
    lengths = [300, 300]
    qkv, layout = packed_inputs(lengths, 0)
    qkv[:, : 2 * WIDTH] *= 0.05
    qkv[:, 2 * WIDTH :] += 1.0
    upstream = torch.randn(600, WIDTH, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(operation: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = qkv.bfloat16().to(dtype).requires_grad_()
        ours = operation == "ours"
        out = packed_attention(leaf, layout, HEADS) if ours else one_by_one(leaf, lengths)
        assert out.dtype == dtype
        out.backward(upstream.to(dtype))
        return out.detach().double(), leaf.grad.double()

    exact = run("torch", torch.float64)
    for mine, theirs, truth in zip(
        run("ours", torch.bfloat16), run("torch", torch.bfloat16), exact, strict=True
    ):
        error, allowed = ((x - truth).norm() / truth.norm() for x in (mine, theirs))
        assert error <= 2 * allowed + 1e-4


def test_dropout_of_probabilities_keeps_the_mean() -> None:
    qkv, layout = packed_inputs([6, 3], 0)
    plain = packed_attention(qkv, layout, HEADS)
    generator = torch.Generator().manual_seed(0)
    draws = [packed_attention(qkv, layout, HEADS, 0.1, generator) for _ in range(4_000)]
    assert not torch.equal(draws[0], plain)
    torch.testing.assert_close(torch.stack(draws).mean(0), plain, rtol=0, atol=0.05)
