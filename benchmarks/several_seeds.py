"""How long do several seeds of both stages take, and what do they save by sharing?

    python benchmarks/several_seeds.py --data demo               MiniLM on critics' snippets
    python benchmarks/several_seeds.py --model bert-base         BERT-base's shape, no network

The published experiment repeats everything for five seeds. What the seeds have in common is the
trunk, the layers that stage 1 leaves frozen: with `--share-trunk` it is computed once an epoch for
all of them. Each case is a process, and its wall time all that `twostage train` does for the seeds
between tokenising and writing: building the models, both stages, one epoch each, evaluation.

`bert-base` has 45,082 texts, as many as SST-2 has at rate 0.2, with the lengths of SST-2's.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from harness import (
    MemoryPeak,
    describe_environment,
    describe_place,
    markdown_table,
    run_jobs,
    save,
    synchronize,
    watch_steps,
)
from workload import (
    SHAPES,
    SST2_TEXTS,
    Workload,
    make_parser,
    make_workload,
    random_checkpoint,
    sst2_texts,
)

from twostage.api import choose_step, train_one_seed
from twostage.assets.data_sets import fetch_demo
from twostage.data.token_store import StageData, TokenStore
from twostage.machine import choose_device
from twostage.memory import keep_freed_memory
from twostage.preparation import Datasets
from twostage.recipe import Recipe

TEST_SHARE = 872 / SST2_TEXTS
"""Texts to evaluate for each to train on: SST-2's."""
SEEDS = (7, 42, 106, 190, 191)
RUNS: dict[str, dict[str, Any]] = {
    "one after the other": {},
    "one trunk for all": {"share_trunk": True},
    "kernels": {"kernels": "triton"},
    "graphs": {"kernels": "triton", "graphs": True},
    "graphs, one trunk for all": {"kernels": "triton", "graphs": True, "share_trunk": True},
}
"""Name in the table: what the recipe says besides its defaults."""
CPU_RUNS = ("one after the other", "one trunk for all")
GPU_RUNS = ("graphs, one trunk for all", "graphs", "kernels", "one trunk for all")
"""The most telling first, should the time run out."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--texts", type=int, help=f"(default: {SST2_TEXTS:,}; minilm: 1,600)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_job(json.loads(options.job))))
        return
    if options.model == "minilm":
        fetch_demo(options.data)
    texts = options.texts or (1_600 if options.model == "minilm" else SST2_TEXTS)
    runs = GPU_RUNS if choose_device(options.device).type == "cuda" else CPU_RUNS
    jobs = make_seed_jobs(
        runs, options.model, str(options.data), options.device, texts, options.seeds
    )
    record = describe_environment(options.device)
    name = f"several_seeds-{options.model}-{describe_place(record)}"
    for rows in run_jobs(Path(__file__), jobs, 7_200, 7_200):
        record["rows"] = rows
        print(json.dumps(rows[-1]), flush=True)
        save(options.output, name, describe_seeds(rows), record)
    print(f"\n{describe_seeds(record['rows'])}\n\n{json.dumps(record)}")


def make_seed_jobs(
    runs: Sequence[str], model: str, data: str, device: str, texts: int, seeds: int
) -> list[dict[str, Any]]:
    """A case each."""
    common = {"model": model, "data": data, "device": device, "texts": texts, "seeds": seeds}
    return [{"run": run} | common for run in runs]


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate every seed in this process."""
    device = choose_device(job["device"])
    keep_freed_memory()
    workload = choose_workload(job)
    train, test = split(workload.data, job["texts"])
    data = Datasets(train, test, 2)
    seeds = SEEDS[: job["seeds"]]
    recipe = Recipe(seeds=seeds, device=job["device"], precision="bf16", **RUNS[job["run"]])
    captures: list[float] = []  # of each stage of each seed
    memory = MemoryPeak(device)
    memory.reset()
    began = perf_counter()
    make_step = choose_step(workload.checkpoint, data, recipe)  # computes what the seeds share
    synchronize(device)
    shared_seconds = perf_counter() - began
    make_step = watch_steps(make_step, captures.append)
    results = [
        train_one_seed(workload.checkpoint, data, recipe, seed, make_step)[1] for seed in seeds
    ]
    synchronize(device)
    seconds = perf_counter() - began
    return {
        "seconds": seconds,
        "shared_trunk_seconds": shared_seconds if recipe.share_trunk else 0.0,
        "stage_1_seconds": [result.seconds_stage_1 for result in results],
        "stage_2_seconds": [result.seconds_stage_2 for result in results],
        "evaluation_seconds": [result.seconds_evaluation for result in results],
        "capture_seconds": sum(captures),
        "examples_per_second": 2 * len(seeds) * len(train) / seconds,
        "peak_memory_mib": round(memory.read() / 2**20),
        "tail_f1": [float(result.metrics.f1_C[0]) for result in results],
    }


def choose_workload(job: dict[str, Any]) -> Workload:
    needed = job["texts"] + count_test_texts(job["texts"])
    if job["model"] == "bert-base":
        checkpoint = random_checkpoint(SHAPES["bert-base"])
        return Workload(checkpoint, sst2_texts(needed, checkpoint.config.vocab_size))
    return make_workload(job["model"], needed, Path(job["data"]), 0.1)


def split(data: StageData, num_train: int) -> tuple[StageData, StageData]:
    """The first texts to train on, and those after them to evaluate."""

    def rows(first: int, last: int) -> StageData:
        offsets = data.store.offsets[first : last + 1]
        ids = data.store.ids[int(offsets[0]) : int(offsets[-1])]
        return StageData(TokenStore(ids, offsets - offsets[0]), data.labels_N[first:last])

    return rows(0, num_train), rows(num_train, num_train + count_test_texts(num_train))


def count_test_texts(num_train: int) -> int:
    return max(8, round(num_train * TEST_SHARE))


def describe_seeds(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    speeds = {row["run"]: row["examples_per_second"] for row in rows if "error" not in row}
    reference = next((speeds[run] for run in CPU_RUNS if run in speeds), None)
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["run"], row["seeds"], f"failed: {row['error']}", *[""] * 8])
            continue
        lines.append(
            [
                row["run"],
                row["seeds"],
                f"{row['seconds']:.1f}",
                f"{row['examples_per_second'] / reference:.2f}" if reference else "",
                f"{row['examples_per_second']:.0f}",
                f"{row['shared_trunk_seconds']:.1f}",
                f"{sum(row['stage_1_seconds']):.1f}",
                f"{sum(row['stage_2_seconds']):.1f}",
                f"{sum(row['evaluation_seconds']):.1f}",
                f"{row['capture_seconds']:.1f}",
                row["peak_memory_mib"],
            ]
        )
    header = ["run", "seeds", "seconds", "×", "examples/s", "shared trunk s", "stage 1 s"]
    header += ["stage 2 s", "evaluation s", "capture s", "memory MiB"]
    title = f"Seeds of both stages, {rows[0]['model']}, {rows[0]['texts']:,} texts"
    return f"{title}:\n\n{markdown_table(header, lines)}"


if __name__ == "__main__":
    main()
