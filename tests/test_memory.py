"""The process keeps what it frees."""

import platform
import subprocess
import sys

import pytest

PROBE = """
import sys
from pathlib import Path
import torch
if sys.argv[1] == "keep":
    from twostage.memory import keep_freed_memory
    keep_freed_memory()

def resident_mib():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) >> 10

before = resident_mib()
blocks = [torch.ones(2**22) for _ in range(10)]  # 16 MiB each
assert resident_mib() - before > 150
del blocks
print(resident_mib() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_blocks_stay_with_the_process() -> None:
    def kept_mib(how: str) -> int:
        command = [sys.executable, "-c", PROBE, how]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert kept_mib("keep") > 150
    assert kept_mib("plain") < 50, "or the setting would not be needed"


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    from twostage import memory

    def refuse(name: object) -> None:
        raise AssertionError("asked for the C library")

    monkeypatch.setattr("ctypes.CDLL", refuse)
    monkeypatch.setattr("sys.platform", "darwin")
    memory.keep_freed_memory()
