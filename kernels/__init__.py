"""The operations at the bottom of the model, one file each. Installed as `twostage.kernels`.

Read a file from top to bottom: the docstring states the formula and derives the gradient; then come
the function that the model calls, the reference that leaves the gradient to autograd (the loss has
its in `training/losses.py`, AdamW in `training/optim.py`), the autograd function, and the Triton
kernels with what launches them. Imports torch and, where there is one,
Triton.

Which of them runs is said by `impl`, an argument of every operation that has a Triton kernel:

    torch     PyTorch's own operations, on any device
    triton    the kernels: on a CUDA GPU, or anywhere in Triton's interpreter (TRITON_INTERPRET=1),
              which is slow and there to check them
    auto      whichever is known to be faster; that is torch as long as no kernel has been timed
              on a GPU

The launchers are operators of torch (`torch.ops.twostage.…`) with a description of their outputs'
shapes, so torch.compile and CUDA graphs take them as they take torch's own.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=None)  # kernels can be read, not run

# Triton looks at TRITON_INTERPRET where a kernel is defined, which is when it is imported.
_INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)

__all__ = [
    "IMPLS",
    "Pointer",
    "jit",
    "next_power_of_2",
    "tl",
    "to_device",
    "torch_operator",
    "triton",
    "triton_problem",
    "use_triton",
]

IMPLS = ("auto", "torch", "triton")

Pointer = Any
"""Annotates what a Triton kernel gets as the address of a tensor."""


def use_triton(impl: str, x: Tensor) -> bool:
    """Whether an operation on `x` with this `impl` runs in Triton.

    Raises RuntimeError where `triton` is asked for and cannot run.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(IMPLS)}")
    if impl != "triton":
        return False
    problem = triton_problem(x.device)
    if problem is None and x.dtype == torch.float64:
        problem = "the Triton kernels compute in fp32, and the input is fp64"
    if problem is not None:
        raise RuntimeError(problem)
    return True


def triton_problem(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on this device; None: they can."""
    if triton is None:
        return "Triton is not installed here (pip install triton)"
    if device.type != "cuda" and not _INTERPRETED:
        return f"the Triton kernels need a CUDA GPU, and the device is {device}"
    return None


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton, the function as it is, which is then never called.

    Numbers are not specialised on: a kernel is not compiled again for a count of rows that happens
    to be a multiple of 16.
    """
    if triton is None:
        return function
    code = function.__code__
    numbers = [
        name
        for name in code.co_varnames[: code.co_argcount]
        if function.__annotations__.get(name) in (int, float)
    ]
    return triton.jit(function, do_not_specialize=numbers)


_library = torch.library.Library("twostage", "FRAGMENT")


def torch_operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a launcher the operator `torch.ops.twostage.NAME`.

    schema: in torch's notation, such as `double(Tensor x) -> Tensor`. fake: takes the same
    arguments and returns empty tensors of the shapes and dtypes that the launcher returns.
    """
    # Not torch.library.custom_op: a call of that takes twice the time, and the first one a second,
    # in which it loads torch's compiler.
    name = _library.define(schema)

    def register(launcher: Callable[..., Any]) -> Any:
        def launch(x: Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(x):  # Triton launches on the current device
                return launcher(x, *rest)

        _library.impl(name, launch, "CompositeExplicitAutograd")
        torch.library.register_fake(f"twostage::{name}", fake, lib=_library)
        return getattr(torch.ops.twostage, name).default

    return register


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`, without a host sync."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least `n` ≥ 1: what a Triton block may measure."""
    return 1 << (n - 1).bit_length()
