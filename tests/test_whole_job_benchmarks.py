"""Prediction, the whole job, several seeds: all sides do the same work on the same texts."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from twostage.model.checkpoint import Checkpoint

from .test_demo import make_small_demo

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def predict_throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import predict_throughput

    # These change the whole process, which here is that of the other tests as well.
    monkeypatch.setattr(predict_throughput, "keep_freed_memory", lambda: None)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return predict_throughput


@pytest.fixture
def time_to_result(predict_throughput: ModuleType) -> ModuleType:
    import time_to_result

    return time_to_result


@pytest.fixture
def folder(predict_throughput: ModuleType, tmp_path: Path) -> Path:
    """Made-up texts and an encoder without dropout, whose weights are so large that it matters
    what a text says."""
    folder: Path = tmp_path / "demo"
    predict_throughput.write_random_demo(folder, "tiny", 120)
    weights = folder / "model" / "model.safetensors"
    tensors = {name: t * 10 if t.dim() == 2 else t for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    config = json.loads((folder / "model" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def demo(demo_folder: Path, tiny: Path, tmp_path: Path) -> Path:
    """Real texts and a tiny encoder in the place of the demo's."""
    return make_small_demo(demo_folder, tiny, tmp_path / "demo")


def run_benchmark(name: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    """What the script prints, and the record in its last line."""
    command = [sys.executable, str(BENCHMARKS / name), "--device", "cpu"]
    finished = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout, json.loads(finished.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_every_way_to_predict_gives_our_logits_in_the_order_of_the_texts(
    predict_throughput: ModuleType, folder: Path, tmp_path: Path
) -> None:
    predict_throughput.save_classifier(folder / "model", tmp_path / "classifier")
    job = {
        "encoder": str(folder / "model"),
        "classifier": str(tmp_path / "classifier"),
        "data": str(folder),
        "device": "cpu",
        "texts": 75,  # no multiple of the batch sizes
        "warmup": 10,
        "repeats": 1,
    }
    runs = list(predict_throughput.RUNS)
    assert len(runs) == 2 * (1 + 8 + 1)
    logits = {
        run: np.array(predict_throughput.run_job(job | {"run": run})["logits"]) for run in runs
    }
    ours_NC = logits["ours fp32"]
    assert ours_NC.shape == (75, 2)
    for run, logits_NC in logits.items():
        tolerance = 1e-5 if "fp32" in run else 0.05
        np.testing.assert_allclose(logits_NC, ours_NC, rtol=0, atol=tolerance, err_msg=run)
        # It would show if they were those of other texts: each text's neighbour has others.
        differences_N = np.abs(logits_NC - np.roll(ours_NC, 1, axis=0)).max(axis=1)
        assert np.quantile(differences_N, 0.2) > tolerance, run
        assert differences_N.max() > 4 * tolerance, run


@pytest.mark.slow
def test_the_rehearsal_of_predicting_marks_the_best_pipeline(tmp_path: Path) -> None:
    runs = ("ours fp32", "pipeline fp32, batch 1", "pipeline bf16, batch 16")
    printed, record = run_benchmark(
        "predict_throughput.py",
        *("--model", "tiny", "--texts", "60", "--warmup", "8", "--repeats", "2"),
        *("--runs", "; ".join(runs), "--output", str(tmp_path)),
    )
    rows = {row["run"]: row for row in record["rows"]}
    assert tuple(rows) == runs
    assert not [row["error"] for row in rows.values() if "error" in row]
    assert all(row["texts_per_second"] > 0 and len(row["seconds"]) == 2 for row in rows.values())
    assert rows["pipeline fp32, batch 1"]["max_logit_difference"] < 0.01 * record_spread(record)
    assert 60 * 10 < record["tokens"] < 60 * 60
    assert "error" not in record["limits"]

    pipelines = [row for row in record["rows"] if row["run"].startswith("pipeline")]
    best = max(pipelines, key=lambda row: row["texts_per_second"])["run"]
    assert record["best_pipeline"] == best
    (marked,) = [line for line in printed.splitlines() if "(its best)" in line]
    assert marked.startswith(f"| **{best}** (its best) |")
    assert marked.split(" | ")[2] == "1.00"
    json_path, md_path = sorted(tmp_path.iterdir())
    assert json.loads(json_path.read_text()) == record
    assert md_path.read_text().strip() in printed


def record_spread(record: dict[str, Any]) -> float:
    (spread,) = [row["logits_std"] for row in record["rows"] if "logits_std" in row]
    return float(spread)


@pytest.mark.slow
def test_without_dropout_the_whole_job_has_the_same_losses_and_scores_on_both_sides(
    time_to_result: ModuleType, folder: Path, tmp_path: Path
) -> None:
    """From the command of ours to its files, and from the same files in the published loop."""
    counts = time_to_result.write_data(folder, tmp_path / "data", 70, 50, 0.2)
    assert sum(counts["train_rows_per_class"]) == 70
    assert counts["test_rows"] == 50
    job = {
        "model": str(folder / "model"),
        "data": str(tmp_path / "data"),
        "output": str(tmp_path / "results"),
        "device": "cpu",
    }
    ours = time_to_result.measure("ours fp32", job)
    assert "error" not in ours, ours
    assert 0.3 < ours["seconds"]["rest"] < ours["wall_seconds"]
    assert sum(ours["seconds"].values()) == pytest.approx(ours["wall_seconds"])
    assert ours["peak_memory_mib"] > 100
    for run, tolerance in (("P0 fp32", 1e-5), ("P1 bf16", 5e-3)):
        peer = time_to_result.run_peer(job | {"run": run})
        assert peer["steps"] == ours["steps"] == {"1": 5, "2": 5}
        assert peer["mean_loss"] == pytest.approx(ours["mean_loss"], rel=tolerance)
        for score in ("tail_f1", "macro_f1", "micro_f1"):
            assert peer[score] == pytest.approx(
                ours[score], abs=0.0 if run == "P0 fp32" else 0.05
            ), run


@pytest.mark.slow
def test_the_rehearsal_of_the_whole_job_has_every_case(demo: Path, tmp_path: Path) -> None:
    runs = ("ours bf16", "P1 bf16", "P0 fp32")
    output = tmp_path / "results"
    printed, record = run_benchmark(
        "time_to_result.py",
        *("--data", str(demo), "--rows", "48", "--test-rows", "40", "--repeats", "1"),
        *("--runs", "; ".join(runs), "--output", str(output)),
    )
    rows = {row["run"]: row for row in record["rows"]}
    assert tuple(rows) == runs
    assert not [row["error"] for row in rows.values() if "error" in row]
    ours = rows["ours bf16"]
    for row in rows.values():
        assert row["steps"] == {"1": 3, "2": 3}
        assert row["mean_loss"] == pytest.approx(ours["mean_loss"], rel=0.02)
        assert 0 < row["micro_f1"] <= 1
        assert sum(row["seconds"].values()) == pytest.approx(row["wall_seconds"])
        assert printed.count(f"\n| {row['run']} |") == 1
    assert f"| {rows['P0 fp32']['wall_seconds'] / ours['wall_seconds']:.2f} |" in printed
    json_path, md_path = sorted(output.iterdir())
    assert json.loads(json_path.read_text()) == record
    assert md_path.read_text().strip() in printed


@pytest.mark.slow
def test_a_whole_job_that_fails_is_a_row_with_its_reason(
    time_to_result: ModuleType, tmp_path: Path
) -> None:
    job = {
        "model": "none",
        "data": str(tmp_path / "none"),
        "output": str(tmp_path),
        "device": "cpu",
    }
    row = {"run": "ours fp32", **time_to_result.measure("ours fp32", job)}
    assert row["error"].startswith("exit code 3: twostage: error: there is no data folder")
    record = {
        "rows": [row],
        "machine": {"device": "a CPU", "threads": 2},
        "versions": {"torch": "1", "transformers": "2"},
        **{"commit": "c", "command": "python", "recipe": "r", "test_rows": 1},
        "train_rows_per_class": [1, 2],
    }
    assert "| ours fp32 | failed: exit code" in time_to_result.describe(record)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_table_has_the_median_round(time_to_result: ModuleType, count: int) -> None:
    rows = [{"run": "P0 fp32", "wall_seconds": wall} for wall in (7.0, 9.0, 8.0)[:count]]
    expected = {1: 7.0, 2: 7.0, 3: 8.0}[count]
    assert time_to_result.median_round(rows, "P0 fp32")["wall_seconds"] == expected
    assert time_to_result.median_round(rows, "P1 bf16") is None


@pytest.mark.slow
def test_without_any_one_saving_the_training_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, what stands in for it leaves the losses as they are."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import savings

    jobs = savings.plan(list(savings.SAVINGS), "tiny", "", [4], 24)
    assert {job["without"] for job in jobs} == {None, *savings.SAVINGS}
    code = (
        "import sys, json, savings\n"
        "for job in json.loads(sys.argv[1]):\n"
        "    if job['without'] is not None: savings.SAVINGS[job['without']][0]()\n"
        "    print(savings.run_job(job)['mean_loss'])"
    )

    def losses(names: list[str | None], stage: int) -> list[float]:
        chosen = [
            job | {"dropout": 0.0, "warmup": 1}
            for name in names
            for job in jobs
            if (job["without"], job["stage"]) == (name, stage)
        ]
        command = [sys.executable, "-c", code, json.dumps(chosen)]
        out = subprocess.run(command, capture_output=True, check=True, cwd=BENCHMARKS)
        return [float(line) for line in out.stdout.split()]

    for stage in (1, 2):
        names = [None, *(n for n, (_, stages) in savings.SAVINGS.items() if stage in stages)]
        seen = losses(names, stage)  # each without all of those before it, too
        assert len(seen) == len(names)
        assert seen == pytest.approx([seen[0]] * len(seen), rel=2e-3)


@pytest.mark.slow
def test_what_stands_in_for_a_saving_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in that is never called would leave the saving in."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import savings

    code = (
        "import sys, json, savings\n"
        "put, names, called = savings.put, set(), set()\n"
        "def note(module, name, stand_in):\n"
        "    def noted(*arguments, **named):\n"
        "        called.add(name)\n"
        "        return stand_in(*arguments, **named)\n"
        "    if callable(stand_in): names.add(name)\n"
        "    put(module, name, noted if callable(stand_in) else stand_in)\n"
        "savings.put = note\n"
        "for job in json.loads(sys.argv[1]):\n"
        "    names.clear(), called.clear()\n"
        "    savings.SAVINGS[job['without']][0]()\n"
        "    savings.run_job(job)\n"
        "    print(len(names), len(names & called))"
    )
    jobs = [
        job | {"warmup": 1, "steps": 2}
        for job in savings.plan(list(savings.SAVINGS), "tiny", "", [4], 24)
        if job["without"] is not None
    ]
    command = [sys.executable, "-c", code, json.dumps(jobs)]
    out = subprocess.run(command, capture_output=True, check=True, cwd=BENCHMARKS, text=True).stdout
    counts = [tuple(map(int, line.split())) for line in out.splitlines()]
    assert len(counts) == len(jobs)
    for job, (put, called) in zip(jobs, counts, strict=True):
        rounds = job["without"] == "rounded token counts and lengths"  # numbers, and no function
        assert put == called == (0 if rounds else 1), job["without"]


@pytest.mark.slow
def test_several_seeds_are_timed_with_and_without_a_common_trunk(
    demo: Path, tmp_path: Path
) -> None:
    small = ("--data", str(demo), "--texts", "64", "--seeds", "2")
    printed, record = run_benchmark("several_seeds.py", *small, "--output", str(tmp_path))
    alone, shared = record["rows"]
    assert (alone["run"], shared["run"]) == ("one after the other", "one trunk for all")
    for row in (alone, shared):
        assert len(row["stage_1_seconds"]) == len(row["stage_2_seconds"]) == 2
        parts = ("stage_1_seconds", "stage_2_seconds", "evaluation_seconds")
        total = row["shared_trunk_seconds"] + sum(sum(row[part]) for part in parts)
        assert 0.9 * row["seconds"] < total <= row["seconds"]
        assert row["examples_per_second"] == pytest.approx(2 * 2 * 64 / row["seconds"])
    assert shared["shared_trunk_seconds"] > 0 == alone["shared_trunk_seconds"]
    assert "Seeds of both stages, minilm, 64 texts:" in printed
    assert "| one after the other | 2 | " in printed
    (written,) = tmp_path.glob("several_seeds-minilm-cpu.json")
    assert json.loads(written.read_text())["rows"] == record["rows"]


def test_five_seeds_train_on_as_many_texts_as_long_as_sst2s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import several_seeds
    import workload

    job: dict[str, Any] = {"model": "bert-base", "texts": workload.SST2_TEXTS}
    monkeypatch.setattr(several_seeds, "random_checkpoint", lambda config: Checkpoint(config, {}))
    train, test = several_seeds.split(several_seeds.choose_workload(job).data, job["texts"])
    assert (len(train), len(test)) == (45_082, 872)
    assert float(train.store.lengths.float().mean()) == pytest.approx(13.31, abs=0.1)
    assert int(train.store.lengths.max()) <= 66
    assert len(test.store.ids) == int(test.store.offsets[-1])
    assert test.store.ids[0] == 101
