"""What the tests of all kernels share: where they run, and what error they may have."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from twostage.kernels.dropout import DropoutCounters

CheckErrors = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]], None]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU, or the CPU, where the kernels run in Triton's interpreter (`tests/conftest.py`)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def check_errors() -> CheckErrors:
    """Takes outputs and gradients of ours, of torch's own at the same precision, and in fp64.

    Our error, relative to the norm of each, is at most twice torch's plus the spacing of the
    precision at 1: two roundings of a single number, or the one that Triton's interpreter does by
    cutting bf16 off where a GPU rounds.
    """

    def check(ours: Sequence[Tensor], torchs: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
        for i, (our, its, truth) in enumerate(zip(ours, torchs, exact, strict=True)):
            assert truth.dtype == torch.float64
            assert our.dtype == its.dtype
            size = truth.norm().clamp(min=1e-6)  # a gradient may be zero
            error, allowed = ((x.double() - truth).norm() / size for x in (our, its))
            limit = 2 * allowed + torch.finfo(our.dtype).eps
            assert error <= limit, f"number {i}: {error:.2e}, torch's {allowed:.2e}"

    return check


@pytest.fixture
def counters(device: torch.device) -> Callable[[int], DropoutCounters]:
    """Counters of so many rows, texts of seven tokens; draws beyond 16 bits among them."""

    def make(num_rows: int) -> DropoutCounters:
        rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        key = torch.tensor([0x1234_5678_9ABC_DEF0], device=device)
        return DropoutCounters(key, rows // 7 * 70_001, rows % 7, torch.Generator(device))

    return make
