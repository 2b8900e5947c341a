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

from twostage.model.checkpoint import build_model

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
    """At a learning rate at which a rival that learnt otherwise, or not at all, would differ."""

    def mean_loss(run: str, learning_rate: float) -> float:
        (job,) = train_throughput.make_jobs(
            (run,), (stage,), (4,), 80, model="tiny", data="", device="cpu", warmup=2, dropout=0.0
        )
        result = train_throughput.run_job(job | {"learning_rate": learning_rate})
        return float(result["mean_loss"])

    ours, untrained = mean_loss("ours fp32", 1e-3), mean_loss("ours fp32", 0.0)
    runs = [name for name, (_, s) in train_throughput.RUNS.items() if not s.get("group_by_length")]
    assert len(runs) == 7
    for run in runs:
        tolerance = 1e-4 if "fp32" in run else 5e-3
        assert abs(ours - untrained) > 4 * tolerance * ours
        assert mean_loss(run, 1e-3) == pytest.approx(ours, rel=tolerance), run


def test_batches_grouped_by_length_are_counted_as_they_are(
    train_throughput: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = train_throughput.make_jobs(
        ("P2 bf16, by length",), (2,), (4,), 40, model="tiny", data="", device="cpu", warmup=1
    )
    result = train_throughput.run_job(job)
    (other,) = train_throughput.make_jobs(
        ("P2 bf16",), (2,), (4,), 40, model="tiny", data="", device="cpu", warmup=1
    )
    mean = result["tokens_per_second"] / result["examples_per_second"]
    plain = train_throughput.run_job(other)
    texts = train_throughput.make_workload("tiny", 48, Path(), 0.1).data.store.lengths
    assert mean == pytest.approx(float(texts.float().mean()))
    assert plain["tokens_per_second"] / plain["examples_per_second"] != pytest.approx(mean)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
def test_the_graphs_of_p4_train_as_its_single_steps_do(
    train_throughput: ModuleType, workload: ModuleType
) -> None:
    import harness
    import peers

    device = torch.device("cuda")
    work = workload.make_workload("tiny", 96, Path(), 0.0)
    store = work.data.store
    texts = [
        {"input_ids": store.ids[store.offsets[i] : store.offsets[i + 1]], "labels": int(label)}
        for i, label in enumerate(work.data.labels_N)
    ]
    lengths = {peers.pad_to_bucket(texts[i : i + 4])["input_ids"].shape[1] for i in range(0, 96, 4)}
    assert len(lengths) > 2
    outcomes = []
    for capture in (True, False):
        ours = build_model(work.checkpoint, 2, torch.Generator().manual_seed(0))
        model = peers.PeerClassifier(ours, "sdpa", peers.stage_loss(2, [1, 1], device)).to(device)
        clock = harness.StepClock(device, 0, 23)
        peers.train_with_graphs(model, texts, 4, 1e-3, device, clock, capture=capture)
        outcomes.append((torch.stack(clock.losses), [p.detach() for p in model.parameters()]))
    (graph_losses, graph_weights), (losses, weights) = outcomes
    torch.testing.assert_close(graph_losses, losses, rtol=1e-2, atol=1e-3)
    for ours_p, theirs_p in zip(graph_weights, weights, strict=True):
        torch.testing.assert_close(ours_p, theirs_p, rtol=0.05, atol=2e-3)


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
    train_throughput: ModuleType,
) -> None:
    common = {"run": "ours fp32", "stage": 2, "batch_size": 4, "steps": 2, "warmup": 1}
    jobs = [common | {"model": model, "data": "", "device": "cpu"} for model in ("none", "tiny")]
    *_, rows = train_throughput.run_jobs(jobs)
    assert rows[0]["error"] == "KeyError: 'none'"
    assert "Traceback" in rows[0]["stderr"]
    assert rows[1]["examples_per_second"] > 0
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
