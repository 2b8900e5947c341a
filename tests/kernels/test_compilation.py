"""Every kernel, compiled for GPUs that need not be here: their limits, and no spills."""

import ast
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

KERNELS = Path(__file__).parents[2] / "kernels"
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes that a block may have (CUDA C++ programming guide, table of compute capabilities)."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one of the processes that run tests side by side has compiled for all of them."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    rows = folder / "compiled.json"
    with (folder / "compiled.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not rows.exists():
            rows.write_text(compile_launches(tmp_path_factory.mktemp("triton")), encoding="utf-8")
    return json.loads(rows.read_text(encoding="utf-8"))


def compile_launches(cache: Path) -> str:
    """The JSON that the script prints."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    finished = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).with_name("compile_launches.py")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def test_kernels_are_named_after_their_files(kernel_names: set[str]) -> None:
    """What is launched, `name[grid](…)`: a profile groups by name, whatever the file."""
    launched = []
    for path in sorted(KERNELS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Subscript(value=ast.Name(id=name))):
                    assert name.startswith(f"{path.stem}_"), f"{path} launches {name}"
                    launched.append(name)
    assert len(launched) == 12
    assert set(launched) == kernel_names


def test_every_kernel_is_compiled_in_every_precision_for_both_targets(
    compiled: list[dict[str, Any]], kernel_names: set[str]
) -> None:
    assert len(kernel_names) == 12
    assert {row["kernel"] for row in compiled} == kernel_names
    for target in SHARED_MEMORY:
        for precision in ("fp32", "bf16", "fp16"):
            found = {
                row["kernel"]
                for row in compiled
                if row["capability"] == target and f"*{precision}" in row["arguments"]
            }
            # The first sees sums alone, which are fp32. Matrix units have no fp32.
            missing = {
                "fp32": {"attention_forward_kernel", "attention_backward_kernel"},
                "bf16": {"cross_entropy_reduce_kernel"},
                "fp16": {"cross_entropy_reduce_kernel"},
            }
            assert kernel_names - found == missing[precision]


def test_shared_memory_is_within_the_limits(compiled: list[dict[str, Any]]) -> None:
    for row in compiled:
        assert row["shared"] <= SHARED_MEMORY[row["capability"]], row


def test_registers_do_not_spill(compiled: list[dict[str, Any]]) -> None:
    # Four numbers a thread are none: with some versions of Triton the assembler puts so many aside
    # to stay below 64 registers, where it could have had 255.
    # And attention with 128 keys of 64 features has room on sm_90 alone, whose matrix units read
    # what they multiply from shared memory.
    def allowed(row: dict[str, Any]) -> int:
        large = (
            row["kernel"] == "attention_backward_kernel" and "'BLOCK_L': 128" in row["arguments"]
        )
        return 600 if large and row["capability"] == 80 else 16

    spilled = [row for row in compiled if row["spills"] > allowed(row)]
    assert not spilled, spilled


@pytest.mark.parametrize(
    ("kernel", "width", "tensors"),
    [
        ("residual_norm_forward_kernel", "'D': 768", 3),
        ("residual_norm_backward_kernel", "'D': 768", 5),
        ("embedding_forward_kernel", "'D': 768", 3),
        ("embedding_backward_kernel", "'D': 768", 4),
        ("gelu_forward_kernel", "'WIDTH': 3072", 2),
        ("gelu_backward_kernel", "'WIDTH': 3072", 3),
        ("cross_entropy_forward_kernel", "'C': 1000", 2),
        ("adamw_kernel", "", 7),
        ("attention_forward_kernel", "'D': 768", 4),
        ("attention_backward_kernel", "'D': 768", 8),
    ],
)
def test_whole_tensors_are_read_and_written_16_bytes_at_a_time(
    compiled: list[dict[str, Any]], kernel: str, width: str, tensors: int
) -> None:
    """What a mask, or a stride, that Triton knows too little of would prevent."""
    rows = [row for row in compiled if row["kernel"] == kernel and width in row["arguments"]]
    assert len(rows) >= 6
    for row in rows:
        assert row["wide"] >= tensors, row
