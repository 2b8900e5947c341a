"""The benchmark of augmentation: everybody asks the same server, and all answers are counted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "augment_throughput.py"


@pytest.mark.slow
def test_the_benchmark_runs_and_nobody_beats_what_is_possible(tmp_path: Path) -> None:
    small = "--calls 200 --peer-calls 100 --published-calls 2 --journal 1000"
    small += " --concurrency 8 --delay 0.02"
    command = [sys.executable, str(SCRIPT), *small.split(), "--output", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    record = json.loads(finished.stdout.strip().splitlines()[-1])
    ours, openai, published, *at_once = record["rows"]
    for row in (ours, openai):
        assert 0 < row["calls"] / row["seconds"] / (8 / 0.02) <= 1
    assert published["calls"] == 2
    assert published["seconds"] > 2 * 1.02
    assert [row["way"] for row in at_once] == ["ours", "openai"]
    assert not any("error" in row for row in record["rows"])
    assert record["reopened"]["answers"] == 1_000
    assert "of what is possible" in (tmp_path / "augment_throughput.md").read_text()
