"""Embedding sum + LayerNorm + dropout against torch's own, and the formula in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from twostage.kernels import embedding
from twostage.kernels.dropout import DropoutCounters
from twostage.kernels.embedding import embed_tokens, reference_embed_tokens

MakeCounters = Callable[[int], DropoutCounters]
CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]

NUM_WORDS, NUM_POSITIONS = 11, 9


Ids = tuple[Tensor, Tensor]
Leaves = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def random_inputs(tokens: int, features: int, device: torch.device) -> tuple[Ids, Leaves]:
    """((input ids, position ids), (tables and norm))."""
    generator = torch.Generator().manual_seed(tokens * 1_000 + features)
    words_T, positions_T = (
        torch.randint(n, (tokens,), generator=generator).to(device)
        for n in (NUM_WORDS, NUM_POSITIONS)
    )
    shapes = ((NUM_WORDS, features), (NUM_POSITIONS, features), *[(features,)] * 3)
    word_VD, position_LD, token_type_D, weight_D, bias_D = (
        torch.randn(shape, generator=generator).to(device) for shape in shapes
    )
    leaves = (word_VD, position_LD, token_type_D, 1 + 0.3 * weight_D, bias_D)
    return (words_T, positions_T), leaves


def run(
    function: Callable[..., Tensor],
    ids: Sequence[Tensor],
    leaves: Sequence[Tensor],
    dtype: torch.dtype,
    randomness: DropoutCounters | None,
    *,
    tables: torch.dtype = torch.float32,
    **more: Any,
) -> list[Tensor]:
    """Output and gradients; the upstream gradient is not of ones."""
    leaves = [t.detach().to(tables).requires_grad_() for t in leaves]
    eps = 1e-12 if leaves[3].numel() > 1 else 1e-5
    out_TD = function(*ids, *leaves, eps, dtype, 0.1, randomness, 2, **more)
    places = torch.arange(out_TD.numel(), device=out_TD.device).view(out_TD.shape)
    out_TD.backward((places * 0.7).cos().to(out_TD.dtype))
    return [out_TD.detach(), *(leaf.grad for leaf in leaves)]


def torchs(
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    word_VD: Tensor,
    position_LD: Tensor,
    token_type_D: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    *_: Any,
) -> Tensor:
    """As transformers' BertEmbeddings has it, without dropout."""
    embedded_TD = F.embedding(input_ids_T, word_VD) + token_type_D
    embedded_TD = embedded_TD + F.embedding(position_ids_T, position_LD)
    return F.layer_norm(embedded_TD, weight_D.shape, weight_D, bias_D, eps).to(dtype)


def test_the_torch_path_and_the_reference_are_embeddings_and_layer_norm() -> None:
    ids, leaves = random_inputs(30, 12, torch.device("cpu"))
    expected = run(torchs, ids, leaves, torch.float64, None, tables=torch.float64)
    for function in (embed_tokens, reference_embed_tokens):
        results = run(function, ids, leaves, torch.float64, None, tables=torch.float64)
        for ours, its in zip(results, expected, strict=True):
            torch.testing.assert_close(ours, its)


def test_a_sparse_gradient_names_the_words_that_occur() -> None:
    ids, leaves = random_inputs(30, 12, torch.device("cpu"))
    dense = run(embed_tokens, ids, leaves, torch.float32, None)[1]
    sparse = run(embed_tokens, ids, leaves, torch.float32, None, sparse=True)[1]
    assert sparse.is_sparse
    torch.testing.assert_close(sparse.to_dense(), dense)


class TestTriton:
    @pytest.mark.slow
    @pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 7), (50, 20), (9, 384), (2, 1_025)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("with_dropout", [True, False])
    def test_errors_are_those_of_torch(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        with_dropout: bool,
        device: torch.device,
        counters: MakeCounters,
        check_errors: CheckErrors,
    ) -> None:
        ids, leaves = random_inputs(*shape, device)
        where = counters(shape[0]) if with_dropout else None
        ours = run(embed_tokens, [i.int() for i in ids], leaves, dtype, where, impl="triton")
        plain = run(embed_tokens, ids, leaves, dtype, where, impl="torch")
        # Rounding the output is no part of the gradients' path in fp64.
        exact = run(reference_embed_tokens, ids, leaves, torch.float64, where, tables=torch.float64)
        check_errors(ours, plain, exact)

    def test_a_program_may_walk_over_many_blocks_of_tokens(
        self,
        device: torch.device,
        counters: MakeCounters,
        check_errors: CheckErrors,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(embedding, "BACKWARD_PROGRAMS", 2)
        ids, leaves = random_inputs(90, 20, device)  # six blocks, the last of them not full
        where = counters(90)
        ours = run(embed_tokens, ids, leaves, torch.float32, where, impl="triton")
        plain = run(embed_tokens, ids, leaves, torch.float32, where, impl="torch")
        exact = run(reference_embed_tokens, ids, leaves, torch.float64, where, tables=torch.float64)
        check_errors(ours, plain, exact)

    def test_filler_tokens_have_a_gradient_of_exactly_zero(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        ids, leaves = random_inputs(12, 20, device)
        ids[0][:8] += NUM_WORDS * (ids[0][:8] == 0)  # word 0 occurs as filler only
        ids[0].clamp_(max=NUM_WORDS - 1)
        for i in ids:
            i[8:] = 0
        for leaf in leaves:
            leaf.requires_grad_()
        out_TD = embed_tokens(
            *ids, *leaves, 1e-12, torch.bfloat16, 0.1, counters(12), impl="triton"
        )
        out_TD[:8].float().square().sum().backward()
        assert leaves[0].grad[0].abs().max() == 0
        assert leaves[0].grad.abs().max() > 0

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, as interpreter
    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("bad", [-1, NUM_WORDS, 2**31 - 1])
    def test_an_id_that_no_table_has_makes_its_row_nan_and_no_other(
        self, which: int, bad: int, device: torch.device
    ) -> None:
        ids, leaves = random_inputs(5, 20, device)
        ids[which][2] = bad
        out_TD = embed_tokens(*ids, *leaves, 1e-12, torch.float32, impl="triton")
        assert torch.isnan(out_TD).all(dim=1).tolist() == [False, False, True, False, False]
        assert not torch.isnan(out_TD[[0, 1, 3, 4]]).any()

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, as interpreter
    @pytest.mark.parametrize("which", [0, 1])
    @pytest.mark.parametrize("bad", [-1, NUM_WORDS, 2**31 - 1])
    def test_the_gradient_of_such_an_id_spoils_a_row_of_its_table_and_writes_beyond_none(
        self, which: int, bad: int, device: torch.device
    ) -> None:
        ids, leaves = random_inputs(5, 20, device)
        for i in ids:
            i.copy_(torch.tensor([1, 2, 3, 4, 5]))
        ids[which][2] = bad
        gradients = run(embed_tokens, ids, leaves, torch.float32, None, impl="triton")[1:3]
        spoilt = [torch.isnan(g).any(dim=1).nonzero().flatten().tolist() for g in gradients]
        assert spoilt[which] == [0 if bad < 0 else len(leaves[which]) - 1]
        assert spoilt[1 - which] == [3]

    @pytest.mark.parametrize("frozen", [0, 1])
    def test_a_frozen_table_costs_no_sum(self, frozen: int, device: torch.device) -> None:
        class Summed(TorchDispatchMode):
            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if func is torch.ops.aten.embedding_dense_backward.default:
                    rows.append(args[2])
                return func(*args, **(kwargs or {}))

        rows: list[int] = []
        ids, leaves = random_inputs(5, 20, device)
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(i != frozen)
        out_TD = embed_tokens(*ids, *leaves, 1e-12, torch.float32, impl="triton")
        with Summed():  # type: ignore[no-untyped-call]
            out_TD.sum().backward()
        assert rows == [(NUM_WORDS, NUM_POSITIONS)[1 - frozen]]
        assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(5)]

    def test_tables_and_upstream_need_not_be_contiguous(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        ids, leaves = random_inputs(6, 20, device)
        where = counters(6)
        expected = run(embed_tokens, ids, leaves, torch.float32, where, impl="triton")
        for leaf in leaves:
            leaf.requires_grad_()
        word_VD, position_LD = (leaf.t().contiguous().t() for leaf in leaves[:2])
        token_type_D, weight_D, bias_D = (leaf.repeat_interleave(2)[::2] for leaf in leaves[2:])
        words_T, positions_T = (i.repeat_interleave(2)[::2] for i in ids)
        tables = (word_VD, position_LD, token_type_D, weight_D, bias_D)
        out_TD = embed_tokens(
            words_T, positions_T, *tables, 1e-12, torch.float32, 0.1, where, 2, "triton"
        )
        upstream_TD = (torch.arange(120, device=device).view(6, 20) * 0.7).cos()
        out_TD.backward(upstream_TD.t().contiguous().t())
        results = [out_TD.detach(), *(leaf.grad for leaf in leaves)]
        for ours, its in zip(results, expected, strict=True):
            assert torch.equal(ours, its)

    def test_a_second_backward_adds_the_same_again(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        ids, leaves = random_inputs(6, 20, device)
        for leaf in leaves:
            leaf.requires_grad_()
        out_TD = embed_tokens(*ids, *leaves, 1e-12, torch.float32, 0.1, counters(6), impl="triton")
        out_TD.backward(out_TD.detach(), retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves]
        out_TD.backward(out_TD.detach())
        for leaf, first in zip(leaves, once, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * first)

    def test_no_tokens_give_no_rows_and_gradients_of_zero(self, device: torch.device) -> None:
        ids, leaves = random_inputs(0, 20, device)
        out_TD, *gradients = run(embed_tokens, ids, leaves, torch.float32, None, impl="triton")
        assert out_TD.shape == (0, 20)
        assert all(gradient.abs().sum() == 0 for gradient in gradients)

    def test_it_passes_torchs_own_checks_of_operators(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        ids, leaves = random_inputs(6, 20, device)
        where = counters(6)
        masks = (where.key, where.draws_T, where.positions_T)
        forward = torch.ops.twostage.embedding_forward.default
        torch.library.opcheck(forward, (*ids, *leaves, *masks, 1e-12, 0.1, 2, torch.bfloat16))
        out_TD, *statistics = forward(*ids, *leaves, *masks, 1e-12, 0.1, 2, torch.bfloat16)
        torch.library.opcheck(
            torch.ops.twostage.embedding_backward.default,
            (out_TD, *ids, *leaves[:4], *statistics, *masks, 0.1, 2),
        )

    def test_torch_compile_holds_it_whole(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        def function(*arguments: Any) -> Tensor:
            return embed_tokens(*arguments, impl="triton")  # type: ignore[misc]

        ids, leaves = random_inputs(6, 20, device)
        where = counters(6)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = [run(f, ids, leaves, torch.float32, where) for f in (compiled, function)]
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
