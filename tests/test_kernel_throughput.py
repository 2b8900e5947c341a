"""The kernels' benchmark loses no more than what fails, and times no more than it says."""

import time
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

CHILD = """
import subprocess, sys
print("not a row")
print('{"row": 1}', flush=True)
print('{"row": 2}', flush=True)
if "fails" in sys.argv[2]:
    raise ValueError("too many")
if "hangs" in sys.argv[2]:  # and so does what it has started, with the same stdout
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    print('{"started": %d}' % child.pid, flush=True)
    child.wait()
"""


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import harness

    return harness


@pytest.fixture
def child(tmp_path: Path) -> Path:
    script = tmp_path / "child.py"
    script.write_text(CHILD, encoding="utf-8")
    return script


def test_a_childs_rows_come_as_it_prints_them(harness: ModuleType, child: Path) -> None:
    began = time.monotonic()
    rows = harness.run_child_rows(child, {"case": "hangs"}, 50.0)
    assert [next(rows), next(rows)] == [{"row": 1}, {"row": 2}]
    started = next(rows)["started"]
    rows.close()
    assert time.monotonic() - began < 40
    assert not is_running(started)


def test_a_time_out_keeps_the_rows_before_it(harness: ModuleType, child: Path) -> None:
    began = time.monotonic()
    *rows, started, last = harness.run_child_rows(child, {"case": "hangs"}, 5.0)
    assert rows == [{"row": 1}, {"row": 2}]
    assert last == {"error": "took longer than 5 s"}
    assert time.monotonic() - began < 40
    assert not is_running(started["started"])


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


def is_running(pid: int) -> bool:
    """Whether it still runs after five seconds; one that has ended may have no one to wait for it."""
    for _ in range(50):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
        except (FileNotFoundError, ProcessLookupError):
            return False
        if stat.rsplit(")", 1)[1].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True
