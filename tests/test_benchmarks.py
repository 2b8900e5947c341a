"""The benchmarks measure what they say: the same training on all sides, honest counts."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def train_throughput(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import train_throughput

    return train_throughput


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import workload

    return workload


@pytest.mark.parametrize("stage", [1, 2])
def test_without_dropout_every_rival_has_our_losses(
    train_throughput: ModuleType, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    common = {"model": "tiny", "data": "", "device": "cpu", "warmup": 2, "dropout": 0.0}
    losses = {}
    for run, settings in train_throughput.RUNS.items():
        if not settings[1].get("group_by_length"):
            (job,) = train_throughput.make_jobs((run,), (stage,), (4,), 24, **common)
            losses[run] = train_throughput.run_job(job)["mean_loss"]
    ours = losses.pop("ours fp32")
    assert len(losses) == 6
    for run, loss in losses.items():
        tolerance = 1e-5 if "fp32" in run else 1e-3
        assert loss == pytest.approx(ours, rel=tolerance), run


def test_two_runs_on_the_same_texts_differ_when_the_texts_do(train_throughput: ModuleType) -> None:
    common = {"model": "tiny", "data": "", "device": "cpu", "warmup": 2, "dropout": 0.0}
    jobs = train_throughput.make_jobs(("ours fp32",), (2,), (4, 5), 20, **common)
    first, second = (train_throughput.run_job(job)["mean_loss"] for job in jobs)
    assert first != pytest.approx(second, rel=1e-5)


def test_a_layers_needed_operations_are_those_that_torch_counts(workload: ModuleType) -> None:
    """Of a trained layer below the last, on texts of equal length, where nothing is padded."""

    def counted(config: object) -> int:
        model = transformers.BertModel(
            transformers.BertConfig(**asdict(config), attn_implementation="eager")  # type: ignore[call-overload]
        )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.randint(100, 200, (3, 17)))
        return counter.get_total_flops()

    small = workload.SHAPES["tiny"]
    large = replace(small, num_hidden_layers=small.num_hidden_layers + 1)
    lengths_B = np.array([17, 17, 17])
    forward = counted(large) - counted(small)
    for stage, passes in ((2, 3), (1, 1)):
        needed = [workload.needed_flops(c, lengths_B, stage) for c in (small, large)]
        assert needed[1] - needed[0] == passes * forward
        # the last layer and the head come on top, and are less than a full layer
        assert 0 < needed[0] - passes * forward < 3 * forward


def test_random_texts_have_the_snippets_lengths(workload: ModuleType) -> None:
    data = workload.random_texts(4_000, 30_522)
    histogram = json.loads(workload.HISTOGRAM.read_text())
    lengths, counts = np.array(histogram["lengths"]).T
    mean = (lengths * counts).sum() / counts.sum()
    assert float(data.store.lengths.float().mean()) == pytest.approx(mean, rel=0.03)
    starts = data.store.offsets[:-1]
    assert set(data.store.ids[starts].tolist()) == {workload.CLS}
    assert set(data.store.ids[starts + data.store.lengths - 1].tolist()) == {workload.SEP}
    assert 0.14 < (data.labels_N == 0).mean() < 0.20
    # as many different words as in as many real snippets, roughly
    assert 7_000 < len(data.store.ids.unique()) < 12_000


def test_a_case_that_fails_or_hangs_is_a_row_with_its_reason(
    train_throughput: ModuleType, tmp_path: Path
) -> None:
    jobs = [
        {"run": "ours fp32", "stage": 2, "batch_size": 4, "steps": 2, "model": "none"},
        {"run": "ours fp32", "stage": 2, "batch_size": 4, "steps": 2, "model": "tiny"},
    ]
    *_, rows = train_throughput.run_jobs(jobs[:1])
    assert "KeyError" in rows[0]["error"]
    *_, rows = train_throughput.run_jobs(jobs, seconds_a_job=0.01)
    assert [row["error"] for row in rows] == ["took longer than 0 s"] * 2
    *_, rows = train_throughput.run_jobs(jobs, seconds=0.0)
    assert [row["error"] for row in rows] == ["no time left"] * 2


def test_the_gpu_suite_rehearses_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--rehearse", "--output"]
    finished = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (json_path,) = tmp_path.glob("gpu_suite-rehearsal-*.json")
    record = json.loads(json_path.read_text())
    assert record["tests"]["exit_code"] == 0
    assert {(row["run"], row["stage"]) for row in record["rows"]} == {
        (run, stage)
        for run in ("ours bf16", "P0 fp32", "P1 bf16", "P2 bf16", "P4 bf16")
        for stage in (1, 2)
    }
    assert all(row["examples_per_second"] > 0 for row in record["rows"])
    (profiled,) = [row for row in record["rows"] if row.get("profile")]
    assert sum(entry["share"] for entry in profiled["profile"]) > 0.5
    markdown = json_path.with_suffix(".md").read_text()
    assert markdown.count("| P4 bf16 |") == 2
    assert "Where a step goes" in markdown


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_without_a_gpu_the_suite_says_so() -> None:
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_suite.py")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stderr == ("gpu_suite: torch sees no CUDA GPU here; --rehearse runs on a CPU\n")
