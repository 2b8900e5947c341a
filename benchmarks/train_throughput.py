"""How fast does a stage train, ours and the rivals, on the same texts in the same order?

    python benchmarks/train_throughput.py --data demo             MiniLM on critics' snippets
    python benchmarks/train_throughput.py --model bert-base       BERT-base's shape, no network

Each case runs in a process of its own, after `--warmup` steps that are reported apart. The rivals
are described in `peers.py`; they need transformers and accelerate (`pip install -e '.[bench]'`).
Prints a table, then one JSON line, and writes both to `benchmarks/results/`.

Two limits are measured in the same run. `matmul`: the share of the machine's bf16 matrix rate that
the least work of the recipe would take (`needed_flops` in `workload.py`: real tokens, nothing that
is frozen or unread). `copy`: the same for the bytes of weights and optimizer (`needed_bytes`).
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from harness import (
    RESULTS,
    MemoryPeak,
    StepClock,
    describe_environment,
    markdown_table,
    measure_limits,
    run_child,
    save,
)
from workload import MODELS, Workload, make_workload, needed_bytes, needed_flops

from twostage.assets.data_sets import fetch_demo
from twostage.data.samplers import random_batches
from twostage.model.checkpoint import build_model
from twostage.training.losses import cross_entropy, make_loss
from twostage.training.precision import choose_device
from twostage.training.stage import StageSettings, train_stage
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top

SEED = 7
LEARNING_RATES = {1: 1e-4, 2: 1e-5}
RUNS = {
    "ours fp32": ("ours", {"bf16": False}),
    "ours bf16": ("ours", {"bf16": True}),
    "P0 fp32": ("P0", {}),
    "P1 fp32": ("Trainer", {"bf16": False}),
    "P1 bf16": ("Trainer", {"bf16": True}),
    "P2 bf16": ("Trainer", {"bf16": True, "tuned": True}),
    "P2 bf16, by length": ("Trainer", {"bf16": True, "tuned": True, "group_by_length": True}),
    "P4 bf16": ("P4", {}),
}
"""Name in the table: (loop, its settings)."""
CPU_RUNS = tuple(name for name in RUNS if name != "P4 bf16")  # P4 is made for graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="minilm", choices=MODELS)
    parser.add_argument("--data", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", help=f"some of: {'; '.join(RUNS)} (default: all that make sense)")
    parser.add_argument("--stages", default="1,2")
    parser.add_argument("--batch-sizes", default="16,64")
    parser.add_argument("--warmup", type=int, default=8, help="steps before the clock")
    parser.add_argument("--texts", type=int, default=960, help="on the clock, in every case")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return
    if options.model == "minilm":
        fetch_demo(options.data)
    on_gpu = choose_device(options.device).type == "cuda"
    runs = options.runs.split("; ") if options.runs else list(RUNS) if on_gpu else CPU_RUNS
    jobs = make_jobs(
        runs,
        [int(stage) for stage in options.stages.split(",")],
        [int(size) for size in options.batch_sizes.split(",")],
        options.texts,
        model=options.model,
        data=str(options.data),
        device=options.device,
        warmup=options.warmup,
    )
    jobs += [
        job | {"profile": True, "steps": 10}
        for job in jobs
        if job["run"] == "ours bf16" and job["batch_size"] == jobs[0]["batch_size"]
    ]
    record = describe_environment(options.device)
    record["limits"] = run_child(Path(__file__), {"limits": "full", "device": options.device}, 300)
    name = f"train_throughput-{options.model}-{describe_place(record)}"
    for rows in run_jobs(jobs):
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
    """Every run for every batch size and stage, `num_texts` on the clock in each."""
    return [
        {"run": run, "stage": stage, "batch_size": size, "steps": -(-num_texts // size)} | common
        for stage in stages
        for size in batch_sizes
        for run in runs
    ]


def run_jobs(
    jobs: list[dict[str, Any]], seconds: float = math.inf, seconds_a_job: float = 1_200
) -> Iterator[list[dict[str, Any]]]:
    """The rows so far, after each job; what is left when the time is up is an error in its row."""
    deadline = perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    for job in jobs:
        left = deadline - perf_counter()
        result = {"error": "no time left"}
        if left > 0:
            result = run_child(Path(__file__), job, min(left, seconds_a_job))
        rows.append(job | result)
        yield rows


def describe_place(record: dict[str, Any]) -> str:
    """`cpu`, or the GPU's name, for a file's name."""
    machine = record["machine"]
    return "cpu" if "amx_bf16" in machine else machine["device"].replace(" ", "-")


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Time one case in this process; `profile` adds what the steps spend their time on."""
    device = choose_device(job["device"])
    if job.get("limits"):
        return measure_limits(device, quick=job["limits"] == "quick")
    batch_size, steps, warmup = job["batch_size"], job["steps"], job["warmup"]
    # One step more than is timed: a step ends where the next computes its loss.
    num_texts = (warmup + steps + 1) * batch_size
    dropout = job.get("dropout", 0.1)
    workload = make_workload(job["model"], num_texts, Path(job["data"]), dropout)
    order = np.concatenate(random_batches(num_texts, batch_size, (SEED, job["stage"]), epoch=0))
    profiler = make_profiler(device) if job.get("profile") else None
    clock = StepClock(device, warmup, steps, profiler)

    lengths_N = workload.data.store.lengths.numpy()
    batches = [lengths_N[rows] for rows in order.reshape(-1, batch_size)]
    seen: list[list[int]] = []  # by a loop that makes batches of its own
    memory = MemoryPeak(device)
    train = prepare(workload, order, job, device, clock, seen.append)
    memory.reset()
    clock.start()
    train()

    seconds = clock.step_seconds()
    timed = [np.array(lengths_B) for lengths_B in (seen or batches)[warmup + 1 :]]
    assert len(timed) == steps
    tokens_per_second = float(sum(map(np.sum, timed)) / seconds.sum())
    examples_per_second = steps * batch_size / seconds.sum()
    if seen:  # the texts on the clock may be longer or shorter than the others'
        examples_per_second = tokens_per_second / float(lengths_N.mean())
    config = workload.checkpoint.config
    flops = sum(needed_flops(config, lengths_B, job["stage"]) for lengths_B in timed)
    p20, p50, p80 = (round(1e3 * q, 3) for q in np.quantile(seconds, (0.2, 0.5, 0.8)))
    result = {
        "examples_per_second": examples_per_second,
        "tokens_per_second": tokens_per_second,
        "needed_flops_per_second": float(flops / seconds.sum()),
        "needed_bytes_per_second": needed_bytes(config, job["stage"]) / float(np.mean(seconds)),
        "step_ms_p20_p50_p80": [p20, p50, p80],
        "warmup_seconds": round(clock.warmup_seconds, 2),
        "peak_memory_mib": round(memory.read() / 2**20),
        "mean_loss": clock.mean_loss(),
    }
    if profiler is not None:
        result["profile"] = top_operations(profiler, device, steps)
    return result


def prepare(
    workload: Workload,
    order: np.ndarray,
    job: dict[str, Any],
    device: torch.device,
    clock: StepClock,
    on_batch: Callable[[list[int]], None],
) -> Callable[[], None]:
    """Build the model and lay out the texts; the training is what is returned.

    on_batch: gets the lengths of the texts in each batch, if the loop makes batches of its own.
    """
    loop, settings = RUNS[job["run"]]
    stage, batch_size = job["stage"], job["batch_size"]
    learning_rate = job.get("learning_rate", LEARNING_RATES[stage])
    generator = torch.Generator().manual_seed(SEED)
    ours = build_model(workload.checkpoint, 2, generator)
    counts_C = workload.data.class_counts(2)
    if loop == "ours":
        ours.to(device)
        if stage == 1:
            freeze_below_top(ours, 1)
        loss = make_loss("ldam", "effective", counts_C, device) if stage == 1 else cross_entropy
        dtype = torch.bfloat16 if settings["bf16"] else torch.float32
        stage_settings = StageSettings(1, learning_rate, batch_size, dtype=dtype)
        state = TrainingState(SEED, ours, stage=stage)
        return lambda: train_stage(state, workload.data, clock.watch(loss), stage_settings)

    import peers

    loss = peers.stage_loss(stage, counts_C, device)
    # P4's loss is computed inside a graph, where no clock can tick: its loop ticks itself.
    watched = loss if loop == "P4" else clock.watch(loss)
    attention = "eager" if loop == "P0" else "sdpa"
    model = peers.PeerClassifier(ours, attention, watched).to(device)
    if stage == 1:
        model.freeze_below_last_layer()
    offsets = workload.data.store.offsets
    texts = [
        {
            "input_ids": workload.data.store.ids[offsets[i] : offsets[i + 1]],
            "labels": int(workload.data.labels_N[i]),
        }
        for i in order
    ]
    common = (model, texts, batch_size, learning_rate, device)
    if loop == "P0":
        return lambda: peers.train_published(*common)
    if loop == "P4":
        return lambda: peers.train_with_graphs(*common, clock)
    listener = on_batch if settings.get("group_by_length") else None
    return lambda: peers.train_with_trainer(*common, **settings, on_batch=listener)


def make_profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def top_operations(
    profiler: torch.profiler.profile, device: torch.device, steps: int, count: int = 16
) -> list[dict[str, Any]]:
    """The operations (on a GPU: kernels) that take the most time themselves."""
    on_gpu = device.type == "cuda"

    def own_time(event: Any) -> float:
        return float(event.self_device_time_total if on_gpu else event.self_cpu_time_total)

    events = [
        event
        for event in profiler.key_averages()
        if own_time(event) > 0 and not getattr(event, "is_user_annotation", False)
    ]
    if on_gpu:  # kernels alone: the operations that launch them carry the same time again
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(map(own_time, events))
    return [
        {
            "operation": event.key[:90],
            "share": round(own_time(event) / total, 4),
            "ms_per_step": round(own_time(event) / 1e3 / steps, 4),
            "calls_per_step": round(event.count / steps, 1),
        }
        for event in sorted(events, key=own_time, reverse=True)[:count]
    ]


def describe(record: dict[str, Any]) -> str:
    """The tables of all cases so far, and the profiles, in Markdown."""
    limits = record["limits"]
    rows = [row for row in record["rows"] if not row.get("profile")]
    reference = {
        (row["stage"], row["batch_size"]): row["examples_per_second"]
        for row in rows
        if row["run"] == "P1 bf16" and "error" not in row
    }
    lines = []
    for row in rows:
        head = [row["run"], row["stage"], row["batch_size"]]
        if "error" in row:
            lines.append([*head, f"failed: {row['error']}", *[""] * 8])
            continue
        p1 = reference.get((row["stage"], row["batch_size"]))
        p20, p50, p80 = row["step_ms_p20_p50_p80"]
        lines.append(
            [
                *head,
                f"{row['examples_per_second']:.1f}",
                f"{row['examples_per_second'] / p1:.2f}" if p1 else "",
                f"{row['tokens_per_second']:.0f}",
                f"{p50:.1f} ({p20:.1f}-{p80:.1f})",
                share(row["needed_flops_per_second"], limits.get("matmul_bf16_flops")),
                share(row["needed_bytes_per_second"], limits.get("copy_bytes")),
                row["peak_memory_mib"],
                row["warmup_seconds"],
                f"{row['mean_loss']:.4f}",
            ]
        )
    header = ["run", "stage", "batch", "examples/s", "× P1 bf16", "real tokens/s"]
    header += [
        "step ms, p50 (p20-p80)",
        "of matmul",
        "of copy",
        "memory MiB",
        "warm-up s",
        "mean loss",
    ]
    machine = record["machine"]
    parts = [
        f"{machine['device']}, {machine['threads']} threads, torch {record['versions']['torch']}, "
        f"commit {record['commit']}: {record['command']}",
        f"Limits measured in this run: {describe_limits(limits)}.",
        markdown_table(header, lines),
    ]
    parts += [describe_profile(row) for row in record["rows"] if row.get("profile")]
    return "\n\n".join(parts)


def describe_limits(limits: dict[str, Any]) -> str:
    if "error" in limits:
        return f"failed: {limits['error']}"
    return (
        f"bf16 matmul {limits['matmul_bf16_flops'] / 1e12:.3g} TFLOP/s, fp32 "
        f"{limits['matmul_fp32_flops'] / 1e12:.3g}, copy {limits['copy_bytes'] / 1e9:.3g} GB/s"
    )


def share(part: float, whole: float | None) -> str:
    return f"{part / whole:.1%}" if whole else ""


def describe_profile(row: dict[str, Any]) -> str:
    title = f"Where a step goes: {row['run']}, stage {row['stage']}, batch {row['batch_size']}"
    if "error" in row:
        return f"{title}: failed: {row['error']}"
    cells = [
        [f"`{p['operation']}`", f"{p['share']:.1%}", p["ms_per_step"], p["calls_per_step"]]
        for p in row["profile"]
    ]
    return f"{title}\n\n" + markdown_table(["operation", "share", "ms", "calls"], cells)


if __name__ == "__main__":
    main()
