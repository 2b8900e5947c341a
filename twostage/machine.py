"""Where a run computes: device, precision, kernels."""

import re

import torch

from .errors import UsageError
from .kernels import IMPLS, triton_problem

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """`auto` (a CUDA GPU if there is one), `cpu`, `cuda` or `cuda:n`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"device is '{name}'; expected auto, cpu, cuda or cuda:n")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`fp32`, `bf16`, `fp16`, or `auto`: bf16 if the device multiplies it natively, else fp32."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise UsageError(f"precision is '{name}'; expected one of auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.bfloat16 if native else torch.float32


def check_kernels(impl: str, graphs: bool, precision: str, device: torch.device) -> None:
    """Raise UsageError when the operations (`kernels/__init__.py`) cannot run with this `impl`, or
    steps not as CUDA graphs where these are asked for."""
    if impl not in IMPLS:
        raise UsageError(f"kernels are '{impl}'; expected one of {', '.join(IMPLS)}")
    problem = triton_problem(device) if impl == "triton" else None
    if problem is not None:
        raise UsageError(f"kernels are 'triton', but {problem}; leave the choice to auto")
    if graphs and impl != "triton":
        raise UsageError(f"graphs need kernels 'triton'; they are '{impl}'")
    if graphs and device.type != "cuda":
        raise UsageError(f"graphs need a CUDA GPU, and the device is {device}")
    if graphs and choose_precision(precision, device) == torch.float32:
        raise UsageError("graphs need precision bf16 or fp16; it is fp32")
    if graphs and torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError(f"graphs need a GPU of compute capability 8.0 or more; {device} is older")
