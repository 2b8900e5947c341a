"""Everything to be learnt from a GPU, in one command, without a network, in under 8 minutes.

    python benchmarks/gpu_suite.py                  on a machine with a CUDA GPU
    python benchmarks/gpu_suite.py --rehearse       all of it on a CPU, with tiny shapes

1. The tests that run on every device (`tests/test_device.py`).
2. Training throughput of BERT-base's shape, ours beside P0, P1, P2, P3 and P4 (`peers.py`).
3. The profile of a step of ours.

Each part, and in the second each case, runs in a process of its own: one that fails or takes too
long is reported, and loses nothing of the others. One JSON and one Markdown file, named by GPU and
date, are rewritten after every case. The exit code is 0 only if nothing failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import train_throughput
from harness import RESULTS, describe_environment, run_child, save
from train_throughput import describe, describe_place, make_jobs, run_jobs

ROOT = Path(__file__).parent.parent
TESTS = (
    "tests/test_device.py",
    "tests/test_benchmarks.py::test_the_graphs_of_p4_train_as_its_single_steps_do",
)
THROUGHPUT = Path(train_throughput.__file__)
RUNS = ("ours bf16", "P1 bf16", "P4 bf16", "P2 bf16", "P0 fp32")
"""The most telling first, should the time run out."""
LAST_RUN = "P3 bf16"
"""Compiles for longer than the others take: in one case only, after all of theirs."""
SECONDS = {"limits": 60.0, "tests": 120.0, "case": 100.0, "all": 465.0}
"""What each part may take. Throughput and profile get what the others leave of `all`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA GPU here; --rehearse runs on a CPU", file=sys.stderr)
        return 2
    output = options.output
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="gpu_suite-")) if options.rehearse else RESULTS

    began = perf_counter()
    device = "cpu" if options.rehearse else "cuda"
    record = describe_environment(device) | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "rows": [],
    }
    if options.commit:
        record["commit"] = options.commit
    place = "rehearsal" if options.rehearse else describe_place(record)
    name = f"gpu_suite-{place}-{record['date']}"
    slack = 10 if options.rehearse else 1  # a CPU that is busy with other things is no failure
    job = {"limits": "quick" if options.rehearse else "full", "device": device}
    record["limits"] = run_child(THROUGHPUT, job, slack * SECONDS["limits"])
    record["tests"] = run_tests(slack * SECONDS["tests"])
    record["seconds"] = perf_counter() - began
    save(output, name, describe_suite(record), record)
    left = slack * SECONDS["all"] - record["seconds"]
    for rows in run_jobs(plan(options.rehearse), left, slack * SECONDS["case"]):
        record |= {"rows": rows, "seconds": perf_counter() - began}
        row = rows[-1]
        print(f"{row['run']}, stage {row['stage']}, batch {row['batch_size']}", flush=True)
        save(output, name, describe_suite(record), record)

    print(
        f"\n{describe_suite(record)}\n\n{json.dumps(record)}\n\nwritten: {output / name}.md, .json"
    )
    return int(bool(failures(record)))


def plan(rehearse: bool) -> list[dict[str, Any]]:
    """The cases of parts 2 and 3, the most telling first."""
    if rehearse:
        common = {"model": "tiny", "data": "", "device": "cpu", "warmup": 1}
        jobs = make_jobs(RUNS, (2, 1), (4,), 12, **common)
        # All of torch.compile but the code generator, which takes a minute here.
        jobs += make_jobs((LAST_RUN,), (2,), (4,), 12, compiled_by="aot_eager", **common)
    else:
        common = {"model": "bert-base", "data": "", "device": "cuda", "warmup": 20}
        jobs = make_jobs(RUNS, (2,), (16,), 1_600, **common)
        jobs += make_jobs(RUNS, (2,), (64,), 6_400, **common)
        jobs += make_jobs(RUNS, (1,), (16, 64), 3_200, **common)
        jobs += make_jobs((LAST_RUN,), (2,), (16,), 1_600, **common)
    jobs.insert(1, jobs[0] | {"profile": True, "steps": 2 if rehearse else 10})
    return jobs


def run_tests(seconds: float) -> dict[str, Any]:
    """pytest's exit code and the end of what it printed."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *TESTS]
    began = perf_counter()
    try:
        finished = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        printed = (error.stdout or b"").decode(errors="replace")[-6_000:]
        return {"exit_code": None, "output": f"{printed}\ntook longer than {seconds:.0f} s"}
    return {
        "exit_code": finished.returncode,
        "seconds": round(perf_counter() - began, 1),
        "output": (finished.stdout + finished.stderr)[-6_000:],
    }


def failures(record: dict[str, Any]) -> list[str]:
    """What went wrong, a line each."""
    failed = [] if record["tests"]["exit_code"] == 0 else ["the tests"]
    failed += [f"the limits: {record['limits']['error']}"] if "error" in record["limits"] else []
    return failed + [
        f"{'profile of ' * bool(row.get('profile'))}{row['run']}, stage {row['stage']}, "
        f"batch {row['batch_size']}: {row['error']}"
        for row in record["rows"]
        if "error" in row
    ]


def describe_suite(record: dict[str, Any]) -> str:
    """All parts so far, in Markdown."""
    tests = record["tests"]
    lines = tests["output"].strip().splitlines() or ["no output"]
    passed = tests["exit_code"] == 0
    parts = [
        f"GPU suite, {record['date']}, {record['seconds']:.0f} s",
        f"Tests: {lines[-1]}" if passed else "Tests failed:\n\n```\n" + "\n".join(lines) + "\n```",
        describe(record),
    ]
    if failed := failures(record):
        parts.append("Failed: " + "; ".join(failed))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
