"""Names of devices, precisions and kernels."""

import pytest
import torch

from twostage.errors import UsageError
from twostage.machine import check_kernels, choose_device, choose_precision


def test_device_names() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")
    for name in ("tpu", "gpu:0", "cuda:99", "meta", ""):
        with pytest.raises(UsageError, match=f"device is '{name}'"):
            choose_device(name)


def test_precision_names() -> None:
    cpu = torch.device("cpu")
    assert choose_precision("fp32", cpu) == torch.float32
    assert choose_precision("bf16", cpu) == torch.bfloat16
    native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    assert choose_precision("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert choose_precision("fp16", cpu) == torch.float16
    with pytest.raises(UsageError, match="'int8'"):
        choose_precision("int8", cpu)


def test_kernels_that_cannot_run_are_refused_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu = torch.device("cpu")
    for impl in ("auto", "torch"):
        check_kernels(impl, False, "auto", cpu)
    with pytest.raises(UsageError, match="kernels are 'cuda'; expected one of auto, torch, triton"):
        check_kernels("cuda", False, "auto", cpu)
    with pytest.raises(UsageError, match="graphs need kernels 'triton'; they are 'auto'"):
        check_kernels("auto", True, "bf16", cpu)
    with pytest.raises(UsageError, match="graphs need precision bf16 or fp16; it is fp32"):
        check_kernels("triton", True, "fp32", torch.device("cuda"))
    with pytest.raises(UsageError, match="graphs need a CUDA GPU, and the device is cpu"):
        check_kernels("triton", True, "bf16", cpu)
    monkeypatch.setattr("twostage.kernels._INTERPRETED", False)
    with pytest.raises(UsageError, match="need a CUDA GPU, and the device is cpu; leave"):
        check_kernels("triton", False, "auto", cpu)
    monkeypatch.setattr("twostage.kernels.triton", None)
    with pytest.raises(UsageError, match="Triton is not installed here"):
        check_kernels("triton", False, "auto", torch.device("cuda"))
