"""Dropout + residual + LayerNorm against the reference that autograd differentiates, in fp64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels import residual_norm
from twostage.kernels.dropout import DropoutCounters, Randomness, dropout_mask
from twostage.kernels.residual_norm import dropout_residual_norm, reference_dropout_residual_norm

MakeCounters = Callable[[int], DropoutCounters]
CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]

SHAPES = [(1, 1), (1, 8), (3, 7), (37, 20), (64, 384), (5, 768), (2, 1_025)]


def random_inputs(
    rows: int, features: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1_000 + features)
    x, residual, weight, bias = (
        torch.randn(shape, generator=generator)
        for shape in ((rows, features), (rows, features), (features,), (features,))
    )
    inputs = x.to(dtype), residual.to(dtype), 1 + 0.3 * weight, 0.1 * bias
    x, residual, weight, bias = (t.to(device).requires_grad_() for t in inputs)
    return x, residual, weight, bias


def run(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    randomness: Randomness | None,
    **more: str,
) -> list[Tensor]:
    """Output and gradients, everything in `dtype`; the upstream gradient is not of ones."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    if more.get("impl") == "triton":  # whose norm weights may be of any dtype
        leaves[2:] = [t.detach().float().requires_grad_() for t in inputs[2:]]
    eps = 1e-12 if leaves[2].numel() > 1 else 1e-5  # of one feature, fp16 has no 1/√1e-12
    out = function(*leaves, eps, 0.1, randomness, site=3, **more)
    generator = torch.Generator().manual_seed(5)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


class TestTorch:
    @pytest.mark.parametrize(("rows", "features"), SHAPES)
    def test_values_and_gradients_are_those_of_the_plain_formula(
        self, rows: int, features: int
    ) -> None:
        results = [
            run(
                function,
                random_inputs(rows, features, torch.float64),
                torch.float64,
                torch.Generator().manual_seed(1),
            )
            for function in (dropout_residual_norm, reference_dropout_residual_norm)
        ]
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-9)

    def test_bf16_inputs_are_as_exact_as_torch_on_fp32_between_bf16_ends(self) -> None:
        inputs = random_inputs(64, 384, torch.bfloat16)

        def run_one(dtype: torch.dtype, kind: str) -> list[Tensor]:
            leaves = [t.detach().to(dtype).requires_grad_() for t in inputs[:2]]
            leaves += [t.detach().float().requires_grad_() for t in inputs[2:]]
            if dtype == torch.float64:
                leaves[2:] = [t.detach().double().requires_grad_() for t in inputs[2:]]
            generator = torch.Generator().manual_seed(1)
            if kind == "ours":
                x, residual, weight, bias = leaves
                out = dropout_residual_norm(x, residual, weight, bias, 1e-12, 0.1, generator)
            else:  # fp32 between bf16 ends
                x, residual, weight, bias = (
                    t if dtype == torch.float64 else t.float() for t in leaves
                )
                out = reference_dropout_residual_norm(
                    x, residual, weight, bias, 1e-12, 0.1, generator
                ).to(dtype)
            out.backward(torch.ones_like(out) + 0.5 * inputs[0].detach().to(dtype))
            return [out.detach(), *(leaf.grad for leaf in leaves)]

        exact = run_one(torch.float64, "wide")
        for ours, wide, truth in zip(
            run_one(torch.bfloat16, "ours"), run_one(torch.bfloat16, "wide"), exact, strict=True
        ):
            error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (ours, wide))
            # The floor: here h itself is rounded to bf16, which the wide form never does.
            assert error <= 2 * allowed + 2**-7

    def test_without_randomness_it_is_layer_norm_of_the_sum(self) -> None:
        x, residual, weight, bias = random_inputs(5, 12, torch.float32)
        out = dropout_residual_norm(x, residual, weight, bias, 1e-12, 0.5)
        assert torch.equal(out, F.layer_norm(x + residual, (12,), weight, bias, 1e-12))


class TestTriton:
    @pytest.mark.slow
    @pytest.mark.parametrize(("rows", "features"), SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("with_dropout", [True, False])
    def test_errors_are_those_of_torch(
        self,
        rows: int,
        features: int,
        dtype: torch.dtype,
        with_dropout: bool,
        device: torch.device,
        counters: MakeCounters,
        check_errors: CheckErrors,
    ) -> None:
        inputs = random_inputs(rows, features, dtype, device)
        randomness = counters(rows) if with_dropout else None
        ours = run(dropout_residual_norm, inputs, dtype, randomness, impl="triton")
        torchs = run(reference_dropout_residual_norm, inputs, dtype, randomness)
        exact = run(reference_dropout_residual_norm, inputs, torch.float64, randomness)
        torchs[3:] = [t.float() for t in torchs[3:]]
        check_errors(ours, torchs, exact)

    def test_a_program_may_walk_over_many_blocks_of_rows(
        self,
        device: torch.device,
        counters: MakeCounters,
        check_errors: CheckErrors,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(residual_norm, "BACKWARD_PROGRAMS", 2)
        inputs = random_inputs(90, 20, torch.float32, device)  # six blocks, the last not full
        where = counters(90)
        ours = run(dropout_residual_norm, inputs, torch.float32, where, impl="triton")
        torchs = run(reference_dropout_residual_norm, inputs, torch.float32, where)
        exact = run(reference_dropout_residual_norm, inputs, torch.float64, where)
        check_errors(ours, torchs, exact)

    def test_rows_far_from_zero_keep_their_spread(
        self, device: torch.device, check_errors: CheckErrors
    ) -> None:
        inputs = [*random_inputs(9, 384, torch.float32, device)]
        inputs[1] = inputs[1].detach() + 4_000  # a one-pass variance would be 0 here, or negative
        functions = (dropout_residual_norm, reference_dropout_residual_norm)
        ours = run(functions[0], inputs, torch.float32, None, impl="triton")
        torchs = run(functions[1], inputs, torch.float32, None)
        check_errors(ours, torchs, run(functions[1], inputs, torch.float64, None))

    @pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, as interpreter
    def test_a_row_that_is_not_finite_spoils_no_other(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        x, residual, weight, bias = random_inputs(8, 40, torch.float32, device)
        with torch.no_grad():
            residual[3, 5], residual[6, 1] = float("inf"), float("nan")
        out = dropout_residual_norm(
            x, residual, weight, bias, 1e-12, 0.1, counters(8), impl="triton"
        )
        finite_T = torch.isfinite(out).all(dim=1)
        assert finite_T.tolist() == [row not in (3, 6) for row in range(8)]

    def test_input_and_upstream_need_not_be_contiguous(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        def gradients(spread: bool) -> list[Tensor]:
            leaves = random_inputs(6, 40, torch.float32, device)
            x, residual = (leaves[i].t().contiguous().t() if spread else leaves[i] for i in (0, 1))
            out = dropout_residual_norm(
                x, residual, *leaves[2:], 1e-12, 0.1, counters(6), impl="triton"
            )
            upstream = torch.arange(240.0, device=device).view(6, 40).cos()
            out.backward(upstream.t().contiguous().t() if spread else upstream)
            return [out.detach(), *(leaf.grad for leaf in leaves)]

        for apart, side_by_side in zip(gradients(True), gradients(False), strict=True):
            assert torch.equal(apart, side_by_side)

    def test_a_second_backward_adds_the_same_again(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        leaves = random_inputs(9, 40, torch.float32, device)
        out = dropout_residual_norm(*leaves, 1e-12, 0.1, counters(9), impl="triton")
        upstream = torch.arange(360.0, device=device).view(9, 40).sin()
        out.backward(upstream, retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves]
        out.backward(upstream)
        for leaf, first in zip(leaves, once, strict=True):
            assert torch.equal(leaf.grad, 2 * first)

    def test_no_rows_give_no_rows_and_gradients_of_zero(self, device: torch.device) -> None:
        leaves = random_inputs(0, 12, torch.float32, device)
        out = dropout_residual_norm(*leaves, 1e-12, impl="triton")
        out.sum().backward()
        assert out.shape == (0, 12)
        assert leaves[2].grad.tolist() == [0.0] * 12

    def test_it_passes_torchs_own_checks_of_operators(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        x, *_ = tensors = [t.detach() for t in random_inputs(5, 12, torch.float32, device)]
        where = counters(5)
        masks = (where.key, where.draws_T, where.positions_T)
        torch.library.opcheck(
            torch.ops.twostage.residual_norm_forward.default, (*tensors, *masks, 1e-12, 0.1, 3)
        )
        rows = (x.mean(1), x.std(1))
        torch.library.opcheck(
            torch.ops.twostage.residual_norm_backward.default,
            (x, *tensors[:3], *rows, *masks, 0.1, 3),
        )

    def test_torch_compile_holds_it_whole(
        self, device: torch.device, counters: MakeCounters
    ) -> None:
        where = counters(5)

        def loss(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            normed_TD = dropout_residual_norm(
                x, residual, weight, bias, 1e-12, 0.1, where, 3, impl="triton"
            )
            return (normed_TD * normed_TD.detach().sin()).sum()

        results = []
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
            leaves = random_inputs(5, 12, torch.float32, device)
            out = function(*leaves)
            out.backward()
            results.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(eager, compiled)

    def test_a_generator_is_refused(self, device: torch.device) -> None:
        leaves = random_inputs(3, 12, torch.float32, device)
        with pytest.raises(TypeError, match="DropoutCounters"):
            dropout_residual_norm(*leaves, 1e-12, 0.1, torch.Generator(device), impl="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_torch_the_sum_before_the_norm_is_rounded_once(dtype: torch.dtype) -> None:
    """With 1 / (1 - p) rounded to 16 bits, every kept feature would be off by the same factor."""
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(300, 64, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    weight, bias = torch.ones(64), torch.zeros(64)
    seeded = torch.Generator().manual_seed(1)
    ours = dropout_residual_norm(x, residual, weight, bias, 1e-12, 0.1, seeded)
    mask, scale = dropout_mask(x.shape, 0.1, torch.Generator().manual_seed(1), dtype)
    exact = residual.double() + x.detach().double() * mask.double() * scale
    expected = F.layer_norm(exact.to(dtype), (64,), weight, bias, 1e-12)
    assert (ours != expected).float().mean() < 0.005, "fp32 first: a tie may fall to either side"
    leaf = exact.to(dtype).requires_grad_()
    upstream = torch.randn(300, 64, generator=generator).to(dtype)
    F.layer_norm(leaf, (64,), weight, bias, 1e-12).backward(upstream)
    ours.backward(upstream)
    expected = (leaf.grad.double() * mask.double() * scale).to(dtype)
    assert (x.grad != expected).float().mean() < 0.005
