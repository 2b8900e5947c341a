"""Does two-stage fine-tuning help the tail class on real text, and is it the extra steps?

On the demo's data at several rates, several seeds each:

    vanilla                     one epoch on the imbalanced data
    vanilla, 2 epochs           as many steps as two-stage
    vanilla, 3 epochs           as many as two-stage augmented, and some more: 1,371 against 1,287
                                at rate 0.1
    two-stage                   stage 1 re-weighted
    two-stage, offline edits    stage 1 on a class-balanced aug.csv, twice the majority long,
                                made by `twostage augment --offline`: lexical edits, no paraphrases
    two-stage, trunk cached     re-weighted with `--cache-trunk`: what that approximation costs

Prints a table and one JSON line, and writes both to `two_stage_vs_vanilla.md` and `.json` in
`--output` (`benchmarks/results/`) as each run ends.

    python benchmarks/two_stage_vs_vanilla.py --data demo
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from harness import RESULTS, describe_environment, markdown_table, save

from twostage.api import Result
from twostage.assets.data_sets import fetch_demo
from twostage.augmentation.folder import edit_folder
from twostage.augmentation.paraphrase import EditSettings
from twostage.data.downsampling import downsample_folder
from twostage.demo import DEMO_RECIPE, demo_runs, folder_name
from twostage.experiment import read_data, run_experiment
from twostage.report import describe_arithmetic, summarize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--rates", default="0.1,0.2")
    parser.add_argument("--seeds", default="7,42,106")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    rates = tuple(map(float, options.rates.split(",")))
    seeds = tuple(map(int, options.seeds.split(",")))
    recipe = replace(DEMO_RECIPE, seeds=seeds, precision=options.precision)

    fetch_demo(options.data)
    rows: list[dict[str, Any]] = []
    record = describe_environment(recipe.device) | {
        "what": "MiniLM-L6, critics' snippets, lr 5e-4 / 5e-5, one epoch a stage",
        "arithmetic": describe_arithmetic(recipe),
        "seeds": seeds,
        "rows": rows,
    }
    for data_path, positives, negatives in downsample_folder(
        options.data, options.data / "down_sampled", rates
    ):
        edit_folder(data_path, EditSettings())
        runs = demo_runs(recipe)
        runs["vanilla, 3 epochs"] = replace(runs["vanilla"], epochs_stage_2=3)
        runs["two-stage, offline edits"] = replace(runs["two-stage"], method="augment")
        runs["two-stage, trunk cached"] = replace(runs["two-stage"], cache_trunk=True)
        for name, run in runs.items():
            output = options.data / "results" / f"study-{data_path.name}-{folder_name(name)}"
            result = run_experiment(options.data / "model", read_data(data_path, run), output, run)
            rows += describe(result, data_path.name, name, positives, negatives)
            save(options.output, "two_stage_vs_vanilla", describe_all(rows), record)
            print(describe_all(rows), flush=True)
    print(json.dumps(record))


def describe(
    result: Result, rate: str, name: str, positives: int, negatives: int
) -> list[dict[str, Any]]:
    return [
        {
            "rate": rate,
            "run": name,
            "seed": s.seed,
            "train_rows_per_class": [negatives, positives],
            **summarize(s.metrics, result.tail_class),
            "f1_per_class": s.metrics.f1_C.tolist(),
            "confusion": s.metrics.confusion_CC.tolist(),
            "seconds": round(s.seconds, 1),
        }
        for s in result.seeds
    ]


def describe_all(rows: list[dict[str, Any]]) -> str:
    """The table of all runs so far: every seed's tail F1, and means."""
    lines = []
    for rate, name in dict.fromkeys((row["rate"], row["run"]) for row in rows):
        group = [row for row in rows if (row["rate"], row["run"]) == (rate, name)]
        tails = ", ".join(f"{row['tail_f1']:.3f}" for row in group)
        keys = ("tail_f1", "tail_average_precision", "macro_f1", "micro_f1")
        means = [f"{np.mean([row[key] for row in group]):.3f}" for key in keys]
        lines.append([rate, name, tails, *means])
    header = ["rate", "run", "tail F1 of each seed", "mean tail F1", "mean tail AP"]
    return markdown_table([*header, "mean macro-F1", "mean accuracy"], lines)


if __name__ == "__main__":
    main()
