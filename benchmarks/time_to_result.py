"""How long does the whole job take, from a command to its scores: ours beside the published loop?

    python benchmarks/time_to_result.py --data demo             MiniLM on critics' snippets
    python benchmarks/time_to_result.py --model bert-base       BERT-base's shape, no network

One seed of the published recipe: stage 1 (LDAM with class weights, all but the last encoder layer
frozen), stage 2 (cross-entropy), then the test set's F1s. Each case is a process that starts from
`train.csv`, `test.csv` and a model folder; its wall time has everything in it: imports, loading,
tokenising, both stages, evaluation, writing results.

    ours    the command `twostage train`
    P0      the published recipe as it is: fp32, every text padded to 128 tokens, in the evaluation
            too, eager attention, a plain loop
    P1      transformers' Trainer with its defaults and bf16; the evaluation is the loop of its own:
            bf16 autocast, padded to the longest text of the batch

All train on the same batches in the same order, from the same weights, with the recipe's learning
rates and dropout; only the dropout masks differ, and so the F1s do a little. Each process does it
once a round, all in turn, for `--repeats` rounds; the table has the median round of each.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch
from harness import StepClock, describe_environment, describe_place, markdown_table, save
from predict_throughput import MAX_LENGTH, prepare_folder
from workload import make_parser

from twostage.data.downsampling import downsample
from twostage.data.samplers import random_batches
from twostage.data.tables import Classes, Table, find_classes, read_table, write_table
from twostage.machine import choose_device
from twostage.model.checkpoint import build_model, load_checkpoint
from twostage.report import summarize
from twostage.training.metrics import compute_metrics
from twostage.training.state import HEAD_STREAM, derive_seed

SEED = 7
BATCH_SIZE = 16
LEARNING_RATES = {1: 1e-4, 2: 1e-5}
RUNS = ("ours bf16", "ours fp32", "P1 bf16", "P0 fp32")
REFERENCE = "P0 fp32"
TIMEOUT = 1_800.0
"""Seconds that one process may take."""


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--runs", default="; ".join(RUNS), help="some of these")
    parser.add_argument("--rows", type=int, default=1_600, help="to train on")
    parser.add_argument("--test-rows", type=int, default=1_000)
    parser.add_argument("--rate", type=float, default=0.2, help="tail texts for each other one")
    parser.add_argument("--repeats", type=int, default=3, help="rounds")
    options = parser.parse_args()
    if options.job:
        print(json.dumps(run_peer(json.loads(options.job))))
        return
    runs = options.runs.split("; ")
    if unknown := set(runs) - set(RUNS):
        parser.error(f"there is no run called {'; '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        needed = max(2 * options.rows, options.test_rows)
        folder = prepare_folder(options.model, options.data, work, needed)
        counts = write_data(folder, work / "data", options.rows, options.test_rows, options.rate)
        job = {
            "model": str(folder / "model"),
            "data": str(work / "data"),
            "output": str(work / "results"),
            "device": options.device,
        }
        record = describe_environment(options.device) | {
            "model": options.model,
            "recipe": f"one epoch a stage, batch {BATCH_SIZE}, learning rates {LEARNING_RATES}",
            "rate": options.rate,
            "repeats": options.repeats,
            **counts,
            "rows": [],
        }
        name = f"time_to_result-{options.model}-{describe_place(record)}"
        for _ in range(options.repeats):
            for run in runs:
                record["rows"].append({"run": run, **measure(run, job)})
                print(json.dumps(record["rows"][-1]), flush=True)
                save(options.output, name, describe(record), record)
    print(f"\n{describe(record)}\n\n{json.dumps(record)}")


def write_data(
    source: Path, folder: Path, num_train: int, num_test: int, rate: float
) -> dict[str, Any]:
    """`train.csv`, down-sampled to `rate` and cut, and `test.csv`, drawn from the test data."""
    texts, labels = downsample(read_table(source / "train.tsv"), rate)  # in random order
    train = list(zip(texts, labels, strict=True))[:num_train]
    write_table(folder / "train.csv", ("text", "label"), train)
    dev = read_table(source / "dev.tsv")
    size = min(num_test, len(dev))
    drawn = np.random.default_rng(SEED).choice(len(dev), size=size, replace=False)
    test = [(dev.texts[i], dev.labels[i]) for i in np.sort(drawn)]
    write_table(folder / "test.csv", ("text", "label"), test)
    positives = sum(label for _, label in train)
    return {"train_rows_per_class": [len(train) - positives, positives], "test_rows": len(test)}


def measure(run: str, job: dict[str, Any]) -> dict[str, Any]:
    """One process of this run: wall seconds and where they go, memory, steps and scores."""
    if run.startswith("ours"):
        command = [sys.executable, "-m", "twostage", "train"]
        command += ["--model", job["model"], "-d", job["data"], "-o", job["output"]]
        command += ["--seeds", str(SEED), "--batch-size", str(BATCH_SIZE)]
        command += ["--lr-stage-1", str(LEARNING_RATES[1]), "--lr-stage-2", str(LEARNING_RATES[2])]
        command += ["--precision", run.removeprefix("ours "), "--device", job["device"]]
    else:
        command = [sys.executable, __file__, "--job", json.dumps(job | {"run": run})]
    result, printed = run_process(command)
    if "error" in result:
        return result
    if run.startswith("ours"):
        result |= read_results(Path(job["output"]))
    else:
        result |= json.loads(printed.strip().splitlines()[-1])
    parts = result["seconds"]
    result["seconds"] = parts | {"rest": result["wall_seconds"] - sum(parts.values())}
    return result


def run_process(command: list[str]) -> tuple[dict[str, Any], str]:
    """Wall seconds and peak memory of a process, or {"error": …}; and what it printed."""
    began = perf_counter()
    peak = 0
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        subprocess.Popen(command, stdout=out, stderr=err) as process,
    ):
        # The kernel keeps the process's peak, but not beyond its end; and the peak that `wait4`
        # tells would be ours, where it is larger, since a process inherits that of its parent.
        while process.poll() is None:
            peak = max(peak, peak_memory(process.pid))
            if perf_counter() - began > TIMEOUT:
                process.kill()
                return {"error": f"took longer than {TIMEOUT:.0f} s"}, ""
            sleep(0.02)
        seconds = perf_counter() - began
        for file in (out, err):
            file.seek(0)
        printed, complaint = out.read(), err.read().strip()
    if process.returncode != 0:
        last = (complaint.splitlines() or ["no message"])[-1]
        error = f"exit code {process.returncode}: {last[:500]}"
        return {"error": error, "stderr": complaint[-3_000:]}, ""
    return {"wall_seconds": seconds, "peak_memory_mib": round(peak / 2**20)}, printed


def peak_memory(pid: int) -> int:
    """The most that the process has had in memory so far, in bytes; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def read_results(folder: Path) -> dict[str, Any]:
    """What `twostage train` wrote."""
    outcome = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["seeds"][0]
    with (folder / "log.csv").open(encoding="utf-8", newline="") as file:
        reports = list(csv.DictReader(file))
    steps, losses = {}, {}
    for stage in ("1", "2"):
        rows = [row for row in reports if row["stage"] == stage]
        ends = [int(row["step"]) for row in rows]
        steps[stage] = ends[-1]
        # Each report has the mean loss since the one before.
        losses[stage] = float(
            np.average([float(row["loss"]) for row in rows], weights=np.diff([0, *ends]))
        )
    return {
        "seconds": outcome["seconds"],
        "steps": steps,
        "mean_loss": losses,
        **{name: outcome[name] for name in ("tail_f1", "macro_f1", "micro_f1")},
    }


def run_peer(job: dict[str, Any]) -> dict[str, Any]:
    """P0 or P1 from files to scores, in this process."""
    import peers
    import transformers

    _ = transformers.BertModel, transformers.Trainer  # imported now, not within stage 1
    published = job["run"].startswith("P0")
    device = choose_device(job["device"])
    torch.manual_seed(SEED)  # dropout
    train, test = (read_table(Path(job["data"]) / name) for name in ("train.csv", "test.csv"))
    classes = find_classes(train)
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    train_texts, test_texts = (tokenize(table, classes, tokenizer) for table in (train, test))
    counts_C = np.bincount(classes.encode(train), minlength=len(classes)).tolist()
    checkpoint = load_checkpoint(job["model"])

    times = [perf_counter()]
    generator = torch.Generator().manual_seed(derive_seed(HEAD_STREAM, SEED))
    ours = build_model(checkpoint, len(classes), generator)
    steps, mean_loss = {}, {}
    attention = "eager" if published else "sdpa"
    model = peers.PeerClassifier(ours, attention, torch.nn.functional.cross_entropy).to(device)
    model.freeze_below_last_layer()
    for stage in (1, 2):
        if stage == 2:
            model.requires_grad_(True)
        loss = peers.stage_loss(stage, counts_C, device)
        batches = random_batches(len(train), BATCH_SIZE, (SEED, stage), epoch=0)
        texts = [train_texts[i] for i in np.concatenate(batches)]
        clock = StepClock(device, 0, len(batches))  # here it counts steps and keeps their losses
        common = (model, texts, BATCH_SIZE, LEARNING_RATES[stage], device)
        if published:
            model.loss_function = clock.watch(loss)
            peers.train_published(*common)
        else:
            model.loss_function = loss
            peers.train_with_trainer(*common, bf16=True, on_loss=clock.tick)
        steps[str(stage)] = len(clock.losses)
        # Reading the loss waits for the device, so that the stage's time is all there.
        mean_loss[str(stage)] = float(torch.stack(clock.losses).float().mean())
        times.append(perf_counter())

    model.loss_function = torch.nn.functional.cross_entropy
    model.eval()
    logits = []
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=not published):
        for start in range(0, len(test_texts), BATCH_SIZE):
            batch = peers.pad(
                test_texts[start : start + BATCH_SIZE], MAX_LENGTH if published else None
            )
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            logits.append(model(**batch)["logits"].float().cpu())
    metrics = compute_metrics(classes.encode(test), torch.cat(logits).numpy())
    times.append(perf_counter())
    scores = summarize(metrics, int(np.argmin(counts_C)))
    return {
        "seconds": dict(
            zip(("stage_1", "stage_2", "evaluation"), np.diff(times).tolist(), strict=True)
        ),
        "steps": steps,
        "mean_loss": mean_loss,
        **{name: scores[name] for name in ("tail_f1", "macro_f1", "micro_f1")},
    }


def tokenize(table: Table, classes: Classes, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows as `peers.py` takes them, by transformers' tokenizer."""
    rows = tokenizer(list(table.texts), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    return [
        {"input_ids": ids, "labels": int(label)}
        for ids, label in zip(rows, classes.encode(table), strict=True)
    ]


def describe(record: dict[str, Any]) -> str:
    """The table so far, in Markdown: of each run the round with the median wall time."""
    lines = []
    reference = median_round(record["rows"], REFERENCE)
    for run in dict.fromkeys(row["run"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["run"] == run]
        if error := next((row["error"] for row in rows if "error" in row), None):
            lines.append([run, f"failed: {error}", *[""] * 11])
            continue
        row = median_round(rows, run)
        assert row is not None
        walls, parts = [r["wall_seconds"] for r in rows], row["seconds"]
        lines.append(
            [
                run,
                f"{row['wall_seconds']:.1f} ({min(walls):.1f}-{max(walls):.1f})",
                f"{reference['wall_seconds'] / row['wall_seconds']:.2f}" if reference else "",
                *(f"{parts[part]:.1f}" for part in ("stage_1", "stage_2", "evaluation", "rest")),
                row["peak_memory_mib"],
                " + ".join(map(str, row["steps"].values())),
                " / ".join(f"{loss:.4f}" for loss in row["mean_loss"].values()),
                *(f"{row[score]:.3f}" for score in ("tail_f1", "macro_f1", "micro_f1")),
            ]
        )
    header = ["run", "wall s, median (range)", "× P0", "stage 1 s", "stage 2 s", "evaluation s"]
    header += ["the rest s", "memory MiB", "steps", "mean loss", "tail F1", "macro-F1", "micro-F1"]
    machine = record["machine"]
    tail, other = record["train_rows_per_class"]
    return "\n\n".join(
        [
            f"{machine['device']}, {machine['threads']} threads, torch "
            f"{record['versions']['torch']}, transformers {record['versions']['transformers']}, "
            f"commit {record['commit']}: {record['command']}",
            f"{tail} + {other} training rows, {record['test_rows']} test rows; {record['recipe']}.",
            markdown_table(header, lines),
            "Times and scores are those of the median round. Memory is the peak of the whole "
            "process, its modules included; on a GPU that of the host.",
        ]
    )


def median_round(rows: list[dict[str, Any]], run: str) -> dict[str, Any] | None:
    """The row of this run whose wall time is the median (of two the smaller); None without one."""
    finished = [row for row in rows if row["run"] == run and "error" not in row]
    finished.sort(key=lambda row: row["wall_seconds"])
    return finished[(len(finished) - 1) // 2] if finished else None


if __name__ == "__main__":
    main()
