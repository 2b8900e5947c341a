"""The demo's way from data to tables and figure, on a model and data small enough for a test."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from twostage import demo
from twostage.api import Result
from twostage.data.tables import read_table, write_table
from twostage.errors import UsageError
from twostage.experiment import ExperimentData, run_experiment
from twostage.recipe import Recipe


@pytest.fixture
def small(demo_folder: Path, tiny: Path, tmp_path: Path) -> Path:
    return make_small_demo(demo_folder, tiny, tmp_path / "demo")


def make_small_demo(demo_folder: Path, model: Path, folder: Path) -> Path:
    """A demo's folder with 300 texts a table and another model."""
    for name in ("train.tsv", "dev.tsv"):
        table = read_table(demo_folder / name)
        rows = list(zip(table.texts, table.labels, strict=True))[:300]
        write_table(folder / name, ("sentence", "label"), rows)
    shutil.copytree(model, folder / "model")
    for name in ("tokenizer_config.json", "vocab.txt"):
        shutil.copy(demo_folder / "model" / name, folder / "model")
    return folder


@pytest.mark.slow
def test_three_runs_side_by_side_with_matrices_and_a_figure(small: Path) -> None:
    said: list[str] = []
    results = demo.run_demo(small, rate=0.2, seed=3, say=said.append)
    assert list(results) == ["vanilla", "vanilla, 2 epochs", "two-stage"]
    text = "\n".join(said)
    for name, result in results.items():
        scores = result.seeds[0].metrics
        row = next(line for line in text.splitlines() if line.startswith(name + "  "))
        assert f"{scores.f1_C[0]:.3f}" in row
        start = text.index(f"\n{name} ", text.index("Confusion matrices"))
        matrix = [line.split()[2:] for line in text[start + 1 :].splitlines()[1:3]]
        assert matrix == scores.confusion_CC.astype(str).tolist()
        assert scores.confusion_CC.sum() == 300
        folder = small / "results" / "0.2-seed-3" / name.replace(", ", "-").replace(" ", "-")
        assert (folder / "results.csv").is_file()
    assert "tail F1 ('0')" in text
    assert "* micro-F1 is the accuracy" in text
    assert imread(small / "results" / "0.2-seed-3" / "demo.png").std() > 0.05


@pytest.mark.slow
def test_without_matplotlib_the_demo_ends_well_and_says_how_to_get_a_figure(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    said: list[str] = []
    demo.run_demo(small, rate=0.2, seed=3, say=said.append)
    assert "pip install matplotlib" in "\n".join(said)
    assert not (small / "results" / "0.2-seed-3" / "demo.png").exists()


@pytest.mark.slow
def test_the_three_runs_differ_only_in_method_and_epochs(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []

    def spy(model: Path, data: ExperimentData, output: Path, recipe: Recipe, **kw: Any) -> Result:
        recipes.append(recipe)
        return run_experiment(model, data, output, recipe, **kw)

    monkeypatch.setattr(demo, "run_experiment", spy)
    demo.run_demo(small, rate=0.2, seed=3, say=lambda line: None)
    common = replace(demo.DEMO_RECIPE, seeds=(3,))
    assert recipes == [
        replace(common, method="vanilla"),
        replace(common, method="vanilla", epochs_stage_2=2),
        common,
    ]


def test_a_bad_rate_or_seed_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    for rate, seed in ((0.0, 1), (0.1, -1)):
        with pytest.raises(UsageError):
            demo.run_demo(tmp_path / "demo", rate, seed)
    assert not (tmp_path / "demo").exists()
