"""Dropout + residual + layer norm against its parts, and in bf16 against fp64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels.residual_norm import (
    dropout_residual_norm,
    reference_dropout_residual_norm,
)


def random_inputs(rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """x, residual, weight, bias."""
    generator = torch.Generator().manual_seed(rows + width)
    shapes = [(rows, width), (rows, width), (width,), (width,)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (64, 48), (0, 5)])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_value_and_gradients_are_those_of_its_parts(rows: int, width: int, p: float) -> None:
    leaves = random_inputs(rows, width, torch.float64)
    outcomes = []
    for operation in (dropout_residual_norm, reference_dropout_residual_norm):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        out = operation(*inputs, 1e-12, p, torch.Generator().manual_seed(3))
        (out * torch.linspace(-1, 2, out.numel()).view_as(out)).sum().backward()
        outcomes.append([out, *(leaf.grad for leaf in inputs)])
    for ours, reference in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, reference)


def test_in_bf16_the_statistics_are_fp32() -> None:
    """Error against fp64 at most twice that of torch's layer norm on the same sum in fp32."""
    x, residual, weight, bias = random_inputs(256, 384, torch.float32)
    upstream = torch.randn(256, 384, generator=torch.Generator().manual_seed(0)).bfloat16()
    x, residual = x.bfloat16(), (8 + residual).bfloat16()  # a mean that bf16 would round badly

    def run(dtype: torch.dtype, operation: str) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, residual)]
        leaves += [
            t.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
            for t in (weight, bias)
        ]
        if operation == "ours":
            out = dropout_residual_norm(*leaves, 1e-12, 0.1, torch.Generator().manual_seed(1))
        elif operation == "reference":
            out = reference_dropout_residual_norm(
                *leaves, 1e-12, 0.1, torch.Generator().manual_seed(1)
            )
        else:  # fp32 between bf16 ends
            wide = [leaf.float() for leaf in leaves]
            out = reference_dropout_residual_norm(
                *wide, 1e-12, 0.1, torch.Generator().manual_seed(1)
            ).to(dtype)
        out.backward(upstream.to(dtype))
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    exact = run(torch.float64, "reference")
    for ours, wide, truth in zip(
        run(torch.bfloat16, "ours"), run(torch.bfloat16, "wide"), exact, strict=True
    ):
        error, allowed = ((t.double() - truth).norm() / truth.norm() for t in (ours, wide))
        # The floor: here h itself is rounded to bf16, which the wide form never does.
        assert error <= 2 * allowed + 2**-7


def test_without_a_generator_it_is_layer_norm_of_the_sum() -> None:
    x, residual, weight, bias = random_inputs(5, 12, torch.float32)
    out = dropout_residual_norm(x, residual, weight, bias, 1e-12, 0.5)
    assert torch.equal(out, F.layer_norm(x + residual, (12,), weight, bias, 1e-12))
