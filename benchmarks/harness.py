"""What every benchmark shares: a clock, the machine's limits, and a record of the run.

A speed is worth something beside the machine's own limits, measured in the same run: how fast it
multiplies large matrices and how fast it copies memory (bytes read plus bytes written). All inputs
are random: zeros can run faster than real data.
"""

import gc
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

import numpy as np
import torch

from twostage.fast.step import Step
from twostage.files import replacing
from twostage.machine import choose_device
from twostage.report import describe_machine, describe_versions
from twostage.training.stage import MakeStep, TakeStep

RESULTS = Path(__file__).parent / "results"


class Enough(Exception):
    """Ends a loop that would go on after the last step that is timed."""


class StepClock:
    """The time of each training step, from one tick to the next.

    A loop ticks once a step, always at the same place: where a step has returned, or where its loss
    is computed.

    On a GPU the host runs ahead, so the ticks are events on the device's own time line. The first
    `warmup` steps are left out of every figure but `warmup_seconds`. A profiler, if given, sees the
    steps that are timed. `ends_loop`: the last tick raises Enough.
    """

    def __init__(
        self,
        device: torch.device,
        warmup: int,
        steps: int,
        profiler: torch.profiler.profile | None = None,
        *,
        ends_loop: bool = False,
    ) -> None:
        self.device = device
        self.warmup = warmup
        self.steps = steps
        self.profiler = profiler
        self.ends_loop = ends_loop
        self.ticks: list[Any] = []
        self.losses: list[torch.Tensor] = []
        self.began = self.warmup_seconds = 0.0
        self.capture_seconds = 0.0
        """Spent on compiling kernels and recording graphs; for the loop to say."""

    def start(self) -> None:
        """The warm-up begins."""
        self.began = perf_counter()

    def tick(self, loss: torch.Tensor) -> torch.Tensor:
        """Call once a step with its loss; returns it."""
        self.losses.append(loss.detach())
        if len(self.ticks) == self.warmup:
            synchronize(self.device)
            self.warmup_seconds = perf_counter() - self.began
            if self.profiler is not None:
                self.profiler.start()
        elif self.profiler is not None and len(self.ticks) == self.warmup + self.steps:
            synchronize(self.device)
            self.profiler.stop()
        if self.device.type == "cuda":
            self.ticks.append(torch.cuda.Event(enable_timing=True))
            self.ticks[-1].record()
        else:
            self.ticks.append(perf_counter())
        if self.ends_loop and len(self.ticks) == self.warmup + self.steps + 1:
            raise Enough
        return loss

    def watch(self, loss_function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """The same loss, which ticks."""
        return lambda *arguments: self.tick(loss_function(*arguments))

    def step_seconds(self) -> np.ndarray:
        """[steps]: from the tick of one step to that of the next."""
        synchronize(self.device)
        assert len(self.ticks) == self.warmup + self.steps + 1, "one tick a step, and a last one"
        measured = self.ticks[self.warmup :]
        if self.device.type == "cuda":
            return np.array([a.elapsed_time(b) / 1e3 for a, b in pairwise(measured)])
        return np.diff(measured)

    def mean_loss(self, first: int, last: int) -> float:
        """Over the steps from `first` to `last`, counted from 0, both included."""
        return float(torch.stack(self.losses[first : last + 1]).float().mean())


def watch_steps(
    make_step: MakeStep,
    on_end: Callable[[float], object],
    on_step: Callable[[torch.Tensor], object] | None = None,
) -> MakeStep:
    """Ours with the same steps, watched from outside: the loss stays the function that it is.

    on_end: called once a stage, however it ends, with the seconds that went into compiling kernels
    and recording graphs. on_step: called after each step with its loss, in memory that the next
    replay of a graph writes to.
    """

    @contextmanager
    def make_watched(*arguments: Any) -> Iterator[TakeStep]:
        with make_step(*arguments) as step:
            assert isinstance(step, Step), "the fast step, which counts these seconds"

            def take_step(
                rows_B: np.ndarray, number: int, learning_rate: float
            ) -> tuple[torch.Tensor, torch.Tensor]:
                loss, grad_norm = step(rows_B, number, learning_rate)
                if on_step is not None:
                    on_step(loss)
                return loss, grad_norm

            try:
                yield take_step
            finally:
                on_end(step.capture_seconds)

    return make_watched


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class MemoryPeak:
    """The most memory that training takes, in bytes.

    On a GPU all that torch has reserved there, what lies in graphs' own pools included. On a CPU
    the peak of the process above what it held before the model was built, so that one's imports do
    not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before = 0
        if device.type == "cpu":
            gc.collect()
            self.before = memory_status("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far, as that of building the model."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def read(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        return memory_status("VmHWM") - self.before


def memory_status(name: str) -> int:
    """A line of the kernel's account of this process, in bytes (Linux)."""
    # Not getrusage: its maximum is inherited from the process that started this one.
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def measure_limits(device: torch.device, *, quick: bool = False) -> dict[str, float]:
    """Measured FLOP/s of a large matrix product in bf16 and fp32, and bytes/s of a large copy."""
    size = 512 if quick else 8192 if device.type == "cuda" else 3072
    limits: dict[str, float] = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_seconds(partial(torch.mm, a, b, out=out), device)
        limits[f"matmul_{name}_flops"] = 2 * size**3 / seconds
    count = 2**20 if quick else 2**30 if device.type == "cuda" else 2**26
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    limits["copy_bytes"] = 2 * source.nbytes / seconds
    return limits


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """After three calls to warm up."""
    times = []
    for _ in range(repeats + 3):
        synchronize(device)
        began = perf_counter()
        run()
        synchronize(device)
        times.append(perf_counter() - began)
    return float(np.median(times[3:]))


def describe_environment(device_name: str) -> dict[str, Any]:
    """Commit, machine, versions (the rivals' too) and command."""
    device = choose_device(device_name)
    machine = describe_machine(device)
    if device.type == "cuda":
        machine["power_limit"] = _power_limit(device)
    return {
        "commit": _commit(),
        "machine": machine,
        "versions": describe_versions() | _rival_versions(),
        "command": " ".join(["python", *sys.argv]),
    }


def run_child(script: Path, job: dict[str, Any], timeout: float) -> dict[str, Any]:
    """`python script --job JSON` in a process of its own; the last line it prints is the result.

    A process a case keeps peak memory and caches apart, and a failure from ending the run: it is
    returned as {"error": …}. What torch.compile left on the disk in earlier runs is out of reach.
    """
    *_, result = run_child_rows(script, job, timeout)
    return result


def run_child_rows(script: Path, job: dict[str, Any], timeout: float) -> Iterator[dict[str, Any]]:
    """The same, for a script that prints a JSON object a row: each row as soon as it is printed.

    A child that fails, prints nothing or takes longer than `timeout` seconds keeps the rows that it
    has printed; what went wrong follows them as {"error": …}.
    """
    command = [sys.executable, str(script), "--job", json.dumps(job)]
    deadline = perf_counter() + timeout
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        with stdout.open("wb") as out, stderr.open("wb") as err:
            # Into files: a pipe would stay open, and we waiting, as long as the workers of a
            # torch.compile that was cut off hold it.
            process = subprocess.Popen(
                command,
                env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(Path(folder, "compiled"))},
                stdout=out,
                stderr=err,
            )
        num_rows = 0
        try:
            with stdout.open(encoding="utf-8", errors="replace") as printed:
                for row in _rows_until_it_ends(process, printed, deadline):
                    num_rows += 1
                    yield row
            if process.poll() is None:
                yield {"error": f"took longer than {timeout:.0f} s"}
            elif process.returncode != 0 or num_rows == 0:
                text = stderr.read_text(encoding="utf-8", errors="replace")
                yield describe_failure(process.returncode, text)
        finally:
            process.kill()
            process.wait()


def _rows_until_it_ends(
    process: subprocess.Popen[bytes], printed: TextIO, deadline: float
) -> Iterator[dict[str, Any]]:
    """What it prints, until it has ended or the time is up."""
    line = ""
    while True:
        # Looked at before reading: what it has printed last is then there.
        is_over = process.poll() is not None or perf_counter() >= deadline
        while part := printed.readline():
            line += part
            if not line.endswith("\n"):
                break  # the rest of it is on its way
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    yield row
            line = ""
        if is_over:
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(0.05, max(0.0, deadline - perf_counter())))


def describe_failure(exit_code: int, stderr: str) -> dict[str, Any]:
    """The telling line as "error", and the end of it all."""
    lines = stderr.strip().splitlines() or [f"no result, exit code {exit_code}"]
    # The last line is not always the telling one: CUDA's errors go on for a few more.
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return {"error": (named or lines)[-1][:500], "stderr": "\n".join(lines)[-3_000:]}


def run_jobs(
    script: Path,
    jobs: Sequence[dict[str, Any]],
    seconds: float = math.inf,
    seconds_a_job: float = 1_200,
) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each job; what is left when the time is up is an error in its row."""
    deadline = perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    for job in jobs:
        left = deadline - perf_counter()
        result = {"error": "no time left"}
        if left > 0:
            result = run_child(script, job, min(left, seconds_a_job))
        rows.append(job | result)
        yield rows


def put(module: object, name: str, stand_in: object) -> None:
    """Replace what is there; where the name is gone, that is an error."""
    assert hasattr(module, name), f"{module} has no {name}"
    setattr(module, name, stand_in)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table whose numeric columns are aligned to the right."""
    lines = [f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows]
    rule = "|".join(["---", *["---:"] * (len(header) - 1)])
    return "\n".join([f"| {' | '.join(header)} |", f"|{rule}|", *lines])


def save(folder: Path, name: str, markdown: str, record: dict[str, Any]) -> None:
    """`NAME.md` and `NAME.json`."""
    for end, content in (("md", markdown), ("json", json.dumps(record))):
        with replacing(folder / f"{name}.{end}") as file:
            file.write(content + "\n")


def describe_place(record: dict[str, Any]) -> str:
    """`cpu`, or the GPU's name, for a file's name."""
    machine = record["machine"]
    return "cpu" if "amx_bf16" in machine else machine["device"].replace(" ", "-")


def _rival_versions() -> dict[str, str]:
    versions = {}
    for name in ("transformers", "accelerate", "openai", "triton"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    if torch.version.cuda is not None:
        versions["cuda"] = torch.version.cuda
    return versions


def _commit() -> str:
    """Of the sources, `-dirty` if they have been changed since; results do not count."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        try:
            answer = subprocess.run(
                ["git", *arguments], cwd=here, capture_output=True, text=True, check=False
            )
        except FileNotFoundError:
            return ""
        return answer.stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return head + ("-dirty" if changed else "")


def _power_limit(device: torch.device) -> str:
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = answer.stdout.strip().splitlines()
    index = device.index or 0
    return lines[index] if index < len(lines) else "unknown"
