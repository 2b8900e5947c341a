"""The kernels' benchmark loses no more than what fails, and times no more than it says."""

import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

CHILD = """
import os, subprocess, sys
print("not a row")
print('{"row": 1}', flush=True)
print('{"row": 2}', flush=True)
if "fails" in sys.argv[2]:
    raise ValueError("too many")
if "hangs" in sys.argv[2]:
    print('{"child": %d}' % os.getpid(), flush=True)
    # Goes on for longer, and has the same stdout.
    subprocess.run([sys.executable, "-c", "import time; time.sleep(30)"])
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import harness

    return harness


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import kernel_throughput

    return kernel_throughput


@pytest.fixture
def child(tmp_path: Path) -> Path:
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    return script


def test_a_childs_rows_come_as_it_prints_them(harness: ModuleType, child: Path) -> None:
    began = time.monotonic()
    rows = harness.run_child_rows(child, {"case": "hangs"}, 50.0)
    assert [next(rows), next(rows)] == [{"row": 1}, {"row": 2}]
    pid = next(rows)["child"]
    assert Path(f"/proc/{pid}").exists()
    rows.close()
    assert not Path(f"/proc/{pid}").exists()
    assert time.monotonic() - began < 25


@pytest.mark.slow
def test_a_time_out_keeps_the_rows_before_it(harness: ModuleType, child: Path) -> None:
    """And waits for nothing that the child has started."""
    began = time.monotonic()
    *rows, running, last = harness.run_child_rows(child, {"case": "hangs"}, 5.0)
    assert rows == [{"row": 1}, {"row": 2}]
    assert last == {"error": "took longer than 5 s"}
    assert not Path(f"/proc/{running['child']}").exists()
    assert time.monotonic() - began < 25


def test_a_failure_keeps_the_rows_before_it(harness: ModuleType, child: Path) -> None:
    *rows, last = harness.run_child_rows(child, {"case": "fails"}, 50.0)
    assert rows == [{"row": 1}, {"row": 2}]
    assert last["error"] == "ValueError: too many"
    assert "Traceback" in last["stderr"]
    assert harness.run_child(child, {"case": "fails"}, 50.0) == last
    assert harness.run_child(child, {"case": ""}, 50.0) == {"row": 2}


def test_a_child_without_rows_is_a_failure(harness: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text("print(3)", encoding="utf-8")
    (row,) = harness.run_child_rows(tmp_path / "silent.py", {}, 50.0)
    assert row["error"] == "no result, exit code 0"


def test_the_longest_operation_and_bf16_come_first(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [job["operation"] for job in benchmark.make_kernel_jobs("cpu")]
    assert names[:3] == ["AdamW", "attention", "residual norm"]
    assert names[3:] == ["bias + GELU", "embedding", "cross-entropy"]
    rows = [*benchmark.run_job(add_operation(benchmark, monkeypatch, F.silu, widths=(3, 4)))]
    found = [(row["precision"], row["shape"]) for row in rows]
    assert found == [(p, s) for p in ("bf16", "fp16", "fp32") for s in ("5×3", "5×4")]
    assert all(row["close"] for row in rows)


def test_a_rival_that_fails_loses_its_figures_alone(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*benchmark.run_job(add_operation(benchmark, monkeypatch, raise_))]
    assert len(rows) == 3
    for row in rows:
        assert row["close"]
        assert set(row["seconds"]) == {"ours_forward", "ours_both"}
        assert row["failures"] == {"torch": "RuntimeError: no such thing here"}
    table = describe(benchmark, rows)
    assert table.count("| failed |") == 6
    assert "- SiLU, bf16, 5×3, torch: RuntimeError: no such thing here\n" in table


def test_a_shape_that_fails_loses_its_figures_alone(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad, *rest = benchmark.run_job(add_operation(benchmark, monkeypatch, F.silu, widths=(-1, 3)))
    assert set(bad) == {"operation", "precision", "shape", "failure"}
    assert bad["shape"] == "-1"
    assert bad["failure"].startswith("RuntimeError: ")
    assert [row["shape"] for row in rest if "close" in row] == ["5×3"] * 3
    assert f"- SiLU, bf16, -1: {bad['failure']}\n" in describe(benchmark, [bad, *rest])


def test_where_ours_fails_the_shape_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*benchmark.run_job(add_operation(benchmark, monkeypatch, F.silu, ours=raise_))]
    assert [row["failure"] for row in rows] == ["RuntimeError: no such thing here"] * 3
    assert not any("close" in row for row in rows)


def test_no_upstream_gradient_is_made_on_the_clock(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for the errors, and one for each of the two calls that are timed."""
    made, timed = [], []
    make_upstream, seconds_of = benchmark.make_upstream, benchmark.seconds_of

    def count(out: Tensor) -> Tensor:
        made.append(make_upstream(out))
        return made[-1]

    def watch(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
        before = len(made)
        seconds: float = seconds_of(calls, device)
        timed.append(len(made) - before)
        return seconds

    monkeypatch.setattr(benchmark, "make_upstream", count)
    monkeypatch.setattr(benchmark, "seconds_of", watch)
    seen: list[Tensor] = []

    def plain(x: Tensor) -> Tensor:
        out = F.silu(x)
        if out.requires_grad:
            out.register_hook(seen.append)
        return out

    (row, *_) = benchmark.run_job(add_operation(benchmark, monkeypatch, plain))
    assert len(made) == 9  # of three precisions
    assert timed == [0] * 12  # ours and torch's, forward and both
    assert seen
    assert {id(x) for x in seen} <= {id(x) for x in made}
    assert row["close"]


def test_the_ninth_shape_is_compiled_like_the_first(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = []

    def backend(graph: Any, inputs: Sequence[Tensor]) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    job = add_operation(benchmark, monkeypatch, lambda x: x * torch.sigmoid(x), range(1, 10))
    for case_of in benchmark.OPERATIONS[job["operation"]](torch.device("cpu")):
        case = case_of(torch.bfloat16, 0)
        rivals = benchmark.rivals_of(case, torch.bfloat16, torch.device("cuda"))
        benchmark.run_forward(rivals["compiled"], case.leaves)
        assert "compiled" not in benchmark.rivals_of(case, torch.float16, torch.device("cuda"))
    torch.compiler.reset()
    assert len(compiled) == 9


@pytest.mark.slow
def test_a_part_that_is_cut_off_keeps_its_rows(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    row = {"operation": "AdamW", "precision": "bf16", "error": 1e-3, "close": True}
    script = tmp_path / "slow.py"
    script.write_text(
        f"import time\nprint({json.dumps(json.dumps(row))}, flush=True)\ntime.sleep(60)",
        encoding="utf-8",
    )
    monkeypatch.setattr(benchmark, "__file__", str(script))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    rows = benchmark.run_kernel_job({"operation": "AdamW", "device": "cpu"}, 5.0)
    assert next(rows) == row
    assert [*rows] == [{"operation": "AdamW", "failure": "took longer than 5 s"}]


def add_operation(
    benchmark: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    plain: Callable[[Tensor], Tensor],
    widths: Sequence[int] = (3,),
    ours: Callable[[Tensor], Tensor] = F.silu,
) -> dict[str, Any]:
    """The job of an operation, x · σ(x), in a plain form and ours. No tensor has width -1."""

    def case_of(width: int, dtype: torch.dtype, seed: int) -> Any:
        leaf = benchmark.draw(torch.device("cpu"), seed, 5, width).to(dtype)
        return benchmark.Case(
            f"5×{width}",
            [leaf],
            ours=ours,
            plain=plain,
            reference=F.silu,
            forward_bytes=30.0,
            backward_bytes=45.0,
        )

    cases = [partial(case_of, width) for width in widths]
    monkeypatch.setitem(benchmark.OPERATIONS, "SiLU", lambda device: cases)
    return {"operation": "SiLU", "device": "cpu"}


def raise_(x: Tensor) -> Tensor:
    raise RuntimeError("no such thing here\nand a long explanation")


def describe(benchmark: ModuleType, rows: list[dict[str, Any]]) -> str:
    record = {"kernels": rows, "limits": {"copy_bytes": 1e9}, "command": "python …"}
    table: str = benchmark.describe_kernels(record)
    return table
