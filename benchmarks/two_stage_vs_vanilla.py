"""Does two-stage fine-tuning help the tail class on real text, and is it the extra steps?

Vanilla fine-tuning, vanilla with as many epochs as both stages have together, and two-stage
re-weighted, on the demo's data at several rates, several seeds each. Prints a table and one JSON
line, and writes both to `benchmarks/results/two_stage_vs_vanilla.{md,json}` as each run ends.

    python benchmarks/two_stage_vs_vanilla.py --data demo
"""

import argparse
import json
import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from twostage.assets import fetch_demo
from twostage.data.downsampling import downsample_folder
from twostage.demo import DEMO_RECIPE, demo_runs, folder_name
from twostage.experiment import run_experiment
from twostage.recipe import Recipe
from twostage.training.precision import choose_device, choose_precision
from twostage.two_stage import Result

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--rates", default="0.1,0.2")
    parser.add_argument("--seeds", default="7,42,106")
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    rates = tuple(map(float, options.rates.split(",")))
    seeds = tuple(map(int, options.seeds.split(",")))
    recipe = replace(DEMO_RECIPE, seeds=seeds, precision=options.precision)

    fetch_demo(options.data)
    rows: list[dict[str, object]] = []
    for data_path, positives, negatives in downsample_folder(
        options.data, options.data / "down_sampled", rates
    ):
        for name, run in demo_runs(recipe).items():
            output = options.data / "results" / f"study-{data_path.name}-{folder_name(name)}"
            result = run_experiment(options.data / "model", data_path, output, run)
            rows += describe(result, data_path.name, name, positives, negatives)
            save(rows, recipe)


def describe(
    result: Result, rate: str, name: str, positives: int, negatives: int
) -> list[dict[str, object]]:
    return [
        {
            "rate": rate,
            "run": name,
            "seed": s.seed,
            "train_rows_per_class": [negatives, positives],
            "tail_f1": s.metrics.f1_C[result.tail_class],
            "macro_f1": s.metrics.macro_f1,
            "micro_f1": s.metrics.micro_f1,
            "f1_per_class": s.metrics.f1_C.tolist(),
            "confusion": s.metrics.confusion_CC.tolist(),
            "seconds": round(s.seconds, 1),
        }
        for s in result.seeds
    ]


def save(rows: list[dict[str, object]], recipe: Recipe) -> None:
    """The table and the JSON line of all runs so far."""
    lines = ["| rate | run | tail F1 of each seed | mean tail F1 | mean macro-F1 | mean accuracy |"]
    lines.append("|---|---|---|---|---|---|")
    groups = dict.fromkeys((row["rate"], row["run"]) for row in rows)
    for rate, name in groups:
        group = [row for row in rows if (row["rate"], row["run"]) == (rate, name)]
        tails = ", ".join(f"{row['tail_f1']:.3f}" for row in group)
        means = [
            np.mean([row[key] for row in group]) for key in ("tail_f1", "macro_f1", "micro_f1")
        ]
        lines.append(f"| {rate} | {name} | {tails} | {' | '.join(f'{m:.3f}' for m in means)} |")
    capabilities = torch.cpu.get_capabilities()
    device = choose_device(recipe.device)
    record = {
        "what": "MiniLM-L6, critics' snippets, lr 5e-4 / 5e-5, one epoch a stage",
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip(),
        "seeds": recipe.seeds,
        "device": str(device),
        "dtype": str(choose_precision(recipe.precision, device)),
        "hardware": {
            "cpu": capabilities.get("cpu_name", platform.processor()),
            "threads": torch.get_num_threads(),
            "avx512_bf16": capabilities.get("avx512_bf16", False),
            "amx_bf16": capabilities.get("amx_bf16", False),
        },
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    table, json_line = "\n".join(lines), json.dumps(record)
    (RESULTS / "two_stage_vs_vanilla.md").write_text(table + "\n", encoding="utf-8")
    (RESULTS / "two_stage_vs_vanilla.json").write_text(json_line + "\n", encoding="utf-8")
    print(f"\n{table}\n{json_line}", flush=True)


if __name__ == "__main__":
    main()
