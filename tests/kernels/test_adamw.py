"""AdamW over flat buffers against torch's own optimizer, and against the formula in float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from twostage.kernels.adamw import adamw_
from twostage.training import optim

CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


def random_buffers(count: int, device: torch.device, *, new: bool = False) -> list[Tensor]:
    """Weights, gradients and both moments; `new`: moments that are 0."""
    generator = torch.Generator().manual_seed(count)
    w, g, m, v = (torch.randn(count, generator=generator) for _ in range(4))
    moments = [0 * m, 0 * v] if new else [0.1 * m, 0.1 * v.abs()]
    return [t.to(device) for t in (w, g, *moments)]


def specification(
    weights_P: Tensor,
    gradients_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    update: Tensor,
    learning_rate: Tensor,
    divisor: Tensor,
    skip: Tensor,
    rounded_P: Tensor | None = None,
) -> None:
    """The formula in `training/optim.py`, in the weights' precision."""
    assert not skip
    g_P = gradients_P.to(weights_P.dtype) / divisor
    moments = (exp_avg_P, exp_avg_sq_P)
    optim.adamw_(weights_P, g_P, *moments, int(update), float(learning_rate))
    if rounded_P is not None:
        rounded_P.copy_(weights_P)


def run(
    function: Callable[..., None],
    buffers: list[Tensor],
    update: float,
    *,
    dtype: torch.dtype = torch.float32,
    gradient: torch.dtype = torch.float32,
    rate: float = 1e-3,
    divisor: float = 2.5,
    skip: float = 0.0,
    rounded: torch.dtype | None = None,
    **more: Any,
) -> list[Tensor]:
    """Weights, moments and the rounded copy after one update. dtype: of weights and moments."""
    w, g, m, v = (t.to(dtype, copy=True) for t in buffers)
    g = buffers[1].to(gradient, copy=True)
    if dtype == torch.float64:
        g = g.double()
    scalars = [torch.tensor(x, device=w.device) for x in (update, rate, divisor, skip)]
    scalars[1] = scalars[1].new_tensor(rate, dtype=torch.float64)
    rounded_P = None if rounded is None else torch.full_like(w, 7.0, dtype=rounded)
    function(w, g, m, v, *scalars, rounded_P=rounded_P, **more)
    return [w, m, v] if rounded_P is None else [w, m, v, rounded_P]


def test_by_hand() -> None:
    # First update of a new optimizer: m / (1 - β1) = g, √(v / (1 - β2)) = |g|: w moves by the rate.
    buffers = [torch.tensor(x) for x in ([1.0, -2.0, 3.0], [0.5, -4.0, 0.0], [0.0] * 3, [0.0] * 3)]
    w, m, v = run(adamw_, buffers, 1.0, rate=0.1, divisor=1.0)
    torch.testing.assert_close(w, torch.tensor([0.9, -1.9, 3.0]))
    torch.testing.assert_close(m, torch.tensor([0.05, -0.4, 0.0]))
    torch.testing.assert_close(v, torch.tensor([0.00025, 0.016, 0.0]))


def test_several_updates_are_those_of_torchs_optimizer() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1_000, generator=generator)
    w, m, v = weight.clone(), torch.zeros(1_000), torch.zeros(1_000)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.0, fused=True)
    for update in range(1, 6):
        gradient = torch.randn(1_000, generator=generator)
        rate = 1e-2 / update
        weight.grad = gradient / 4
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        scalars = [torch.tensor(float(x)) for x in (update, 0, 4, 0)]
        scalars[1] = torch.tensor(rate, dtype=torch.float64)
        adamw_(w, gradient, m, v, *scalars)
    assert torch.equal(w, weight)
    assert torch.equal(m, optimizer.state[weight]["exp_avg"])
    assert torch.equal(v, optimizer.state[weight]["exp_avg_sq"])


IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


@IMPLS
@pytest.mark.parametrize("count", [1, 7, 1_024, 2_500])
@pytest.mark.parametrize("update", [1.0, 2.0, 1_000.0, 100_000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errors_are_those_of_torch(
    impl: str,
    count: int,
    update: float,
    dtype: torch.dtype,
    device: torch.device,
    check_errors: CheckErrors,
) -> None:
    """dtype: of gradients and rounded copy."""
    buffers = random_buffers(count, device, new=update == 1.0)
    rounded = torch.bfloat16 if dtype == torch.float32 else dtype
    types: dict[str, Any] = {"gradient": dtype, "rounded": rounded}
    ours = run(adamw_, buffers, update, impl=impl, **types)
    torchs = run(specification, buffers, update, **types)
    exact = run(specification, buffers, update, dtype=torch.float64, **types)
    check_errors(ours, torchs, [t.double() for t in exact])
    # The step alone, which is a thousandth of the weight, to the digits that a weight has.
    step, exact_step = (results[0].double() - buffers[0].double() for results in (ours, exact))
    assert (step - exact_step).abs().max() <= 1.2e-7 * (1 + buffers[0].abs().max())


@IMPLS
@pytest.mark.parametrize("update", [1.0, 2.0, 30.0])
def test_early_steps_have_all_the_digits_of_fp32(
    impl: str, update: float, device: torch.device
) -> None:
    """From weights of 0, where the step is all there is: 1 - β2ᵗ in fp32 would have four digits."""
    buffers = random_buffers(50, device, new=True)
    buffers[0].zero_()
    ours, exact = (
        run(f, buffers, update, divisor=1.0, **more)[0].double()
        for f, more in ((adamw_, {"impl": impl}), (specification, {"dtype": torch.float64}))
    )
    torch.testing.assert_close(ours, exact, rtol=3e-6, atol=0.0)


@IMPLS
def test_a_step_that_is_skipped_changes_nothing(impl: str, device: torch.device) -> None:
    buffers = random_buffers(70, device)
    buffers[1][3] = float("nan")
    w, m, v, rounded_P = run(
        adamw_, buffers, 3.0, skip=1.0, divisor=float("inf"), rounded=torch.bfloat16, impl=impl
    )
    for after, before in zip((w, m, v), (buffers[0], *buffers[2:]), strict=True):
        assert torch.equal(after, before)
    if impl == "triton":
        assert rounded_P.tolist() == [7.0] * 70
    else:  # it is the same as what it was refreshed from
        assert torch.equal(rounded_P, w.bfloat16())


@IMPLS
def test_a_weight_that_never_had_a_gradient_does_not_move(impl: str, device: torch.device) -> None:
    buffers = random_buffers(9, device, new=True)
    buffers[1].zero_()
    w, m, v = run(adamw_, buffers, 1.0, impl=impl)
    assert torch.equal(w, buffers[0])
    assert m.abs().sum() == v.abs().sum() == 0


@IMPLS
def test_at_a_rate_of_0_the_moments_alone_move(impl: str, device: torch.device) -> None:
    buffers = random_buffers(9, device)
    w, m, v = run(adamw_, buffers, 4.0, rate=0.0, impl=impl)
    assert torch.equal(w, buffers[0])
    assert (m != buffers[2]).all()
    assert (v != buffers[3]).all()


@IMPLS
@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_tiny_and_huge_gradients_are_as_in_the_formula(
    impl: str, size: float, device: torch.device
) -> None:
    buffers = random_buffers(50, device, new=True)
    buffers[1] *= size
    ours, exact = (
        run(f, buffers, 1.0, divisor=1.0, rate=0.1, **more)
        for f, more in ((adamw_, {"impl": impl}), (specification, {"dtype": torch.float64}))
    )
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-6)


@IMPLS
def test_a_part_of_a_buffer_is_updated_and_its_neighbours_are_not(
    impl: str, device: torch.device
) -> None:
    whole = random_buffers(3_000, device)
    expected = run(adamw_, [t[40:1_139] for t in whole], 2.0, impl=impl)
    parts = [t.clone() for t in whole]
    scalars = [torch.tensor(x, device=device) for x in (2.0, 1e-3, 2.5, 0.0)]
    scalars[1] = scalars[1].new_tensor(1e-3, dtype=torch.float64)
    adamw_(*(t[40:1_139] for t in parts), *scalars, impl=impl)
    for i, part in zip((0, 2, 3), expected, strict=True):
        assert torch.equal(parts[i][40:1_139], part)
        assert torch.equal(parts[i][:40], whole[i][:40])
        assert torch.equal(parts[i][1_139:], whole[i][1_139:])


@IMPLS
def test_no_weights_are_no_trouble(impl: str, device: torch.device) -> None:
    assert [len(t) for t in run(adamw_, random_buffers(0, device), 1.0, impl=impl)] == [0, 0, 0]


def test_it_passes_torchs_own_checks_of_operators(device: torch.device) -> None:
    buffers = random_buffers(20, device)
    scalars = [torch.ones((), device=device) for _ in range(3)]
    scalars.insert(1, scalars[0].double())
    for rounded_P in (None, torch.zeros(20, dtype=torch.bfloat16, device=device)):
        arguments = (*buffers, *scalars[:3], 0 * scalars[3], rounded_P)
        torch.library.opcheck(torch.ops.twostage.adamw_.default, arguments)


def test_torch_compile_holds_it_whole(device: torch.device) -> None:
    def function(*arguments: Any, **more: Any) -> None:
        adamw_(*arguments, **more, impl="triton")

    buffers = random_buffers(20, device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = [run(f, buffers, 3.0, rounded=torch.float16) for f in (compiled, function)]
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)
