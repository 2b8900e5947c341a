"""The first thing a newcomer runs: what two-stage fine-tuning changes, on real text, in minutes.

MiniLM learns to tell fresh from rotten film reviews after most of the rotten ones have been taken
away. Three runs on one seed, side by side: vanilla fine-tuning; vanilla with as many epochs as
both stages have together, so that nobody can say that the extra steps did it; two stages.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from .api import Result
from .assets.data_sets import fetch_demo, is_demo_complete
from .data.downsampling import check_draw, downsample_folder
from .errors import writing_to
from .experiment import read_data, run_experiment
from .printing import format_table
from .recipe import Recipe
from .report import explain_scores, format_confusion, score_columns, scores

# MiniLM is small and wants larger steps than BERT-base, for which the recipe's rates are made.
DEMO_RECIPE = Recipe(learning_rate_stage_1=5e-4, learning_rate_stage_2=5e-5)


def demo_runs(recipe: Recipe) -> dict[str, Recipe]:
    """The three runs that are compared, by name: they differ in method and epochs alone."""
    return {
        "vanilla": replace(recipe, method="vanilla"),
        "vanilla, 2 epochs": replace(recipe, method="vanilla", epochs_stage_2=2),
        "two-stage": replace(recipe, method="reweight"),
    }


def folder_name(run: str) -> str:
    """A run's name without commas and spaces."""
    return run.replace(", ", "-").replace(" ", "-")


def run_demo(
    folder: Path,
    rate: float,
    seed: int,
    *,
    show_progress: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Result]:
    """Fetch, down-sample to `rate`, train the three runs and compare them. Results by name."""
    check_draw(rate, seed)
    recipe = replace(DEMO_RECIPE, seeds=(seed,))
    if not is_demo_complete(folder):
        say("fetching MiniLM and the critics' snippets (93 MB) ...")
    fetch_demo(folder, show_progress=show_progress)
    data_path, positives, negatives = downsample_folder(
        folder, folder / "down_sampled", rates=(rate,)
    )[0]
    say(f"{data_path}: {positives} fresh (1) and {negatives} rotten (0) reviews to learn from\n")

    output_path = folder / "results" / f"{rate}-seed-{seed}"
    results: dict[str, Result] = {}
    for name, run in demo_runs(recipe).items():
        say(f"{name}:")
        results[name] = run_experiment(
            folder / "model",
            read_data(data_path, run),
            output_path / folder_name(name),
            run,
            show_progress=show_progress,
            say=say,
        )
    say("\n" + format_comparison(results))
    if find_spec("matplotlib") is None:
        say("\n(for a figure: pip install matplotlib)")
    else:
        save_figure(results, output_path / "demo.png")
        say(f"\nfigure: {output_path / 'demo.png'}")
    say(f"all results: {output_path}")
    return results


def format_comparison(results: dict[str, Result]) -> str:
    """Scores side by side, then each run's confusion matrix."""
    first = next(iter(results.values()))
    names = first.classes.names
    header = ["", *score_columns(first), "seconds"]
    rows: list[list[object]] = [
        [name, *scores(result)[0], round(result.seeds[0].seconds)]
        for name, result in results.items()
    ]
    lines = [
        format_table(header, rows),
        explain_scores(names, first.class_counts_C, first.seeds[0].metrics.support_C),
        "",
        "Confusion matrices (row: true class, column: predicted class):",
    ]
    for name, result in results.items():
        confusion_CC = result.seeds[0].metrics.confusion_CC
        lines.append("\n" + format_confusion(name, confusion_CC, names))
    return "\n".join(lines)


def save_figure(results: dict[str, Result], path: Path) -> None:
    """Bars of the F1s, and the share of each true class that went to each prediction."""
    from matplotlib.figure import Figure

    first = next(iter(results.values()))
    names = first.classes.names
    figure = Figure(figsize=(4 + 2.6 * len(results), 3.4), layout="constrained")
    widths = [1.7] + [1.0] * len(results)
    bars, *squares = figure.subplots(1, 1 + len(results), width_ratios=widths)
    groups = [f"F1 '{c}'" for c in names] + ["macro-F1"]
    for i, (name, result) in enumerate(results.items()):
        metrics = result.seeds[0].metrics
        heights = [*metrics.f1_C, metrics.macro_f1]
        places = [group + 0.8 * (i + 0.5) / len(results) - 0.4 for group in range(len(groups))]
        drawn = bars.bar(places, heights, 0.8 / len(results), label=name)
        bars.bar_label(drawn, fmt="%.2f", fontsize=7)
    bars.set_xticks(range(len(groups)), groups)
    bars.set_ylim(0, 1)
    bars.legend(fontsize=7, frameon=False, loc="upper left")
    bars.spines[["top", "right"]].set_visible(False)
    for axes, (name, result) in zip(squares, results.items(), strict=True):
        confusion_CC = result.seeds[0].metrics.confusion_CC
        share_CC = confusion_CC / confusion_CC.sum(axis=1, keepdims=True).clip(min=1)
        axes.imshow(share_CC, cmap="Blues", vmin=0, vmax=1)
        for (true, predicted), count in np.ndenumerate(confusion_CC):
            color = "white" if share_CC[true, predicted] > 0.5 else "black"
            axes.text(predicted, true, str(count), ha="center", va="center", color=color)
        axes.set(title=name, xlabel="predicted", ylabel="true")
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), names)
    with writing_to(path):
        figure.savefig(path, dpi=150)
