"""The benchmark of large tables, rehearsed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "million_rows.py"


@pytest.mark.slow
def test_large_tables_are_measured_in_both_ways(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--model", "tiny", "--rows", "20000"]
    finished = subprocess.run(
        [*command, "--output", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    record = json.loads(finished.stdout.strip().splitlines()[-1])
    ours, few, usual = record["rows"]
    assert [(row["run"], row["rows"]) for row in record["rows"]] == [
        ("ours", 20_000),
        ("ours", 2_000),
        ("usual", 2_000),
    ]
    assert few["tokens"] == usual["tokens"], "both hold the same tokens"
    assert ours["tokens"] > 5 * few["tokens"]
    for row in record["rows"]:
        assert row["peak_mib"] >= row["held_mib"] > 0
    assert ours["peak_mib"] < 20_000 * 2_147 / 2**20 + 60, "two GiB a million rows, and a base"
    assert {path.suffix for path in tmp_path.iterdir()} == {".md", ".json"}
