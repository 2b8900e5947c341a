"""Bias + GELU against torch's own, and against the formula in float64."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels.gelu import bias_gelu, reference_bias_gelu

CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


def random_inputs(rows: int, features: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows * 1_000 + features)
    x_TI = 2 * torch.randn(rows, features, generator=generator)
    return [x_TI.to(device), torch.randn(features, generator=generator).to(device)]


def run(
    function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, *more: str
) -> list[Tensor]:
    """Output and gradients, everything in `dtype`; the upstream gradient is not of ones."""
    x_TI, bias_I = (t.detach().to(dtype).requires_grad_() for t in inputs)
    y_TI = function(x_TI, bias_I, *more)
    places = torch.arange(y_TI.numel(), device=y_TI.device).view(y_TI.shape)
    y_TI.backward(places.cos().to(y_TI.dtype))
    return [y_TI.detach(), x_TI.grad, bias_I.grad]


def test_the_torch_path_and_the_reference_are_torchs_gelu() -> None:
    inputs = random_inputs(9, 20, torch.device("cpu"))
    expected = run(lambda x, bias: F.gelu(x + bias), inputs, torch.float64)
    for function in (bias_gelu, reference_bias_gelu):
        for ours, its in zip(run(function, inputs, torch.float64), expected, strict=True):
            torch.testing.assert_close(ours, its)


def test_by_hand() -> None:
    # Φ(1) = 0.8413447, φ(1) = 0.2419707
    x_TI = torch.tensor([[-1.0, 3.0]], requires_grad=True)
    y_TI = bias_gelu(x_TI, torch.tensor([2.0, -3.0]))
    y_TI.sum().backward()
    torch.testing.assert_close(y_TI.detach(), torch.tensor([[0.8413447, 0.0]]))
    torch.testing.assert_close(x_TI.grad, torch.tensor([[0.8413447 + 0.2419707, 0.5]]))


class TestTriton:
    @pytest.mark.parametrize(
        "shape", [(1, 1), (1, 8), (3, 7), (5, 256), (9, 300), (150, 40), (2, 3_072)]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_errors_are_those_of_torch(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        check_errors: CheckErrors,
    ) -> None:
        inputs = [t.to(dtype) for t in random_inputs(*shape, device)]
        ours = run(bias_gelu, inputs, dtype, "triton")
        torchs = run(lambda x, bias: F.gelu(x + bias), inputs, dtype)
        check_errors(ours, torchs, run(reference_bias_gelu, inputs, torch.float64))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_far_from_zero_it_is_the_identity_or_zero(
        self, dtype: torch.dtype, device: torch.device
    ) -> None:
        far_TI = torch.tensor([[-6e4, -1e4, -30.0, 30.0, 1e4, 6e4]], device=device, dtype=dtype)
        y_TI, dx_TI, _ = run(bias_gelu, [far_TI, torch.zeros_like(far_TI[0])], dtype, "triton")
        assert torch.equal(y_TI, far_TI.clamp(min=0))
        upstream_TI = torch.arange(6, device=device).cos().to(dtype)
        assert torch.equal(dx_TI[0], upstream_TI * (far_TI[0] > 0))

    def test_a_bias_in_fp32_beside_x_in_bf16_keeps_its_precision(
        self, device: torch.device
    ) -> None:
        x_TI = torch.zeros(300, 1, dtype=torch.bfloat16, device=device, requires_grad=True)
        bias_I = torch.tensor([30.01], device=device, requires_grad=True)
        y_TI = bias_gelu(x_TI, bias_I, "triton")
        y_TI.sum().backward()
        assert y_TI.dtype == torch.bfloat16
        assert bias_I.grad.tolist() == [300.0]

    def test_input_and_upstream_need_not_be_contiguous(self, device: torch.device) -> None:
        inputs = random_inputs(6, 40, device)
        expected = run(bias_gelu, inputs, torch.float32, "triton")
        x_TI, bias_I = (t.detach().requires_grad_() for t in inputs)
        spread_TI = x_TI.t().contiguous().t()
        y_TI = bias_gelu(spread_TI, bias_I.repeat_interleave(2)[::2], "triton")
        upstream_TI = torch.arange(240, device=device).view(6, 40).cos()
        y_TI.backward(upstream_TI.t().contiguous().t())
        for ours, its in zip([y_TI.detach(), x_TI.grad, bias_I.grad], expected, strict=True):
            assert torch.equal(ours, its)

    def test_a_second_backward_adds_the_same_again(self, device: torch.device) -> None:
        leaves = x_TI, bias_I = [t.requires_grad_() for t in random_inputs(6, 40, device)]
        y_TI = bias_gelu(x_TI, bias_I, "triton")
        y_TI.backward(y_TI.detach(), retain_graph=True)
        once = [leaf.grad.clone() for leaf in leaves]
        y_TI.backward(y_TI.detach())
        for leaf, first in zip(leaves, once, strict=True):
            assert torch.equal(leaf.grad, 2 * first)

    def test_no_rows_give_no_rows_and_a_bias_gradient_of_zero(self, device: torch.device) -> None:
        y_TI, dx_TI, dbias_I = run(bias_gelu, random_inputs(0, 5, device), torch.float32, "triton")
        assert y_TI.shape == dx_TI.shape == (0, 5)
        assert dbias_I.tolist() == [0.0] * 5

    def test_it_passes_torchs_own_checks_of_operators(self, device: torch.device) -> None:
        x_TI, bias_I = random_inputs(5, 12, device)
        torch.library.opcheck(torch.ops.twostage.bias_gelu_forward.default, (x_TI, bias_I))
        backward = torch.ops.twostage.bias_gelu_backward.default
        torch.library.opcheck(backward, (x_TI, x_TI, bias_I))

    def test_torch_compile_holds_it_whole(self, device: torch.device) -> None:
        def function(x_TI: Tensor, bias_I: Tensor) -> Tensor:
            return bias_gelu(x_TI.sin(), bias_I, "triton")

        inputs = random_inputs(5, 12, device)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        results = [run(f, inputs, torch.float32) for f in (compiled, function)]
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
