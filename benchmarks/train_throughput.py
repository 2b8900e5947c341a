"""How fast does a stage train, ours and the rivals, on the same texts in the same order?

    python benchmarks/train_throughput.py --data demo             MiniLM on critics' snippets
    python benchmarks/train_throughput.py --model bert-base       BERT-base's shape, no network
    python benchmarks/train_throughput.py --data demo --profile   where the time of ours goes

Each case runs in a process of its own, after `--warmup` steps that are reported apart. The rivals
are described in `peers.py`; they need transformers and accelerate (`pip install -e '.[bench]'`).
Prints tables, then one JSON line, and writes both to `benchmarks/results/`. With `--profile` it
only prints the operations on which ours in bf16 spends its time, in both stages at the first of
the batch sizes, and writes nothing; a full run keeps the same profiles among its results.

Ours is `train_stage` with the fast step, as `twostage train` calls it, in a process that keeps
freed memory as that command does (`twostage/memory.py`). In stage 2 it has the whole data set
before it, hence all of its words to train, and is stopped after the steps on the clock. In stage 1
it computes the frozen layers for many steps at once, so a few steps say nothing: there the clock
runs over a whole epoch, from the call of `train_stage` on a fresh model to its return, after a run
on another model that warms up. A rival gets the texts of the first steps of that epoch, and is
timed step by step in both stages. `mean loss` is over the same steps for all.

`ours bf16, graphs` takes whole steps as CUDA graphs (`fast/graphs.py`); on a CPU the same steps run
eagerly. `capture s` is the time that its kernels, and those of `ours bf16, Triton`, take to be
compiled for all lengths of text, and the graphs to be recorded: before the first step, so in the
warm-up, but in stage 1 on the clock.

A step is timed from one tick to the next. Ours ticks when the call of a step returns, and so does
P4; the other rivals tick where a loss is computed. On a GPU a tick is an event on the device's own
time line.

`examples/s` counts all of the time on the clock; `at p50` is what it would be if every step took
the median's, so a gap between the two is the work of a few slow steps. It is empty where the clock
runs over a whole epoch.

Under torch.compile the first steps are those that compile. They get more warm-up (`WARM_UP`), so
the steps on the clock, and those of the mean loss, come a few later. A shape that compiles anew
after that is on the clock, and memory includes the compiler's. `ours bf16, compiled` is an
experiment, not something that the package does: its layers under torch.compile, all but attention.

Two limits are measured in the same run. `matmul`: the share of the machine's bf16 matrix rate that
the least work of the recipe would take (`needed_flops` in `workload.py`: real tokens, nothing that
is frozen or unread). `copy`: the same for the bytes of weights and optimizer (`needed_bytes`).
"""

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from harness import (
    Enough,
    MemoryPeak,
    StepClock,
    describe_environment,
    describe_place,
    markdown_table,
    measure_limits,
    put,
    run_child,
    run_jobs,
    save,
    synchronize,
    watch_steps,
)
from torch import Tensor
from workload import Workload, make_parser, make_workload, needed_bytes, needed_flops

from twostage.assets.data_sets import fetch_demo
from twostage.data.samplers import random_batches
from twostage.fast.step import make_step
from twostage.machine import choose_device
from twostage.memory import keep_freed_memory
from twostage.model.checkpoint import build_model
from twostage.recipe import Recipe
from twostage.training.losses import Loss, cross_entropy
from twostage.training.stage import StageSettings, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top, stage_1_signal

SEED = 7
LEARNING_RATES = {1: 1e-4, 2: 1e-5}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "ours fp32": ("ours", {"bf16": False}),
    "ours bf16": ("ours", {"bf16": True}),
    "ours bf16, Triton": ("ours", {"bf16": True, "impl": "triton"}),
    "ours bf16, graphs": ("ours", {"bf16": True, "impl": "triton", "graphs": True}),
    "P0 fp32": ("P0", {}),
    "P0 tf32": ("P0", {"tf32": True}),
    "P1 fp32": ("Trainer", {"bf16": False}),
    "P1 bf16": ("Trainer", {"bf16": True}),
    "P2 bf16": ("Trainer", {"bf16": True, "tuned": True}),
    "P2 bf16, by length": ("Trainer", {"bf16": True, "tuned": True, "group_by_length": True}),
    "P4 bf16": ("P4", {}),
    "P6 bf16": ("Trainer", {"bf16": True, "tuned": True, "packed": True}),
    "P3 bf16": ("Trainer", {"bf16": True, "tuned": True, "compiled": True}),
    "ours bf16, compiled": ("ours", {"bf16": True, "compiled": True}),
}
"""Name in the table: (loop, its settings)."""
WARM_UP = {"P3 bf16": 24, "ours bf16, compiled": 24, "ours bf16, graphs": 60}
"""Steps before the clock, where these are more than the others have."""
MEMORY_BATCH_SIZE = 256
"""From here on the question is memory more than speed, and the steps are few."""
MIN_STEPS = 6


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", help=f"some of: {'; '.join(RUNS)} (default: all that make sense)")
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--batch-sizes", help="(default: 16,64, and on a CPU 256)")
    parser.add_argument("--warmup", type=int, default=8, help="steps before the clock")
    parser.add_argument("--texts", type=int, default=960, help="on the clock, in every case")
    parser.add_argument("--profile", action="store_true", help="of ours alone, to the screen alone")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return
    if options.model == "minilm":
        fetch_demo(options.data)
    stages = [int(stage) for stage in options.stages.split(",")]
    on_gpu = choose_device(options.device).type == "cuda"
    default_sizes = "16,64" if on_gpu else "16,64,256"
    batch_sizes = [int(size) for size in (options.batch_sizes or default_sizes).split(",")]
    common = {
        "model": options.model,
        "data": str(options.data),
        "device": options.device,
        "warmup": options.warmup,
    }
    profiles = [
        job | {"profile": True}
        for job in make_jobs(
            ("ours bf16",),
            sorted(stages, reverse=True),
            batch_sizes[:1],
            10 * batch_sizes[0],
            **common,
        )
    ]
    if options.profile:
        for rows in run_jobs(Path(__file__), profiles):
            print(f"{describe_profile(rows[-1])}\n", flush=True)
        return
    jobs = []
    for stage in stages:
        for size in batch_sizes:
            if options.runs:
                runs = options.runs.split("; ")
            else:
                runs = list(RUNS) if on_gpu else cpu_runs(stage, size)
            jobs += make_jobs(runs, (stage,), (size,), options.texts, **common)
    jobs += profiles
    record = describe_environment(options.device)
    limits = {"limits": "quick" if options.model == "tiny" else "full", "device": options.device}
    record["limits"] = run_child(Path(__file__), limits, 300)
    name = f"train_throughput-{options.model}-{describe_place(record)}"
    for rows in run_jobs(Path(__file__), jobs):
        record["rows"] = rows
        print(json.dumps(rows[-1]), flush=True)
        save(options.output, name, describe(record), record)
    print(f"\n{describe(record)}\n\n{json.dumps(record)}")


def make_jobs(
    runs: Sequence[str],
    stages: Sequence[int],
    batch_sizes: Sequence[int],
    num_texts: int,
    **common: Any,
) -> list[dict[str, Any]]:
    """Every run for every batch size and stage, at least `num_texts` on the clock in each."""
    jobs = []
    for stage in stages:
        for size in batch_sizes:
            for run in runs:
                job: dict[str, Any] = {"run": run, "stage": stage, "batch_size": size} | common
                job["steps"] = max(MIN_STEPS, -(-num_texts // size))
                warmup = max(job["warmup"], WARM_UP.get(run, 0))
                if size >= MEMORY_BATCH_SIZE:
                    warmup = min(warmup, WARM_UP.get(run, 0) // 4 or 4)
                job["warmup"] = warmup
                jobs.append(job)
    return jobs


def cpu_runs(stage: int, batch_size: int) -> list[str]:
    """What is worth its minutes on a CPU."""
    if batch_size >= MEMORY_BATCH_SIZE:
        return ["ours bf16", "P1 bf16", "P2 bf16"] if stage == 2 else []
    # Made for graphs, compiled for GPUs alone, with attention or products that a CPU lacks.
    on_gpus = ("P4 bf16", "P6 bf16", "P0 tf32", "ours bf16, Triton", "ours bf16, graphs")
    runs = [name for name in RUNS if name not in on_gpus]
    if batch_size > 16:
        return [name for name in runs if name not in ("ours fp32", "P1 fp32", *WARM_UP)]
    return runs


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time one case in this process; `profile` adds what the steps spend their time on."""
    device = choose_device(job["device"])
    if job.get("limits"):
        return measure_limits(device, quick=job["limits"] == "quick")
    case = make_case(job, device)
    if case.is_ours:
        keep_freed_memory()
        if RUNS[job["run"]][1].get("compiled"):
            compile_layers(job.get("compiled_by", "inductor"))
    else:
        # Before memory is looked at: imports do not count.
        import peers  # noqa: F401
        import transformers

        _ = transformers.Trainer
    if job["stage"] == 1 and case.is_ours:
        return time_whole_stage(case)
    return time_steps(case)


@dataclass(frozen=True)
class Case:
    """What one process times."""

    job: dict[str, Any]
    device: torch.device
    workload: Workload
    batches: list[np.ndarray]
    """Rows of the texts, in the order of the stage's first epoch; the last may be smaller."""
    profiler: torch.profiler.profile | None

    @property
    def is_ours(self) -> bool:
        return RUNS[self.job["run"]][0] == "ours"

    def lengths(self, batch: np.ndarray) -> np.ndarray:
        """Tokens of each text."""
        lengths_B: np.ndarray = self.workload.data.store.lengths.numpy()[batch]
        return lengths_B


def make_case(job: dict[str, Any], device: torch.device) -> Case:
    # One step more than is timed: the first tick after the warm-up only starts the clock.
    num_texts = (job["warmup"] + job["steps"] + 1) * job["batch_size"]
    dropout, of_data = job.get("dropout", 0.1), job.get("texts")
    workload = make_workload(job["model"], num_texts, Path(job["data"]), dropout, of_data)
    order = (SEED, job["stage"])  # as `train_stage` has it
    batches = random_batches(len(workload.data), job["batch_size"], order, epoch=0)
    profiler = make_profiler(device) if job.get("profile") else None
    return Case(job, device, workload, batches, profiler)


def time_steps(case: Case) -> dict[str, Any]:
    """Rate the steps after the warm-up, from tick to tick."""
    warmup, steps = case.job["warmup"], case.job["steps"]
    clock = StepClock(case.device, warmup, steps, case.profiler, ends_loop=case.is_ours)
    seen: list[list[int]] = []  # by a loop that makes batches of its own
    memory = MemoryPeak(case.device)
    train = prepare(case, clock, seen.append)
    memory.reset()
    clock.start()
    with suppress(Enough):
        train()

    step_seconds = clock.step_seconds()
    timed = slice(warmup + 1, warmup + 1 + steps)
    lengths = [np.array(lengths_B) for lengths_B in seen] or [*map(case.lengths, case.batches)]
    result = rate(case, float(step_seconds.sum()), step_seconds, lengths[timed])
    if seen:  # the texts on the clock may be longer or shorter than the others'
        mean_length = np.concatenate([*map(case.lengths, case.batches[: len(seen)])]).mean()
        result["examples_per_second"] = result["tokens_per_second"] / float(mean_length)
    slow = result["mean_step_ms"] / result["step_ms_p20_p50_p80"][1]
    result["examples_per_second_at_p50"] = result["examples_per_second"] * slow
    return result | {
        "warmup_seconds": round(clock.warmup_seconds, 2),
        "capture_seconds": round(clock.capture_seconds, 2),
        "peak_memory_mib": round(memory.read() / 2**20),
        "mean_loss": clock.mean_loss(warmup + 1, warmup + steps),
    }


def time_whole_stage(case: Case) -> dict[str, Any]:
    """Rate an epoch of ours from call to return, with all that is done once or for many steps."""
    warmup, steps, device = case.job["warmup"], case.job["steps"], case.device
    memory = MemoryPeak(device)
    began = perf_counter()
    with suppress(Enough):
        prepare(case, StepClock(device, 0, warmup, ends_loop=True))()
    synchronize(device)
    warmup_seconds = perf_counter() - began

    clock = StepClock(device, 0, len(case.batches) - 1)
    train = prepare(case, clock)
    memory.reset()
    with case.profiler or nullcontext():
        began = perf_counter()
        train()
        synchronize(device)
        seconds = perf_counter() - began
    lengths = [*map(case.lengths, case.batches)]
    return rate(case, seconds, clock.step_seconds(), lengths) | {
        "warmup_seconds": round(warmup_seconds, 2),
        "capture_seconds": round(clock.capture_seconds, 2),
        "peak_memory_mib": round(memory.read() / 2**20),
        "mean_loss": clock.mean_loss(warmup + 1, warmup + steps),
    }


def rate(
    case: Case, seconds: float, step_seconds: np.ndarray, lengths: list[np.ndarray]
) -> dict[str, Any]:
    """What was done in `seconds`. lengths: tokens of each text, for each batch."""
    config, stage = case.workload.checkpoint.config, case.job["stage"]
    flops = sum(needed_flops(config, lengths_B, stage) for lengths_B in lengths)
    p20, p50, p80 = (round(1e3 * q, 3) for q in np.quantile(step_seconds, (0.2, 0.5, 0.8)))
    result = {
        "texts_timed": sum(map(len, lengths)),
        "examples_per_second": sum(map(len, lengths)) / seconds,
        "tokens_per_second": float(sum(map(np.sum, lengths)) / seconds),
        "needed_flops_per_second": float(flops / seconds),
        "needed_bytes_per_second": needed_bytes(config, stage) * len(lengths) / seconds,
        "step_ms_p20_p50_p80": [p20, p50, p80],
        "mean_step_ms": round(1e3 * float(step_seconds.mean()), 3),
    }
    if case.profiler is not None:
        result |= read_profile(case.profiler, case.device, len(lengths))
    return result


def prepare(
    case: Case, clock: StepClock, on_batch: Callable[[list[int]], None] | None = None
) -> Callable[[], None]:
    """Build the model and lay out the texts; the training is what is returned.

    on_batch: gets the lengths of the texts in each batch, if the loop makes batches of its own.
    """
    job, device, data = case.job, case.device, case.workload.data
    loop, settings = RUNS[job["run"]]
    stage, batch_size = job["stage"], job["batch_size"]
    learning_rate = job.get("learning_rate", LEARNING_RATES[stage])
    num_steps = job["warmup"] + job["steps"] + 1  # of a rival
    generator = torch.Generator().manual_seed(SEED)
    ours = build_model(case.workload.checkpoint, 2, generator)
    if loop == "ours":
        ours.to(device)
        loss: Loss = cross_entropy
        if stage == 1:
            freeze_below_top(ours, 1)
            loss = stage_1_signal(data, None, 2, Recipe(), device)[1]
        stage_settings = StageSettings(
            epochs=1, learning_rate=learning_rate, batch_size=batch_size, schedule_steps=num_steps
        )
        graphs = settings.get("graphs", False)

        def note(seconds: float) -> None:
            clock.capture_seconds = seconds

        def tick(loss: Tensor) -> None:
            clock.tick(loss.clone() if graphs else loss)  # every replay writes to the same memory

        make = partial(make_step, impl=settings.get("impl", "torch"), graphs=graphs)
        return partial(
            train_stage,
            TrainingState(SEED, ours, stage=stage),
            data,
            loss,
            stage_settings,
            dtype=torch.bfloat16 if settings["bf16"] else torch.float32,
            make_step=watch_steps(make, on_end=note, on_step=tick),
        )

    import peers

    loss = peers.stage_loss(stage, data.class_counts(2), device)
    attention = "eager" if loop == "P0" else "sdpa"
    if settings.get("packed"):
        attention = peers.PACKED
    # The others' losses are computed where no clock can tick, in what is compiled or captured.
    watched = clock.watch(loss) if loop == "P0" else loss
    model = peers.PeerClassifier(ours, attention, watched).to(device)
    if stage == 1:
        model.freeze_below_last_layer()
    store = data.store
    texts = [
        {
            "input_ids": store.ids[store.offsets[i] : store.offsets[i + 1]],
            "labels": int(data.labels_N[i]),
        }
        for i in np.concatenate(case.batches[:num_steps])
    ]
    common = (model, texts, batch_size, learning_rate, device)
    if loop == "P0":
        return lambda: peers.train_published(*common, tf32=settings.get("tf32", False))
    if loop == "P4":
        return lambda: peers.train_with_graphs(*common, clock)
    return lambda: peers.train_with_trainer(
        *common,
        bf16=settings["bf16"],
        tuned=settings.get("tuned", False),
        group_by_length=settings.get("group_by_length", False),
        compiled_by=job.get("compiled_by", "inductor") if settings.get("compiled") else None,
        packed=settings.get("packed", False),
        on_loss=clock.tick,
        on_batch=on_batch if settings.get("group_by_length") else None,
    )


def compile_layers(backend: str) -> None:
    """Put every layer of our encoder under torch.compile, in this process.

    Attention stays out of it: its shapes depend on how the texts of a batch fit together, and each
    new coincidence among them (a batch without filler tokens, one with two texts to a strip)
    is compiled anew for many seconds. So do the random bits of dropout: dynamo has no
    `Tensor.random_` with a generator, and inductor fails on the view of them as 16-bit numbers.
    """
    from twostage.kernels import dropout
    from twostage.model import bert

    for module, name in (
        (dropout, "_random_lanes"),
        (bert, "packed_attention"),
        (bert, "first_token_attention"),
    ):
        setattr(module, name, torch.compiler.disable(getattr(module, name)))
    for name in ("forward", "forward_first_tokens"):
        whole = getattr(bert.BertLayer, name)
        put(bert.BertLayer, name, torch.compile(whole, dynamic=True, backend=backend))


def make_profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def read_profile(
    profiler: torch.profiler.profile, device: torch.device, steps: int, count: int = 16
) -> dict[str, Any]:
    """The operations (on a GPU: kernels) that take the most time themselves, and what all take."""
    on_gpu = device.type == "cuda"

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = [
        event
        for event in profiler.key_averages()
        if own_time(event) > 0 and not getattr(event, "is_user_annotation", False)
    ]
    if on_gpu:  # kernels alone: the operations that launch them carry the same time again
        events = [event for event in events if event.device_type.name == "CUDA"]
    total = sum(map(own_time, events))
    top = [
        {
            "operation": event.key[:90],
            "share": round(own_time(event) / total, 4),
            "ms_per_step": round(own_time(event) / 1e3 / steps, 4),
            "calls_per_step": round(event.count / steps, 1),
        }
        for event in sorted(events, key=own_time, reverse=True)[:count]
    ]
    return {
        "profile": top,
        "operations_per_step": round(sum(event.count for event in events) / steps, 1),
        "operations_ms_per_step": round(total / 1e3 / steps, 4),
    }


def describe(record: dict[str, Any]) -> str:
    """The tables of all cases so far, and the profiles, in Markdown."""
    limits = record["limits"]
    rows = [row for row in record["rows"] if not row.get("profile")]
    speeds = {
        (row["run"], row["stage"], row["batch_size"]): row["examples_per_second"]
        for row in rows
        if "error" not in row
    }
    header = ["run", "stage", "batch", "examples/s", "at p50", "× P0", "× P1 bf16"]
    header += ["real tokens/s"]
    header += ["step ms, p50 (p20-p80)", "of matmul", "of copy", "memory MiB", "warm-up s"]
    header += ["capture s", "mean loss"]
    lines = []
    for row in rows:
        case = (row["stage"], row["batch_size"])
        head = [row["run"], *case]
        if "error" in row:
            blank = [""] * (len(header) - len(head) - 1)
            lines.append([*head, f"failed: {row['error']}", *blank])
            continue
        speed, at_p50 = row["examples_per_second"], row.get("examples_per_second_at_p50")
        p20, p50, p80 = row["step_ms_p20_p50_p80"]
        lines.append(
            [
                *head,
                f"{speed:.1f}",
                f"{at_p50:.1f}" if at_p50 else "",
                ratio(speed, speeds.get(("P0 fp32", *case))),
                ratio(speed, speeds.get(("P1 bf16", *case))),
                f"{row['tokens_per_second']:.0f}",
                f"{p50:.1f} ({p20:.1f}-{p80:.1f})",
                share(row["needed_flops_per_second"], limits.get("matmul_bf16_flops")),
                share(row["needed_bytes_per_second"], limits.get("copy_bytes")),
                row["peak_memory_mib"],
                row["warmup_seconds"],
                row.get("capture_seconds") or "",
                f"{row['mean_loss']:.4f}",
            ]
        )
    machine = record["machine"]
    parts = [
        f"{machine['device']}, {machine['threads']} threads, torch {record['versions']['torch']}, "
        f"commit {record['commit']}: {record['command']}",
        f"Limits measured in this run: {describe_limits(limits)}.",
        markdown_table(header, lines),
    ]
    batch_sizes = dict.fromkeys(row["batch_size"] for row in rows)
    parts += filter(None, (describe_both_stages(speeds, size) for size in batch_sizes))
    for row in record["rows"]:
        if row.get("profile"):
            same = [r for r in rows if "error" not in r and case_of(r) == case_of(row)]
            parts.append(describe_profile(row, same[0]["step_ms_p20_p50_p80"][1] if same else None))
    return "\n\n".join(parts)


def describe_both_stages(speeds: dict[tuple[str, int, int], float], batch_size: int) -> str:
    """Time to train an example in stage 1 and then in stage 2; empty where one is missing.

    speeds: examples a second by (run, stage, batch size).
    """
    seconds = {
        run: sum(1 / speeds[run, stage, batch_size] for stage in (1, 2))
        for run in ("ours bf16", "P1 bf16", "P0 fp32")
        if all((run, stage, batch_size) in speeds for stage in (1, 2))
    }
    ours = seconds.pop("ours bf16", None)
    if ours is None or not seconds:
        return ""
    rivals = [f"{run} {1e3 * s:.3g} ms ({s / ours:.2f} ×)" for run, s in seconds.items()]
    return (
        f"Both stages at batch {batch_size}, an example in each: ours bf16 {1e3 * ours:.3g} ms, "
        f"{', '.join(rivals)}."
    )


def ratio(speed: float, reference: float | None) -> str:
    return f"{speed / reference:.2f}" if reference else ""


def describe_limits(limits: dict[str, Any]) -> str:
    if "error" in limits:
        return f"failed: {limits['error']}"
    return (
        f"bf16 matmul {limits['matmul_bf16_flops'] / 1e12:.3g} TFLOP/s, fp32 "
        f"{limits['matmul_fp32_flops'] / 1e12:.3g}, copy {limits['copy_bytes'] / 1e9:.3g} GB/s"
    )


def share(part: float, whole: float | None) -> str:
    return f"{part / whole:.1%}" if whole else ""


def case_of(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["run"], row["stage"], row["batch_size"]


def describe_profile(row: dict[str, Any], step_ms: float | None = None) -> str:
    """The operations of a step. step_ms: what the same step takes where no profiler slows it."""
    title = f"Where a step goes: {row['run']}, stage {row['stage']}, batch {row['batch_size']}"
    if "error" in row:
        return f"{title}: failed: {row['error']}"
    cells = [
        [f"`{p['operation']}`", f"{p['share']:.1%}", p["ms_per_step"], p["calls_per_step"]]
        for p in row["profile"]
    ]
    busy, step = row["operations_ms_per_step"], step_ms or row["mean_step_ms"]
    in_all = (
        f"{row['operations_per_step']:.0f} operations a step, {busy:.3g} ms of {step:.3g} "
        f"({'median without' if step_ms else 'with'} the profiler); gaps: {step - busy:.3g} ms"
    )
    table = markdown_table(["operation", "share", "ms", "calls"], cells)
    return f"{title}\n\n{in_all}\n\n{table}"


if __name__ == "__main__":
    main()
