"""Everything to be learnt from a GPU, in one command, without a network, in under 30 minutes.

    python benchmarks/gpu_suite.py                      on a machine with a CUDA GPU
    python benchmarks/gpu_suite.py --parts stage-2      one part: each takes under 8 minutes
    python benchmarks/gpu_suite.py --rehearse           all of it on a CPU, with tiny shapes

- `tests`: those that run on every device, and the Triton kernels', compiled where they otherwise
  are interpreted.
- `kernels`: each Triton kernel's error and speed beside torch's own (`kernel_throughput.py`).
- `stage-2`, `stage-1`: throughput of BERT-base's shape at batch 16, 64 and 512, ours without the
  kernels, with them, and with them in CUDA graphs, beside P0, P1, P2, P3 and P4 (`peers.py`; P5 is
  P1 and P2 at the larger batches); memory; the time it takes to record the graphs; the profile of
  a step of ours, of each kind.
- `seeds`: five seeds of both stages on as many texts as SST-2 has, as long as SST-2's
  (`several_seeds.py`).

Each part, and in all but the first each case, runs in a process of its own: one that fails or takes
too long is reported, and loses nothing of the others. One JSON and one Markdown file, named by GPU,
date and, if not all, parts, are rewritten after every case. The exit code is 0 only if nothing
failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any

import several_seeds
import torch
import train_throughput
from harness import RESULTS, describe_environment, describe_place, run_child, run_jobs, save
from kernel_throughput import describe_kernels, make_kernel_jobs, run_kernel_job
from several_seeds import GPU_RUNS, SST2_TEXTS, describe_seeds, make_seed_jobs
from train_throughput import describe, make_jobs

ROOT = Path(__file__).parent.parent
PARTS = ("tests", "kernels", "stage-2", "stage-1", "seeds")
TESTS = (
    "tests/test_device.py",
    "tests/test_benchmarks.py::test_the_graphs_of_p4_train_as_its_single_steps_do",
    "tests/kernels",
    "tests/training/test_masks.py",
    "tests/training/test_kernels_in_training.py",
    "tests/training/test_graphs.py",
)
REHEARSED_TESTS = (*TESTS[:2], "tests/kernels/test_gelu.py")
"""The others run among the tests anyway."""
THROUGHPUT, SEEDS = Path(train_throughput.__file__), Path(several_seeds.__file__)
RUNS = (
    "ours bf16",
    "ours bf16, Triton",
    "ours bf16, graphs",
    "P1 bf16",
    "P4 bf16",
    "P2 bf16",
    "P0 fp32",
)
"""The most telling first, should the time run out."""
LAST_RUN = "P3 bf16"
"""Compiles for longer than the others take: in one case only, after all of theirs."""
SECONDS = {
    "limits": 60.0,
    "tests": 450.0,
    "kernels": 400.0,
    "case": 100.0,
    "stage-2": 450.0,
    "stage-1": 400.0,
    "seeds": 300.0,
}
"""What may be taken by the limits, each part, and a case of training."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts is {options.parts}; expected some of {', '.join(PARTS)}")
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
    name = "-".join(["gpu_suite", place, record["date"], *(parts if parts != [*PARTS] else [])])
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the parts
    slack = 10 if options.rehearse else 1  # a CPU that is busy with other things is no failure

    def keep(**news: Any) -> None:
        record.update(news, seconds=perf_counter() - began)
        save(output, name, describe_suite(record), record)

    job = {"limits": "quick" if options.rehearse else "full", "device": device}
    keep(limits=run_child(THROUGHPUT, job, slack * SECONDS["limits"]))
    if "tests" in parts:
        keep(tests=run_tests(options.rehearse, slack * SECONDS["tests"]))
    deadline = perf_counter() + slack * SECONDS["kernels"]
    for job in make_kernel_jobs(device) if "kernels" in parts else []:
        print(job["operation"], flush=True)
        rows = run_kernel_job(job, max(1.0, deadline - perf_counter()))
        keep(kernels=[*record.get("kernels", []), *rows])
    for part in ("stage-2", "stage-1"):
        jobs, before = plan(part, options.rehearse) if part in parts else [], record["rows"]
        for rows in run_jobs(THROUGHPUT, jobs, slack * SECONDS[part], slack * SECONDS["case"]):
            row = rows[-1]
            print(f"{row['run']}, stage {row['stage']}, batch {row['batch_size']}", flush=True)
            keep(rows=[*before, *rows])
    if "seeds" in parts:
        print("several seeds", flush=True)
        what: tuple[Any, ...] = (GPU_RUNS, "bert-base", "", device, SST2_TEXTS, 5)
        if options.rehearse:
            what = (GPU_RUNS[:1], "tiny", "", device, 12, 2)
        jobs = make_seed_jobs(*what)
        for rows in run_jobs(SEEDS, jobs, slack * SECONDS["seeds"]):
            keep(seeds=rows)

    print(
        f"\n{describe_suite(record)}\n\n{json.dumps(record)}\n\nwritten: {output / name}.md, .json"
    )
    return int(bool(failures(record)))


def plan(part: str, rehearse: bool) -> list[dict[str, Any]]:
    """The cases of a stage, the most telling first."""
    stage = int(part[-1])
    if rehearse:
        common = {"model": "tiny", "data": "", "device": "cpu", "warmup": 1}
        # An interpreter takes its time: the kernels' runs are rehearsed in one stage.
        runs = RUNS if stage == 2 else (RUNS[0], *RUNS[3:])
        jobs = make_jobs(runs, (stage,), (4,), 12, **common)
        jobs = [job | {"steps": 2, "warmup": min(job["warmup"], 3)} for job in jobs]
        if stage == 2:  # all of torch.compile but the code generator, which takes a minute here
            jobs += make_jobs((LAST_RUN,), (2,), (4,), 12, compiled_by="aot_eager", **common)
    else:
        common = {"model": "bert-base", "data": "", "device": "cuda", "warmup": 20}
        jobs = make_jobs(RUNS, (stage,), (16,), 1_600, **common)
        jobs += make_jobs(RUNS, (stage,), (512,), 6_144, **common)
        jobs += make_jobs(RUNS, (stage,), (64,), 3_200, **common)
        if stage == 2:
            jobs += make_jobs((LAST_RUN,), (2,), (16,), 1_600, **common)
    if stage == 1:
        return jobs
    profiles = [job | {"profile": True, "steps": 2 if rehearse else 10} for job in jobs[:3]]
    return [*jobs[:3], *(profiles[::2] if rehearse else profiles), *jobs[3:]]


def run_tests(rehearse: bool, seconds: float) -> dict[str, Any]:
    """pytest's exit code and the end of what it printed."""
    tests = REHEARSED_TESTS if rehearse else TESTS
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *tests]
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
    tests = record.get("tests", {"exit_code": 0})
    failed = [] if tests["exit_code"] == 0 else ["the tests"]
    failed += [f"the limits: {record['limits']['error']}"] if "error" in record["limits"] else []
    failed += [
        f"{row['operation']} {row.get('precision', '')}: {row.get('failure', 'too large an error')}"
        for row in record.get("kernels", [])
        if not row.get("close")
    ]
    failed += [
        f"{row['run']}, several seeds: {row['error']}"
        for row in record.get("seeds", [])
        if "error" in row
    ]
    return failed + [
        f"{'profile of ' * bool(row.get('profile'))}{row['run']}, stage {row['stage']}, "
        f"batch {row['batch_size']}: {row['error']}"
        for row in record["rows"]
        if "error" in row
    ]


def describe_suite(record: dict[str, Any]) -> str:
    """All parts so far, in Markdown."""
    parts = [f"GPU suite, {record['date']}, {record['seconds']:.0f} s"]
    if "tests" in record:
        tests = record["tests"]
        lines = tests["output"].strip().splitlines() or ["no output"]
        passed = tests["exit_code"] == 0
        output = "\n".join(lines)
        parts.append(f"Tests: {lines[-1]}" if passed else f"Tests failed:\n\n```\n{output}\n```")
    if "kernels" in record and "copy_bytes" in record["limits"]:
        parts.append(describe_kernels(record))
    if record["rows"]:
        parts.append(describe(record))
    if "seeds" in record:
        parts.append(describe_seeds(record["seeds"]))
    if failed := failures(record):
        parts.append("Failed: " + "; ".join(failed))
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
