"""Everything to be learnt from a GPU, without a network, each part in one command of ten minutes.

    python benchmarks/gpu_suite.py --plan               what it does, how long it may take; no GPU
    python benchmarks/gpu_suite.py --parts stage-2 --output DIR --commit COMMIT
    python benchmarks/gpu_suite.py --rehearse           all of it on a CPU, with tiny shapes

Install first: where there is no network, but all dependencies, by `pip install --no-deps
--no-build-isolation -e .`.

The parts, in the order in which they run (`--parts` chooses some); with the machine's limits, which
are measured first, each takes at most nine minutes:

- `stage-2`: throughput of BERT-base's shape at batch 16, 512 and 64: ours in CUDA graphs, with the
  kernels, and without them, beside the rivals (`peers.py`); memory; the time it takes to compile
  and to record the graphs; the profile of a step in graphs, with the gaps between its kernels.
- `seeds`: both stages on as many texts as SST-2 has, as long as SST-2's (`several_seeds.py`).
- `tests`: those that run on every device, and the Triton kernels', compiled where they otherwise
  are interpreted.
- `kernels`: each Triton kernel's error and speed beside torch's own (`kernel_throughput.py`).
- `stage-1`, if time is left: its throughput at batch 16 and 64, ours over an epoch of as many texts
  as SST-2 has.

In every part the most telling figures come first. Each case runs in a process of its own: one that
fails or takes too long is reported, and loses nothing of the others. A row is printed and written
as soon as it is there: one JSON and one Markdown file in the folder `--output`, named by GPU, date
and, if not all, parts. Without `--output` that is `benchmarks/results/`, as in the other
benchmarks, or for a rehearsal a new folder in the system's temporary one; the name is printed
first. `--commit` names the sources where there is no git to ask. The exit code is 0 only if nothing
failed.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import several_seeds
import torch
import train_throughput
from harness import (
    RESULTS,
    describe_environment,
    describe_place,
    markdown_table,
    run_child,
    run_jobs,
    save,
)
from kernel_throughput import describe_kernels, make_kernel_jobs, run_kernel_job
from several_seeds import GPU_RUNS, describe_seeds, make_seed_jobs
from train_throughput import describe, make_jobs
from workload import SST2_TEXTS

ROOT = Path(__file__).parent.parent
THROUGHPUT, SEEDS = Path(train_throughput.__file__), Path(several_seeds.__file__)
SECONDS = {"stage-2": 480.0, "seeds": 400.0, "tests": 450.0, "kernels": 450.0, "stage-1": 200.0}
"""What each part may take, in the order in which they run."""
LIMITS_SECONDS = 60.0
"""What the machine's limits may take, before the first part."""
CASE_SECONDS = 120.0
"""What a case of training may take."""
OPERATION_SECONDS = 150.0
"""What an operation's kernels may take."""
SEEDS_SECONDS = 150.0
"""What a case of `seeds` may take."""
EXPECTED_SECONDS = {"P3 bf16": 100.0, "P0 fp32": 30.0, "graphs, one trunk for all": 80.0}
EXPECTED_SECONDS |= {"graphs": 85.0, "kernels": 45.0, "one trunk for all": 50.0}
"""What cases take longer than OTHERS_SECONDS, and how long: estimates, nothing is measured yet."""
OTHERS_SECONDS = 20.0

TESTS = (
    # The most telling first: what nothing but a GPU can run, and what would explain all the rest.
    "tests/kernels/test_attention.py",
    "tests/fast/test_graphs.py",
    "tests/test_benchmarks.py::test_the_graphs_of_p4_train_as_its_single_steps_do",
    "tests/fast/test_kernels_in_training.py",
    "tests/test_device.py",
    "tests/fast/test_randomness.py",
    # One by one: pytest would move attention's, named above, to its folder. Compilation for sm_80
    # and sm_90 is left out, as it learns nothing from a GPU.
    *(
        f"tests/kernels/test_{name}.py"
        for name in (
            *("residual_norm", "gelu", "embedding", "adamw", "cross_entropy", "dropout"),
            *("padded_attention", "registration"),
        )
    ),
)
REHEARSED_TESTS = (
    "tests/test_device.py::test_dropout_drops_its_share_and_repeats_with_its_seed",
    TESTS[2],
)
"""The others run among the tests anyway."""
TELLING = ("ours bf16, graphs", "P4 bf16", "P1 bf16")
"""The runs that are timed at every batch size."""


@dataclass(frozen=True)
class PlannedCase:
    """A line of the plan."""

    part: str
    name: str
    expected: float
    """Seconds, by estimate."""
    at_most: float
    """Seconds, if the part has as many left."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--plan", action="store_true", help="print what would run, and for how long"
    )
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with tiny shapes")
    parser.add_argument(
        "--parts", default=",".join(SECONDS), help=f"some of {', '.join(SECONDS)} (default: all)"
    )
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    parser.add_argument("--commit", help="of the sources, where there is no git to ask")
    options = parser.parse_args()
    asked = options.parts.split(",")
    if not set(asked) <= set(SECONDS):
        parser.error(f"--parts is {options.parts}; expected some of {', '.join(SECONDS)}")
    parts = [part for part in SECONDS if part in asked]
    if options.plan:
        print(describe_plan(make_plan(parts, options.rehearse)))
        return 0
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
    name = "-".join(["gpu_suite", place, record["date"], *(parts if len(parts) < 5 else [])])
    print(
        f"results: {output / name}.json, .md\n\n{describe_plan(make_plan(parts, options.rehearse))}"
    )
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the parts
    slack = 10 if options.rehearse else 1  # a CPU that is busy with other things is no failure

    def keep(row: object, **news: Any) -> None:
        """Print what is new, and write all there is."""
        print(json.dumps(row), flush=True)
        record.update(news, seconds=perf_counter() - began)
        save(output, name, describe_suite(record), record)

    job = {"limits": "quick" if options.rehearse else "full", "device": device}
    limits = run_child(THROUGHPUT, job, slack * LIMITS_SECONDS)
    keep(limits, limits=limits)
    for part in parts:
        seconds = slack * SECONDS[part]
        if part == "tests":
            result = run_tests(options.rehearse, seconds)
            keep(result, tests=result)
        elif part == "kernels":
            deadline = perf_counter() + seconds
            for job in plan_kernels(options.rehearse):
                left = min(slack * OPERATION_SECONDS, deadline - perf_counter())
                for row in run_kernel_job(job, max(1.0, left)):
                    keep(row, kernels=[*record.get("kernels", []), row])
        elif part == "seeds":
            jobs = plan_seeds(options.rehearse)
            for rows in run_jobs(SEEDS, jobs, seconds, slack * SEEDS_SECONDS):
                keep(rows[-1], seeds=rows)
        else:
            jobs, before = plan_stage(int(part[-1]), options.rehearse), record["rows"]
            for rows in run_jobs(THROUGHPUT, jobs, seconds, slack * CASE_SECONDS):
                keep(rows[-1], rows=[*before, *rows])

    print(
        f"\n{describe_suite(record)}\n\n{json.dumps(record)}\n\nwritten: {output / name}.md, .json"
    )
    return int(bool(failures(record)))


def plan_stage(stage: int, rehearse: bool) -> list[dict[str, Any]]:
    """The cases of a stage, the most telling first."""
    common: dict[str, Any] = {"model": "tiny", "data": "", "device": "cpu", "warmup": 1}
    if rehearse:
        # P0, P2 and P3 are run by the tests of the rivals' losses.
        runs = ["ours bf16"] if stage == 1 else [*TELLING, "ours bf16, Triton", "P6 bf16"]
        jobs = make_jobs(runs, (stage,), (4,), 12, **common)
        if stage == 2:
            jobs += [
                job | {"profile": True}
                for job in make_jobs(["ours bf16"], (2,), (4,), 12, **common)
            ]
        return [job | {"steps": 2, "warmup": 1} for job in jobs]

    common = {"model": "bert-base", "data": "", "device": "cuda", "warmup": 20}
    if stage == 1:
        common["texts"] = SST2_TEXTS

    def at(batch_size: int, *runs: str) -> list[dict[str, Any]]:
        num_texts = {16: 1_600, 64: 3_200, 512: 6_144}[batch_size]
        return make_jobs(runs, (stage,), (batch_size,), num_texts, **common)

    jobs = at(16, *TELLING, "ours bf16, Triton")
    if stage == 1:
        return jobs + at(64, *TELLING)
    jobs.append(jobs[0] | {"profile": True, "steps": 10})
    jobs += at(16, "ours bf16", "P2 bf16") + at(512, *TELLING) + at(64, *TELLING)
    # The last compiles for longer than the others take.
    return jobs + at(16, "P6 bf16", "P0 fp32", "P0 tf32", "P3 bf16")


def plan_seeds(rehearse: bool) -> list[dict[str, Any]]:
    """Five seeds in graphs; of those without, which take three times as long, one."""
    if rehearse:
        return make_seed_jobs(GPU_RUNS[-1:], "tiny", "", "cpu", 12, 2)
    jobs = [(run, 5 if run.startswith("graphs") else 1) for run in GPU_RUNS]
    return [
        job
        for run, seeds in jobs
        for job in make_seed_jobs((run,), "bert-base", "", "cuda", SST2_TEXTS, seeds)
    ]


def plan_kernels(rehearse: bool) -> list[dict[str, Any]]:
    """An operation each. tests/test_kernel_throughput.py rehearses those that are left out here."""
    return make_kernel_jobs("cpu")[:1] if rehearse else make_kernel_jobs("cuda")


def make_plan(parts: Sequence[str], rehearse: bool) -> list[PlannedCase]:
    """Everything that will run, in order."""
    cases = [PlannedCase("limits", "matrix products and copies", OTHERS_SECONDS, LIMITS_SECONDS)]
    for part in parts:
        limit = SECONDS[part]
        if part == "tests":
            cases.append(PlannedCase(part, "pytest", 300.0, limit))
        elif part == "kernels":
            jobs = plan_kernels(rehearse)
            names = [job["operation"] for job in jobs]
            cases += [PlannedCase(part, name, 60.0, OPERATION_SECONDS) for name in names]
        else:
            is_seeds = part == "seeds"
            jobs = plan_seeds(rehearse) if is_seeds else plan_stage(int(part[-1]), rehearse)
            for job in jobs:
                seconds = EXPECTED_SECONDS.get(job["run"], OTHERS_SECONDS)
                most = SEEDS_SECONDS if is_seeds else CASE_SECONDS
                cases.append(PlannedCase(part, describe_case(job), seconds, most))
    return cases


def describe_case(job: dict[str, Any]) -> str:
    if "seeds" in job:
        return f"{job['run']}, seeds: {job['seeds']}"
    return f"{'profile of ' * bool(job.get('profile'))}{job['run']}, batch {job['batch_size']}"


def describe_plan(cases: Sequence[PlannedCase]) -> str:
    """Each case with its seconds, and the sums, in Markdown."""
    lines: list[list[object]] = []
    for part in dict.fromkeys(case.part for case in cases):
        of_part = [case for case in cases if case.part == part]
        lines += [[part, c.name, f"{c.expected:.0f}", f"{c.at_most:.0f}"] for c in of_part]
        expected, most = sum(c.expected for c in of_part), SECONDS.get(part, LIMITS_SECONDS)
        lines.append([part, "**in all**", f"**{expected:.0f}**", f"**{most:.0f}**"])
    expected = sum(case.expected for case in cases)
    most = sum(SECONDS.get(part, LIMITS_SECONDS) for part in {case.part for case in cases})
    lines.append(["all", "**in all**", f"**{expected:.0f}**", f"**{most:.0f}**"])
    header = ["part", "case", "seconds, by estimate", "at most"]
    return f"The plan:\n\n{markdown_table(header, lines)}\n"


def run_tests(rehearse: bool, seconds: float) -> dict[str, Any]:
    """pytest's exit code (None: out of time), what failed, and the end of what it printed."""
    # Warnings are errors where the versions are ours; a GPU comes with versions of its own.
    # -P: the root, with its folder `kernels`, is to be on no path (`kernels` is another package).
    command = [sys.executable, "-P", "-W", "default", "-m", "pytest", "-W", "default"]
    command += ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider"]
    command += ["-rsfE", "-v", "--tb=short"]
    if find_spec("xdist") is not None and not rehearse:
        command += ["-n", "8"]
    if find_spec("pytest_benchmark") is not None:
        command += ["-p", "no:benchmark"]  # it warns beside xdist
    command += REHEARSED_TESTS if rehearse else TESTS
    began = perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        # A file, not a pipe: what has been printed is there whatever happens.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=printed,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Behind an `&` of a script's shell it would be ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        exit_code: int | None = None
        try:
            exit_code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # upon which pytest tells what has failed
            with suppress(subprocess.TimeoutExpired):
                process.wait(30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its workers, too
            process.wait()
        printed.seek(0)
        output = printed.read()
    if exit_code is None:
        output += f"\ntook longer than {seconds:.0f} s"
    return {
        "exit_code": exit_code,
        "seconds": round(perf_counter() - began, 1),
        "failed": re.findall(r"(?m)^(?:FAILED|ERROR) .*", output)
        or re.findall(r"(?m)^.*\b(?:FAILED|ERROR)\b.*", output),
        "output": output[-6_000:],
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
        f"stage {row['stage']}, {describe_case(row)}: {row['error']}"
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
        output = "\n".join([*tests["failed"], "", *lines])
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
