"""Attention of short texts, in Triton, against the padded form in fp64; flash attention's op."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from twostage.kernels.attention import (
    PackedLayout,
    first_token_attention,
    packed_attention,
    packed_layout,
)
from twostage.kernels.dropout import DropoutCounters
from twostage.kernels.flash_attention import drawing_from, flash_attention

CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]
Attention = Callable[[Tensor, PackedLayout, str, DropoutCounters | None], Tensor]

HEADS = 2
EXACT = torch.float32
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}
if torch.cuda.is_available():  # where the kernels are for 16 bits
    EXACT, CLOSE = torch.bfloat16, {"rtol": 2e-2, "atol": 2e-2}
MIXTURES = [
    ([1], 0),
    ([16, 1, 5], 10),
    ([17, 32, 3], 12),
    ([2, 64, 33], 0),
    ([128, 1, 77, 64], 50),
    ([3, 0, 7, 0], 200),
]
"""Lengths of texts, two of which have no tokens, and filler tokens after them."""


def layout_of(lengths: list[int], device: torch.device) -> PackedLayout:
    return packed_layout(torch.tensor([0, *lengths], device=device).cumsum(0))


def counters_of(lengths: list[int], filler: int, device: torch.device) -> DropoutCounters:
    """Text b is draw 70,001 · b; at the filler, numbers that nobody uses."""
    draws = [70_001 * b for b, length in enumerate(lengths) for _ in range(length)]
    positions = [i for length in lengths for i in range(length)]
    rest = [-1] * filler
    draws_T, positions_T = (
        torch.tensor(x + rest, dtype=torch.int32, device=device) for x in (draws, positions)
    )
    return DropoutCounters(
        torch.tensor([99], device=device), draws_T, positions_T, torch.Generator(device)
    )


def all_tokens(p: float) -> Attention:
    def run(
        qkv_T3D: Tensor, layout: PackedLayout, impl: str, randomness: DropoutCounters | None
    ) -> Tensor:
        return packed_attention(qkv_T3D, layout, HEADS, p, randomness, 5, impl)

    return run


def first_tokens(p: float) -> Attention:
    def run(
        qkv_T3D: Tensor, layout: PackedLayout, impl: str, randomness: DropoutCounters | None
    ) -> Tensor:
        width = qkv_T3D.shape[1] // 3
        query_BD = qkv_T3D[layout.first_tokens_B.clamp(max=len(qkv_T3D) - 1), :width]
        key_value_T2D = qkv_T3D[:, width:]
        return first_token_attention(query_BD, key_value_T2D, layout, HEADS, p, randomness, 5, impl)

    return run


def inputs(lengths: list[int], filler: int, head_size: int) -> tuple[Tensor, Tensor]:
    """qkv_T3D and an upstream gradient for contexts, of some size in every row."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = sum(lengths) + filler
    qkv = torch.randn(rows, 3 * HEADS * head_size, generator=generator)
    return qkv, torch.randn(max(rows, len(lengths)), HEADS * head_size, generator=generator)


def differentiate(
    attention: Attention,
    qkv_T3D: Tensor,
    upstream: Tensor,
    layout: PackedLayout,
    impl: str,
    randomness: DropoutCounters | None,
) -> list[Tensor]:
    """[context, gradient of qkv]."""
    leaf = qkv_T3D.detach().clone().requires_grad_()
    context = attention(leaf, layout, impl, randomness)
    context.backward(upstream[: len(context)].to(context.dtype))
    assert leaf.grad is not None
    return [context.detach(), leaf.grad]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [all_tokens, first_tokens])
@pytest.mark.parametrize("head_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_context_and_gradients_are_within_twice_torchs_error_of_float64(
    device: torch.device,
    check_errors: CheckErrors,
    kind: Callable[[float], Attention],
    head_size: int,
    dtype: torch.dtype,
    p: float,
) -> None:
    lengths, filler = [17, 1, 50, 16], 20
    qkv, upstream = (x.to(device, dtype) for x in inputs(lengths, filler, head_size))
    layout, where = layout_of(lengths, device), counters_of(lengths, filler, device)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        return differentiate(kind(p), qkv.to(dtype), upstream.to(dtype), layout, impl, where)

    check_errors(run("triton", dtype), run("torch", dtype), run("torch", torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [all_tokens, first_tokens])
@pytest.mark.parametrize(("lengths", "filler"), MIXTURES)
def test_any_mixture_of_lengths_is_what_the_padded_form_computes(
    device: torch.device, kind: Callable[[float], Attention], lengths: list[int], filler: int
) -> None:
    qkv, upstream = (x.to(device, EXACT) for x in inputs(lengths, filler, 32))
    upstream[sum(lengths) :] = 0 if kind is all_tokens else upstream[sum(lengths) :]
    where = counters_of(lengths, filler, device)
    ours = differentiate(kind(0.2), qkv, upstream, layout_of(lengths, device), "triton", where)
    texts = [b for b, length in enumerate(lengths) if length]  # the padded form wants tokens
    some = layout_of([lengths[b] for b in texts], device)
    of_texts = upstream if kind is all_tokens else upstream[texts]
    theirs = differentiate(kind(0.2), qkv, of_texts, some, "torch", where)
    context = ours[0] if kind is all_tokens else ours[0][texts]
    torch.testing.assert_close(context, theirs[0], **CLOSE)
    torch.testing.assert_close(ours[1], theirs[1], **CLOSE)
    if kind is first_tokens:
        nothing = [b for b, length in enumerate(lengths) if not length]
        assert not ours[0][nothing].any(), "a text without tokens has no context"


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[*range(1, 44)], [*range(44, 87)], [*range(87, 129)]])
def test_every_length_up_to_128_has_the_padded_forms_context_and_gradient(
    device: torch.device, lengths: list[int]
) -> None:
    qkv, upstream = (x.to(device, EXACT) for x in inputs(lengths, 0, 32))
    layout, where = layout_of(lengths, device), counters_of(lengths, 0, device)
    for kind in (all_tokens, first_tokens):
        outcomes = [
            differentiate(kind(0.1), qkv, upstream, layout, impl, where)
            for impl in ("triton", "torch")
        ]
        torch.testing.assert_close(*outcomes, **CLOSE)


@pytest.mark.parametrize("kind", [all_tokens, first_tokens])
def test_filler_has_no_context_and_a_gradient_of_exactly_zero(
    device: torch.device, kind: Callable[[float], Attention]
) -> None:
    """Whatever lies in its memory, NaN too; more of it than a block has rows."""
    lengths, filler = [5, 20], 100
    qkv, upstream = (x.to(device, EXACT) for x in inputs(lengths, filler, 32))
    qkv[25:] = float("nan")
    where = counters_of(lengths, filler, device)
    context, gradient = differentiate(
        kind(0.1), qkv, upstream, layout_of(lengths, device), "triton", where
    )
    assert torch.isfinite(context).all()
    assert torch.isfinite(gradient).all()
    assert torch.equal(gradient[25:], torch.zeros_like(gradient[25:]))
    if kind is all_tokens:
        assert torch.equal(context[25:], torch.zeros_like(context[25:]))
    assert context[:2].any()


@pytest.mark.parametrize("kind", [all_tokens, first_tokens])
def test_a_text_has_the_same_mask_in_whatever_batch_it_comes(
    device: torch.device, kind: Callable[[float], Attention]
) -> None:
    """Beside longer texts, which make the block larger; at another place; with filler or without.

    With every score equal and key j's value the j-th unit vector, a context shows its mask.
    """

    def contexts(lengths: list[int], draws: list[int], filler: int) -> list[Tensor]:
        rows = sum(lengths) + filler
        where = counters_of(lengths, filler, device)
        qkv = torch.zeros(rows, 3, HEADS, 32, device=device, dtype=EXACT)
        qkv[:, 2] = torch.eye(32, device=device, dtype=EXACT)[where.positions_T.long() % 32][
            :, None
        ]
        qkv = qkv.flatten(1)
        of_text = torch.tensor(draws, dtype=torch.int32, device=device)
        where.draws_T[: sum(lengths)] = of_text.repeat_interleave(
            torch.tensor(lengths, device=device)
        )
        context = kind(0.5)(qkv, layout_of(lengths, device), "triton", where)
        pieces = lengths if kind is all_tokens else [1] * len(lengths)
        return list(context[: sum(pieces)].split(pieces))

    alone = contexts([13], [4], 0)[0]
    beside = contexts([100, 13, 40, 13], [9, 4, 2, 5], 7)
    torch.testing.assert_close(beside[1], alone)
    assert not torch.allclose(beside[3], alone), "another draw has another mask"
    assert 1 < len(alone.unique()) < 5, "keys that are kept and keys that are not"


def test_the_first_tokens_mask_is_the_first_row_of_the_full_attentions(
    device: torch.device,
) -> None:
    lengths = [9, 30, 2]
    qkv = inputs(lengths, 0, 32)[0].to(device, EXACT)
    layout, where = layout_of(lengths, device), counters_of(lengths, 0, device)
    full = all_tokens(0.4)(qkv, layout, "triton", where)[layout.first_tokens_B]
    torch.testing.assert_close(first_tokens(0.4)(qkv, layout, "triton", where), full)


@pytest.mark.parametrize("kind", [all_tokens, first_tokens])
def test_strided_inputs_and_a_repeated_backward_give_the_same(
    device: torch.device, kind: Callable[[float], Attention]
) -> None:
    lengths = [9, 4]
    qkv, upstream = (x.to(device, EXACT) for x in inputs(lengths, 0, 32))
    layout, where = layout_of(lengths, device), counters_of(lengths, 0, device)
    expected = differentiate(kind(0.2), qkv, upstream, layout, "triton", where)
    leaf = qkv.T.contiguous().T.requires_grad_()
    context = kind(0.2)(leaf, layout, "triton", where)
    strided = upstream[: len(context)].T.contiguous().T
    for times in (1, 2):
        context.backward(strided, retain_graph=True)
        assert leaf.grad is not None
        torch.testing.assert_close([context, leaf.grad], [expected[0], times * expected[1]])


@pytest.mark.slow
@pytest.mark.parametrize("first_only", [False, True])
def test_the_operators_pass_torchs_own_checks(device: torch.device, first_only: bool) -> None:
    lengths = [9, 4]
    query_TD, key_value_T2D = inputs(lengths, 3, 32)[0].to(device, EXACT).split([64, 128], dim=1)
    query = query_TD[: 2 if first_only else None].contiguous()
    key_value_T2D = key_value_T2D.contiguous()
    where = counters_of(lengths, 3, device)
    tensors = (layout_of(lengths, device).cu_seqlens, where.key, where.draws_T)
    rest = (query, key_value_T2D, *tensors, HEADS, 9, 0.1, 5, first_only)
    torch.library.opcheck(torch.ops.twostage.short_attention_forward.default, rest)
    gradients = (torch.zeros_like(query), torch.zeros_like(key_value_T2D))
    backward = torch.ops.twostage.short_attention_backward_.default
    torch.library.opcheck(backward, (*gradients, query.clone(), *rest))


@pytest.mark.parametrize(("length", "head_size"), [(129, 32), (20, 8)])
def test_longer_texts_and_other_heads_take_another_way_with_the_same_masks(
    device: torch.device, length: int, head_size: int
) -> None:
    """In fp32, which flash attention does not take, padded blocks."""
    lengths = [length, 3]
    qkv, upstream = (x.to(device) for x in inputs(lengths, 1, head_size))
    layout, where = layout_of(lengths, device), counters_of(lengths, 1, device)
    for kind in (all_tokens, first_tokens):
        outcomes = [
            differentiate(kind(0.1), qkv, upstream, layout, impl, where)
            for impl in ("triton", "torch")
        ]
        torch.testing.assert_close(*outcomes)


FLASH_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, "
    "SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, "
    "SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, "
    "Tensor? alibi_slopes=None"
)
FLASH_RESULTS = (
    "(Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, "
    "Tensor debug_attn_mask)"
)


def test_torchs_private_flash_attention_has_the_signature_that_we_call() -> None:
    """Torch 2.11's; 2.13 has two more arguments with defaults at the end."""
    schema = str(torch.ops.aten._flash_attention_forward.default._schema)
    arguments, results = schema.split(" -> ")
    assert arguments.startswith(f"aten::_flash_attention_forward({FLASH_ARGUMENTS}")
    rest = arguments.split(FLASH_ARGUMENTS)[1].strip(",) ").split(", ")
    assert all(argument.endswith("=None") for argument in rest if argument)
    assert results == FLASH_RESULTS
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has_kernel("aten::_flash_attention_forward", "Autograd"), "torch differentiates it"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
@pytest.mark.parametrize("kind", [all_tokens, first_tokens])
def test_flash_attention_of_long_texts_is_attention(
    device: torch.device, check_errors: CheckErrors, kind: Callable[[float], Attention]
) -> None:
    lengths, filler = [300, 5, 0, 129, 512], 60
    qkv, upstream = (x.to(device).bfloat16() for x in inputs(lengths, filler, 64))
    upstream[sum(lengths) :] = 0
    layout = layout_of(lengths, device)
    texts = [b for b, length in enumerate(lengths) if length]
    some = layout_of([lengths[b] for b in texts], device)

    def run(impl: str, dtype: torch.dtype) -> list[Tensor]:
        own = kind is all_tokens or impl == "triton"
        context, gradient = differentiate(
            kind(0.0),
            qkv.to(dtype),
            upstream if own else upstream[texts],
            layout if impl == "triton" else some,
            impl,
            None,
        )
        rows = slice(0, sum(lengths)) if kind is all_tokens else texts if own else slice(None)
        return [context[rows], gradient]

    ours = run("triton", torch.bfloat16)
    check_errors(ours, run("torch", torch.bfloat16), run("torch", torch.float64))
    assert not ours[1][sum(lengths) :].any(), "filler's gradient is exactly zero"


def test_what_draws_from_torchs_generator_can_be_made_to_draw_from_ours() -> None:
    own, expected = (torch.Generator().manual_seed(5) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.rand(4)
        torch.manual_seed(0)
        with drawing_from(own, torch.default_generator):
            drawn = torch.rand(4)
        with pytest.raises(KeyError), drawing_from(own, torch.default_generator):
            raise KeyError
        with drawing_from(None, torch.default_generator):
            assert torch.equal(torch.rand(2), theirs[:2])
        assert torch.equal(torch.rand(2), theirs[2:]), "as if nothing had been drawn in between"
    assert torch.equal(drawn, torch.rand(4, generator=expected))
    assert torch.equal(torch.rand(4, generator=own), torch.rand(4, generator=expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
def test_flash_attentions_masks_come_from_our_generator_and_leave_torchs_alone(
    device: torch.device,
) -> None:
    q, k, v = torch.randn(200, 3, 128, device=device, dtype=torch.bfloat16).unbind(1)
    both = (torch.tensor([0, 200], dtype=torch.int32, device=device),) * 2

    def run(generator: torch.Generator) -> Tensor:
        return flash_attention(q, k, v, both, (200, 200), HEADS, 0.1, generator)

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator(device).manual_seed(seed)

    torch.manual_seed(0)
    expected = torch.rand(3, device=device)
    torch.manual_seed(0)
    generator = seeded(1)
    first, second = run(generator), run(generator)
    assert torch.equal(torch.rand(3, device=device), expected)
    assert torch.equal(run(seeded(1)), first)
    assert not torch.equal(first, second), "a second call goes on where the first ended"
    assert not torch.equal(run(seeded(2)), first)
