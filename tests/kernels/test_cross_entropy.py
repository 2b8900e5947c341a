"""The fused loss against torch's own and the formula in `training/losses.py`, in float64 too."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels import cross_entropy
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.training.losses import ldam

CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]

SHAPES = [(1, 2), (16, 2), (7, 3), (33, 52), (5, 1000), (3, 1)]


def specification(
    logits_BC: Tensor,
    labels_B: Tensor,
    weights_C: Tensor | None = None,
    margins_C: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """The formula in `training/losses.py`, differentiated by autograd."""
    margins_C = logits_BC.new_zeros(logits_BC.shape[1]) if margins_C is None else margins_C
    return ldam(logits_BC, labels_B, margins_C, weights_C, scale)


def random_inputs(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sum(shape))
    batch, classes = shape
    logits_BC = (3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    labels_B = torch.randint(classes, (batch,), generator=generator)
    weights_C = 0.1 + torch.rand(classes, generator=generator, dtype=torch.float64)
    margins_C = 0.5 * torch.rand(classes, generator=generator, dtype=torch.float64)
    return logits_BC, labels_B, weights_C, margins_C


def test_two_rows_by_hand() -> None:
    # Row 0: logits (ln 3, 0), label 1, margin 0, scale 1: p = (3/4, 1/4), loss ln 4.
    # Row 1: logits (0, ln 2) with margin ln 2 on label 1 gives (0, 0): p = (1/2, 1/2), loss ln 2.
    logits_BC = torch.tensor([[math.log(3), math.log(2)], [0.0, math.log(2)]], requires_grad=True)
    weights_C, margins_C = torch.tensor([1.0, 3.0]), torch.tensor([0.0, math.log(2)])
    loss = fused_cross_entropy(logits_BC, torch.tensor([1, 1]), weights_C, margins_C)
    loss.backward()
    assert loss.item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    torch.testing.assert_close(
        logits_BC.grad, torch.tensor([[0.75 / 2, -0.75 / 2], [0.5 / 2, -0.5 / 2]])
    )


def test_weights_and_scale_by_hand() -> None:
    # Scale 2 on (ln 2 / 2, 0) gives (ln 2, 0): p = (2/3, 1/3). Losses ln 1.5 (label 0), ln 3 (1).
    logits_BC = torch.tensor([[math.log(2) / 2, 0.0]] * 2, requires_grad=True)
    loss = fused_cross_entropy(
        logits_BC, torch.tensor([0, 1]), torch.tensor([1.0, 4.0]), None, scale=2.0
    )
    loss.backward()
    assert loss.item() == pytest.approx((math.log(1.5) + 4 * math.log(3)) / 5)
    expected = [
        [2 / 5 * (2 / 3 - 1), 2 / 5 * (1 / 3)],
        [8 / 5 * (2 / 3), 8 / 5 * (1 / 3 - 1)],
    ]
    torch.testing.assert_close(logits_BC.grad, torch.tensor(expected))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_without_margin_and_scale_it_is_torchs_cross_entropy(
    shape: tuple[int, int], weighted: bool
) -> None:
    logits_BC, labels_B, weights_C, _ = random_inputs(shape, torch.float64)
    weight = weights_C if weighted else None
    ours_BC, theirs_BC = (logits_BC.clone().requires_grad_() for _ in range(2))
    ours = fused_cross_entropy(ours_BC, labels_B, weight)
    theirs = F.cross_entropy(theirs_BC, labels_B, weight)
    (3 * ours).backward()
    (3 * theirs).backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_BC.grad, theirs_BC.grad)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_float64_is_at_most_twice_that_of_the_reference(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    logits_BC, labels_B, weights_C, margins_C = random_inputs(shape, dtype)

    def run(function: object, logits_BC: Tensor) -> tuple[Tensor, Tensor]:
        logits_BC = logits_BC.clone().requires_grad_()
        loss = function(logits_BC, labels_B, weights_C, margins_C, 1.7)  # type: ignore[operator]
        loss.backward()
        return loss.detach().double(), logits_BC.grad.double()

    exact = run(specification, logits_BC.double())
    reference = run(specification, logits_BC)
    fused = run(fused_cross_entropy, logits_BC)
    assert fused_cross_entropy(logits_BC, labels_B, weights_C).dtype == torch.float32
    for ours, plain, true in zip(fused, reference, exact, strict=True):
        floor = 1e-6 * max(1.0, true.norm().item())
        assert (ours - true).norm() <= 2 * (plain - true).norm() + floor


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_are_to_be_ignored_are_left_out_as_torch_does(
    device: torch.device, weighted: bool, impl: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 3, generator=generator).to(device)
    labels = torch.tensor([0, -100, 2, 1, -100, 2], device=device)
    weights = torch.tensor([0.2, 1.0, 3.0], device=device) if weighted else None
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    loss = fused_cross_entropy(ours, labels, weights, torch.zeros(3, device=device), impl=impl)
    expected = F.cross_entropy(theirs, labels, weights)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert not ours.grad[labels < 0].any()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_margin", [False, True])
def test_gradcheck(weighted: bool, with_margin: bool) -> None:
    logits_BC, labels_B, weights_C, margins_C = random_inputs((6, 4), torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: fused_cross_entropy(
            x, labels_B, weights_C if weighted else None, margins_C if with_margin else None, 2.5
        ),
        logits_BC.requires_grad_(),
    )


def test_the_callers_logits_are_untouched_and_backward_may_be_repeated() -> None:
    logits_BC, labels_B, weights_C, margins_C = random_inputs((4, 3), torch.float32)
    before = logits_BC.clone()
    logits_BC.requires_grad_()
    loss = fused_cross_entropy(logits_BC, labels_B, weights_C, margins_C, 2.0)
    (first,) = torch.autograd.grad(loss, logits_BC, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits_BC, grad_outputs=torch.tensor(2.0))
    assert torch.equal(logits_BC.detach(), before)
    torch.testing.assert_close(second, 2 * first)


def test_huge_logits_give_finite_loss_and_gradient() -> None:
    logits_BC = torch.tensor([[3e4, -3e4], [-3e4, 3e4]], requires_grad=True)
    loss = fused_cross_entropy(logits_BC, torch.tensor([1, 1]))
    loss.backward()
    assert loss.item() == pytest.approx(3e4)
    torch.testing.assert_close(logits_BC.grad, torch.tensor([[0.5, -0.5], [0.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_lose_nothing_on_the_way_to_the_loss(dtype: torch.dtype) -> None:
    logits_BC, labels_B, weights_C, margins_C = random_inputs((64, 10), dtype)
    exact = specification(logits_BC.double(), labels_B, weights_C, margins_C, 1.7)
    for function in (fused_cross_entropy, specification):
        loss = function(logits_BC, labels_B, weights_C, margins_C, 1.7)
        assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


def test_a_loss_scale_brings_tiny_gradients_through_fp16() -> None:
    logits_BC, labels_B, *_ = random_inputs((4_096, 2), torch.float16)
    # p is about 0.002 and each gradient p / 4096: a few of the smallest steps that fp16 has.
    logits_BC = logits_BC / 3 + torch.tensor([3.0, -3.0], dtype=torch.float16)
    scaled_BC = logits_BC.clone().requires_grad_()
    (fused_cross_entropy(scaled_BC, labels_B) * 65_536).backward()
    exact_BC = logits_BC.double().requires_grad_()
    (F.cross_entropy(exact_BC, labels_B) * 65_536).backward()
    assert torch.isfinite(scaled_BC.grad).all()
    torch.testing.assert_close(scaled_BC.grad.double(), exact_BC.grad, rtol=1e-3, atol=2e-6)


def test_without_grad_mode_no_gradient_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_BC, labels_B, *_ = random_inputs((4, 3), torch.float32)
    monkeypatch.setattr(Tensor, "exp_", lambda self: pytest.fail("computed a gradient"))
    with torch.no_grad():
        loss = fused_cross_entropy(logits_BC.requires_grad_(), labels_B)
    assert not loss.requires_grad


def test_non_contiguous_logits() -> None:
    logits_BC, labels_B, weights_C, _ = random_inputs((6, 4), torch.float64)
    torch.testing.assert_close(
        fused_cross_entropy(logits_BC.t().contiguous().t(), labels_B, weights_C),
        F.cross_entropy(logits_BC, labels_B, weights_C),
    )


def run(
    function: Callable[..., Tensor], logits_BC: Tensor, *arguments: Any, upstream: float = 3.0
) -> list[Tensor]:
    """Loss and gradient; a loss scale is upstream of both."""
    logits_BC = logits_BC.detach().requires_grad_()
    loss = function(logits_BC, *arguments)
    (upstream * loss).backward()
    return [loss.detach(), logits_BC.grad]


class TestTriton:
    @pytest.mark.slow
    @pytest.mark.parametrize("shape", [*SHAPES, (300, 2), (130, 9), (2, 1_001)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", ["plain", "weighted", "ldam"])
    def test_errors_are_those_of_torch(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        kind: str,
        device: torch.device,
        check_errors: CheckErrors,
    ) -> None:
        logits_BC, labels_B, weights_C, margins_C = (
            t.to(device) for t in random_inputs(shape, dtype)
        )
        settings: dict[str, tuple[Any, ...]] = {
            "plain": (labels_B,),
            "weighted": (labels_B.int(), weights_C.float(), None, 1.0),
            "ldam": (labels_B, weights_C, margins_C.float(), 1.7),
        }
        mine = [*settings[kind], *(None, None, 1.0)[len(settings[kind]) - 1 :], "triton"]
        theirs = [labels_B, *settings[kind][1:]]
        check_errors(
            run(fused_cross_entropy, logits_BC, *mine),
            run(specification, logits_BC, *theirs),
            run(specification, logits_BC.double(), *theirs),
        )

    def test_the_sum_over_programs_may_take_several_blocks(
        self, device: torch.device, check_errors: CheckErrors, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(cross_entropy, "BLOCK", 4)  # of five programs, a row each
        logits_BC, labels_B, weights_C, _ = (
            t.to(device) for t in random_inputs((5, 600), torch.float32)
        )
        ours = (labels_B, weights_C, None, 1.0, "triton")
        check_errors(
            run(fused_cross_entropy, logits_BC, *ours),
            run(specification, logits_BC, labels_B, weights_C),
            run(specification, logits_BC.double(), labels_B, weights_C),
        )

    def test_huge_logits_and_logits_of_minus_infinity_are_as_in_torch(
        self, device: torch.device
    ) -> None:
        infinite = float("-inf")
        logits_BC = torch.tensor(
            [[3e4, -3e4, 0.0], [1.0, infinite, 2.0], [infinite, 5.0, infinite]], device=device
        )
        labels_B = torch.tensor([1, 2, 1], device=device)
        ours = run(fused_cross_entropy, logits_BC, labels_B, None, None, 1.0, "triton")
        torchs = run(F.cross_entropy, logits_BC, labels_B)
        for our, its in zip(ours, torchs, strict=True):
            torch.testing.assert_close(our, its)

    def test_strided_inputs_and_a_repeated_backward_give_the_same(
        self, device: torch.device
    ) -> None:
        logits_BC, labels_B, weights_C, margins_C = (
            t.to(device) for t in random_inputs((6, 4), torch.float32)
        )
        expected = run(
            fused_cross_entropy, logits_BC, labels_B, weights_C, margins_C, 2.0, "triton"
        )
        labels_B, weights_C, margins_C = (
            t.repeat_interleave(2)[::2] for t in (labels_B, weights_C, margins_C)
        )
        leaf = logits_BC.t().contiguous().t().requires_grad_()
        loss = fused_cross_entropy(leaf, labels_B, weights_C, margins_C, 2.0, "triton")
        for times in (1, 2):
            (3 * loss).backward(retain_graph=True)
            torch.testing.assert_close(leaf.grad, times * expected[1])
        assert torch.equal(loss.detach(), expected[0])

    @pytest.mark.parametrize("label", [-1, 3, 2**40])
    def test_a_label_that_is_no_class_makes_the_loss_nan(
        self, label: int, device: torch.device
    ) -> None:
        logits_BC = torch.zeros(4, 3, device=device)
        labels_B = torch.tensor([0, 1, label, 2], device=device)
        weights_C = torch.ones(3, device=device)
        for weights in (None, weights_C):
            loss = fused_cross_entropy(logits_BC, labels_B, weights, weights_C, 1.0, "triton")
            assert torch.isnan(loss)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_no_rows_are_what_they_are_in_torch(self, weighted: bool, device: torch.device) -> None:
        weights_C = torch.ones(3, device=device) if weighted else None
        labels_B = torch.zeros(0, dtype=torch.long, device=device)
        results = [
            run(fused_cross_entropy, torch.zeros(0, 3, device=device), labels_B, weights_C, *more)
            for more in ((), (None, 1.0, "triton"))
        ]
        for ours, expected in zip(*results, strict=True):
            assert torch.equal(ours, expected)

    def test_too_many_classes_and_fp64_are_refused(self, device: torch.device) -> None:
        labels_B = torch.zeros(1, dtype=torch.long, device=device)
        with pytest.raises(ValueError, match="8193 classes; the Triton loss takes 8192 at most"):
            fused_cross_entropy(torch.zeros(1, 8_193, device=device), labels_B, impl="triton")
        with pytest.raises(RuntimeError, match="the input is fp64"):
            fused_cross_entropy(torch.zeros(1, 2, device=device).double(), labels_B, impl="triton")
        with pytest.raises(ValueError, match="impl is 'fast'; expected one of auto, torch, triton"):
            fused_cross_entropy(torch.zeros(1, 2, device=device), labels_B, impl="fast")

    @pytest.mark.parametrize("with_gradient", [False, True])
    def test_it_passes_torchs_own_checks_of_operators(
        self, with_gradient: bool, device: torch.device
    ) -> None:
        logits_BC, labels_B, weights_C, margins_C = (
            t.to(device) for t in random_inputs((6, 4), torch.float32)
        )
        forward = torch.ops.twostage.cross_entropy_forward.default
        for extra in ((None, None), (weights_C, margins_C)):
            arguments = (logits_BC, labels_B, *extra, 2.0, with_gradient)
            torch.library.opcheck(forward, arguments)
        one = torch.ones((), device=device)
        backward = torch.ops.twostage.cross_entropy_backward.default
        torch.library.opcheck(backward, (logits_BC, one, one, torch.bfloat16))

    @pytest.mark.slow
    def test_torch_compile_holds_it_whole(self, device: torch.device) -> None:
        logits_BC, labels_B, weights_C, _ = (
            t.to(device) for t in random_inputs((6, 4), torch.float32)
        )

        def loss(logits_BC: Tensor) -> Tensor:
            return fused_cross_entropy(logits_BC.sin(), labels_B, weights_C, impl="triton")

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(run(compiled, logits_BC), run(loss, logits_BC), strict=True):
            torch.testing.assert_close(ours, eager)
