"""The benchmarks measure what they say: the same training on all sides, honest counts."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from time import sleep
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from twostage.data.samplers import random_batches
from twostage.fast import step as step_module
from twostage.fast import trunk as trunk_module
from twostage.fast.graphs import StepGraphs, bucket_of
from twostage.fast.step import Place, Step
from twostage.fast.trunk import compute_features
from twostage.fast.weights import FlatWeights
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.model.checkpoint import build_model
from twostage.model.config import BertConfig
from twostage.training.losses import cross_entropy
from twostage.training.stage import StageSettings, train_stage
from twostage.training.state import TrainingState

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TRAIN_THROUGHPUT = BENCHMARKS / "train_throughput.py"


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


def make_job(train_throughput: ModuleType, run: str, stage: int, **settings: Any) -> dict[str, Any]:
    """20 steps of 4 texts on the clock, after 2 that are not."""
    common = {"model": "tiny", "data": "", "device": "cpu", "warmup": 2}
    (job,) = train_throughput.make_jobs((run,), (stage,), (4,), 80, **common)
    return job | {"warmup": 2} | settings


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_without_dropout_every_rival_has_our_losses(
    train_throughput: ModuleType, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a learning rate at which a rival that learnt otherwise, or not at all, would differ."""

    def job(run: str, learning_rate: float = 1e-3) -> dict[str, Any]:
        # "aot_eager" is all of torch.compile but its code generator, which takes over a minute.
        settings = {"dropout": 0.0, "learning_rate": learning_rate, "compiled_by": "aot_eager"}
        return make_job(train_throughput, run, stage, **settings)

    ours = train_throughput.run_job(job("ours fp32"))["mean_loss"]
    untrained = train_throughput.run_job(job("ours fp32", 0.0))["mean_loss"]
    # Other batches; and, interpreted, too slow: tests/fast/test_kernels_in_training.py has it.
    others = {"group_by_length", "impl"}
    runs = {name: s for name, (_, s) in train_throughput.RUNS.items() if not others & set(s)}
    assert len(runs) == 11
    for run, settings in runs.items():
        tolerance = 5e-3 if "bf16" in run else 1e-4
        assert abs(ours - untrained) > 4 * tolerance * ours
        if settings.get("compiled"):  # leaves traces in its process
            ((result,),) = train_throughput.run_jobs(TRAIN_THROUGHPUT, [job(run)])
        else:
            result = train_throughput.run_job(job(run))
        assert result.get("mean_loss") == pytest.approx(ours, rel=tolerance), (run, result)


def test_ours_ticks_after_each_step_and_tells_of_captures(
    train_throughput: ModuleType, workload: ModuleType
) -> None:
    import harness

    events: list[Any] = []
    data = workload.random_texts(4, 2_000)
    step = make_small_step(workload, data, [])

    def take(rows_B: np.ndarray, number: int, learning_rate: float) -> Any:
        events.append(number)
        step.capture_seconds += 1.5
        return torch.tensor(0.5), torch.tensor(0.7)

    @contextmanager
    def make_step(*arguments: Any) -> Iterator[Step]:
        events.append("begins")
        step.places = [Place(0, rows_B, 0) for rows_B in arguments[3][0]]
        yield step

    def tick(loss: torch.Tensor) -> None:
        events.append(loss.item())
        clock.tick(loss)

    step.take = take
    clock = harness.StepClock(torch.device("cpu"), 0, 1, ends_loop=True)
    make = harness.watch_steps(make_step, lambda seconds: events.append(("ends", seconds)), tick)
    settings = StageSettings(epochs=1, learning_rate=0.1, batch_size=1)
    with pytest.raises(harness.Enough):
        train_stage(step.state, data, cross_entropy, settings, make_step=make)
    assert events == ["begins", 0, 0.5, 1, 0.5, ("ends", 3.0)]
    assert len(clock.step_seconds()) == 1


def make_small_step(workload: ModuleType, data: Any, batches: list[np.ndarray]) -> Step:
    """A step of a small model, for one epoch of stage 2."""
    checkpoint = workload.random_checkpoint(workload.SHAPES["tiny"])
    state = TrainingState(7, build_model(checkpoint, 2, torch.Generator()), stage=2)
    with FlatWeights(state, torch.bfloat16, impl="triton") as weights:
        return Step(state, data, cross_entropy, [batches], weights, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_the_clock_leaves_the_loss_of_ours_one_operation(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch, stage: int
) -> None:
    """Around the loss it would stand in the way of the step, which looks at what the loss is."""
    calls: list[set[str]] = []

    def count(*arguments: Any, **named: Any) -> torch.Tensor:
        calls.append({name for name, value in named.items() if value is not None})
        return fused_cross_entropy(*arguments, **named)

    monkeypatch.setattr(step_module, "fused_cross_entropy", count)
    result = train_throughput.run_job(make_job(train_throughput, "ours bf16", stage))
    num_steps = 23  # 2 + 20, and one that starts the clock
    if stage == 1:  # 2 that warm up and a last tick, and an epoch
        num_steps = 3 + result["texts_timed"] // 4
    assert len(calls) == num_steps
    expected = {"impl", "margins_C", "class_weights_C", "scale"} if stage == 1 else {"impl"}
    assert all(names == expected for names in calls)


@pytest.mark.slow
def test_ours_has_the_whole_data_sets_words_to_train(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those alone that occur in the steps on the clock."""
    used = []

    class Spy(FlatWeights):
        def __init__(self, state: Any, dtype: torch.dtype, used_tokens_V: Any, impl: str) -> None:
            used.append(used_tokens_V.tolist())
            super().__init__(state, dtype, used_tokens_V, impl)

    monkeypatch.setattr(step_module, "FlatWeights", Spy)
    job = make_job(train_throughput, "ours bf16", 2)
    train_throughput.run_job(job)
    case = train_throughput.make_case(job, torch.device("cpu"))
    store = case.workload.data.store
    assert used == [store.ids.unique().tolist()]
    timed = [
        store.ids[store.offsets[i] : store.offsets[i + 1]] for b in case.batches[:23] for i in b
    ]
    assert len(torch.cat(timed).unique()) < 0.8 * len(used[0])


@pytest.mark.slow
def test_the_time_of_stage_1_includes_the_frozen_layers(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All windows of the epoch, those of the warm-up not counted."""
    windows: list[int] = []

    def compute_slowly(*arguments: Any) -> Any:
        windows.append(len(arguments[2]))
        sleep(0.2)
        return compute_features(*arguments)

    monkeypatch.setattr(trunk_module, "WINDOW_TOKENS", 2_000)
    monkeypatch.setattr(trunk_module, "compute_features", compute_slowly)
    result = train_throughput.run_job(make_job(train_throughput, "ours bf16", 1))
    num_texts = len(train_throughput.make_workload("tiny", 1, Path(), 0.1).data)
    assert result["texts_timed"] == sum(windows[1:]) == num_texts
    assert len(windows[1:]) > 2
    seconds = num_texts / result["examples_per_second"]
    assert seconds > 0.2 * len(windows[1:])
    assert result["warmup_seconds"] >= 0.2
    assert result["step_ms_p20_p50_p80"][1] < 200  # a step in which no window is computed


@pytest.mark.slow
def test_ours_keeps_freed_memory_as_the_command_line_does(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(train_throughput, "keep_freed_memory", lambda: calls.append(1))
    train_throughput.run_job(make_job(train_throughput, "P0 fp32", 2))
    assert not calls
    train_throughput.run_job(make_job(train_throughput, "ours bf16", 2))
    assert calls


def test_texts_repeat_when_a_case_needs_more_than_there_are(workload: ModuleType) -> None:
    once = workload.make_workload("tiny", 1, Path(), 0.1).data
    data = workload.make_workload("tiny", len(once) + 1, Path(), 0.1).data
    assert len(data) == 2 * len(once)
    assert torch.equal(data.store.ids, torch.cat([once.store.ids] * 2))
    assert torch.equal(data.store.lengths, torch.cat([once.store.lengths] * 2))
    assert data.labels_N.tolist() == [*once.labels_N, *once.labels_N]


def test_both_stages_together_are_the_sum_of_their_times(train_throughput: ModuleType) -> None:
    speeds = {("ours bf16", 1, 16): 100.0, ("ours bf16", 2, 16): 25.0, ("P0 fp32", 1, 16): 10.0}
    assert train_throughput.describe_both_stages(speeds, 16) == ""
    speeds["P0 fp32", 2, 16] = 2.5
    assert train_throughput.describe_both_stages(speeds, 16) == (
        "Both stages at batch 16, an example in each: ours bf16 50 ms, P0 fp32 500 ms (10.00 ×)."
    )
    assert train_throughput.describe_both_stages(speeds, 64) == ""


@pytest.mark.slow
def test_a_profile_is_printed_and_nothing_written(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "train_throughput.py"), "--profile"]
    command += ["--model", "tiny", "--device", "cpu", "--output", str(tmp_path / "results")]
    finished = subprocess.run(
        [*command, "--batch-sizes", "4"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    for stage in (2, 1):
        assert f"Where a step goes: ours bf16, stage {stage}, batch 4\n" in finished.stdout
    assert "failed" not in finished.stdout
    assert "| `aten::" in finished.stdout
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_batches_grouped_by_length_are_counted_as_they_are(
    train_throughput: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train_throughput.run_job(make_job(train_throughput, "P2 bf16, by length", 2))
    job = make_job(train_throughput, "P2 bf16", 2)
    plain = train_throughput.run_job(job)
    mean = result["tokens_per_second"] / result["examples_per_second"]
    case = train_throughput.make_case(job, torch.device("cpu"))
    lengths = case.lengths(np.concatenate(case.batches[:23]))  # 2 + 20 steps and a last tick
    assert mean == pytest.approx(float(lengths.mean()))
    assert plain["tokens_per_second"] / plain["examples_per_second"] != pytest.approx(mean)


def test_a_packed_batch_is_what_transformers_makes(train_throughput: ModuleType) -> None:
    """All but the labels, of which it makes one a token."""
    import peers

    ids = [[5, 6, 7], [8], [9, 10]]
    texts = [{"input_ids": torch.tensor(i), "labels": n} for n, i in enumerate(ids)]
    batch = peers.flatten(texts)
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    expected = collate([{"input_ids": list(i)} for i in ids])
    assert batch.pop("labels").tolist() == [0, 1, 2]
    del expected["labels"]
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
        assert type(value) is type(expected[name])
        if isinstance(value, torch.Tensor):
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])
        else:
            assert value == expected[name]


def test_packed_texts_do_not_see_each_other(
    train_throughput: ModuleType, workload: ModuleType
) -> None:
    import peers

    work = workload.make_workload("tiny", 2, Path(), 0.0)
    store, losses = work.data.store, []
    texts = [
        {"input_ids": store.ids[store.offsets[i] : store.offsets[i + 1]], "labels": i}
        for i in range(2)
    ]
    for batch in (texts, texts[:1], texts[1:]):
        ours = build_model(work.checkpoint, 2, torch.Generator().manual_seed(0))
        model = peers.PeerClassifier(ours, peers.PACKED, torch.nn.functional.cross_entropy)
        losses.append(model(**peers.flatten(batch))["loss"].item())
    assert losses[1] != pytest.approx(losses[2], rel=1e-3)
    assert losses[0] == pytest.approx(sum(losses[1:]) / 2, rel=1e-5)


def test_flash_attention_takes_packed_texts(train_throughput: ModuleType) -> None:
    """Shapes alone, on torch's device without memory: the operation itself needs a GPU."""
    import peers

    parts = [
        torch.empty(1, 30, 2, 32, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for _ in range(3)
    ]
    ends = torch.empty(4, dtype=torch.int32, device="meta")
    packing: dict[str, Any] = {"dropout": 0.1, "scaling": 0.2}
    packing |= {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 12,
        "max_length_k": 12,
    }
    query, key, value = (x.transpose(1, 2) for x in parts)
    context, _ = peers.attend_packed(torch.nn.Module(), query, key, value, None, **packing)
    assert "FlashAttention" in type(context.grad_fn.next_functions[0][0]).__name__
    assert context.shape == parts[0].shape
    gradients = torch.autograd.grad(context.sum(), parts)
    assert [g.shape for g in gradients] == [x.shape for x in parts]


@pytest.mark.slow
def test_tf32_is_on_for_its_run_alone(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peers

    matmul, seen = torch.backends.cuda.matmul, []

    def watch_loss(*arguments: Any) -> Any:
        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            seen.append((matmul.allow_tf32, matmul.fp32_precision == "tf32"))
            return torch.nn.functional.cross_entropy(logits, labels)

        return loss

    monkeypatch.setattr(peers, "stage_loss", watch_loss)
    before = (matmul.allow_tf32, matmul.fp32_precision)
    for run, is_on in (("P0 fp32", False), ("P0 tf32", True)):
        seen.clear()
        train_throughput.run_job(make_job(train_throughput, run, 2))
        assert seen == [(is_on, is_on)] * 23  # 2 + 20 steps and a last tick
        assert (matmul.allow_tf32, matmul.fp32_precision) == before


def test_compiled_the_trainer_leaves_tf32_readable(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under `None` the Trainer sets the new switch alone, and reading the old one raises."""
    import peers
    from transformers import training_args
    from transformers.utils.import_utils import enable_tf32

    gpu, matmul = torch.device("cuda"), torch.backends.cuda.matmul
    chosen = peers.choose_tf32(True, "inductor", gpu)
    assert (peers.choose_tf32(True, None, gpu), peers.choose_tf32(False, None, gpu)) == (True, None)
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr("torch.backends.fp32_precision", "none")  # and back, at the end
    before = matmul.fp32_precision
    matmul.fp32_precision = "none"
    try:
        for tf32 in (chosen, None):
            enable_tf32.cache_clear()
            transformers.TrainingArguments(
                str(tmp_path),
                bf16=True,
                use_cpu=True,
                tf32=tf32,
                torch_compile=True,
                report_to="none",
            )
            if tf32 is None:
                with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
                    _ = matmul.allow_tf32
            else:
                assert not matmul.allow_tf32
    finally:
        enable_tf32.cache_clear()
        matmul.fp32_precision = before


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
        for i, label in enumerate(work.data.labels_N[:96])
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

    def counted(config: BertConfig) -> int:
        settings = asdict(config) | {"attn_implementation": "eager"}
        model = transformers.BertModel(transformers.BertConfig(**settings))
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


@pytest.mark.slow
def test_a_case_that_fails_or_hangs_is_a_row_with_its_reason(
    train_throughput: ModuleType,
) -> None:
    common = {"run": "ours fp32", "stage": 2, "batch_size": 4, "steps": 2, "warmup": 1}
    jobs = [common | {"model": model, "data": "", "device": "cpu"} for model in ("none", "tiny")]
    *_, rows = train_throughput.run_jobs(TRAIN_THROUGHPUT, jobs)
    assert rows[0]["error"] == "KeyError: 'none'"
    assert "Traceback" in rows[0]["stderr"]
    assert rows[1]["examples_per_second"] > 0
    *_, rows = train_throughput.run_jobs(TRAIN_THROUGHPUT, jobs, seconds_a_job=0.01)
    assert [row["error"] for row in rows] == ["took longer than 0 s"] * 2
    *_, rows = train_throughput.run_jobs(TRAIN_THROUGHPUT, jobs, seconds=0.0)
    assert [row["error"] for row in rows] == ["no time left"] * 2


@pytest.mark.slow
def test_the_gpu_suite_rehearses_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--rehearse", "--output"]
    finished = subprocess.run(
        [*command, str(tmp_path), "--commit", "a commit"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (json_path,) = tmp_path.glob("gpu_suite-rehearsal-*.json")
    record = json.loads(json_path.read_text())
    assert record["commit"] == "a commit"
    assert record["tests"]["exit_code"] == 0
    in_stage_2 = ["ours bf16, graphs", "P4 bf16", "P1 bf16", "ours bf16, Triton", "P6 bf16"]
    runs = [*in_stage_2, "ours bf16", "ours bf16"]
    assert [row["run"] for row in record["rows"]] == runs
    assert [row["stage"] for row in record["rows"]] == [2] * 6 + [1]
    assert all(row["examples_per_second"] > 0 for row in record["rows"])
    captures = {row["run"]: row["capture_seconds"] for row in record["rows"]}
    with_kernels = {"ours bf16, graphs", "ours bf16, Triton"}
    assert {run for run, seconds in captures.items() if seconds > 0} == with_kernels
    for row in record["rows"][:6]:
        at_p50 = 4e3 / row["step_ms_p20_p50_p80"][1]
        assert row["examples_per_second_at_p50"] == pytest.approx(at_p50, rel=0.01)
    (profiled,) = [row for row in record["rows"] if row.get("profile")]
    assert sum(entry["share"] for entry in profiled["profile"]) > 0.5
    assert 0 < profiled["operations_ms_per_step"] < profiled["mean_step_ms"]
    assert {row["operation"] for row in record["kernels"]} == {"AdamW"}
    assert all(row["close"] for row in record["kernels"])
    markdown = json_path.with_suffix(".md").read_text()
    assert markdown.count("| P4 bf16 |") == 1
    assert "; gaps: " in markdown
    (seeds,) = record["seeds"]
    assert seeds["examples_per_second"] > 0
    assert "Seeds of both stages" in markdown

    # The suite prints where the results go and the plan, then every row in the order of the plan.
    lines = finished.stdout.splitlines()
    assert lines[0].startswith(f"results: {tmp_path}/gpu_suite-rehearsal-")
    rows = [json.loads(line) for line in lines if line.startswith("{")]
    assert rows[0] == record["limits"]
    assert rows[1:7] == record["rows"][:6]
    assert rows[7:9] == [seeds, record["tests"]]
    assert rows[9:-2] == record["kernels"]
    assert rows[-2:] == [record["rows"][6], record]


@pytest.mark.slow
def test_the_plan_of_the_gpu_suite_fits_its_commands(train_throughput: ModuleType) -> None:
    """Ten minutes a part, told without a GPU, the most telling cases first."""
    import gpu_suite

    command = [sys.executable, str(BENCHMARKS / "gpu_suite.py"), "--plan"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert list(gpu_suite.SECONDS) == ["stage-2", "seeds", "tests", "kernels", "stage-1"]
    cases = gpu_suite.make_plan(list(gpu_suite.SECONDS), rehearse=False)
    for part, limit in gpu_suite.SECONDS.items():
        assert gpu_suite.LIMITS_SECONDS + limit <= 540
        expected = sum(case.expected for case in cases if case.part == part)
        assert expected <= 0.9 * limit
        assert f"| {part} | **in all** | **{expected:.0f}** | **{limit:.0f}** |" in printed
    for case in cases:
        line = f"| {case.part} | {case.name} | {case.expected:.0f} | {case.at_most:.0f} |"
        assert line in printed
    assert [case.name for case in cases if case.part == "stage-2"] == [
        *("ours bf16, graphs, batch 16", "P4 bf16, batch 16", "P1 bf16, batch 16"),
        *("ours bf16, Triton, batch 16", "profile of ours bf16, graphs, batch 16"),
        *("ours bf16, batch 16", "P2 bf16, batch 16"),
        *("ours bf16, graphs, batch 512", "P4 bf16, batch 512", "P1 bf16, batch 512"),
        *("ours bf16, graphs, batch 64", "P4 bf16, batch 64", "P1 bf16, batch 64"),
        *("P6 bf16, batch 16", "P0 fp32, batch 16", "P0 tf32, batch 16", "P3 bf16, batch 16"),
    ]
    seeds = [(job["run"], job["seeds"]) for job in gpu_suite.plan_seeds(rehearse=False)]
    assert dict(seeds) == {
        "graphs, one trunk for all": 5,
        "graphs": 5,
        "kernels": 1,
        "one trunk for all": 1,
    }
    assert {job["texts"] for job in gpu_suite.plan_stage(1, rehearse=False)} == {45_082}


@pytest.mark.slow
def test_the_gpu_suites_tests_tell_what_failed_when_time_is_up(
    train_throughput: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import gpu_suite

    slow = tmp_path / "test_slow.py"
    slow.write_text(
        "import time, warnings\n"
        "def test_warns(): warnings.warn('Synchronization debug mode is a prototype')\n"
        "def test_fails(): assert 1 == 2, 'a reason'\n"
        "def test_hangs(): time.sleep(600)\n"
    )
    monkeypatch.setattr(gpu_suite, "REHEARSED_TESTS", (str(slow),))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script's shell does before an `&`
    try:
        result = gpu_suite.run_tests(rehearse=True, seconds=10.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result["exit_code"] is None
    assert result["seconds"] < 60
    assert len(result["failed"]) == 1
    assert "test_fails" in result["failed"][0]
    assert "test_warns PASSED" in result["output"]
    assert "a reason" in result["output"]
    assert result["output"].endswith("took longer than 10 s")


@pytest.mark.slow
def test_the_gpu_suite_runs_the_tests_in_its_order(train_throughput: ModuleType) -> None:
    """Attention first, and all files of the kernels but that of compilation."""
    import gpu_suite

    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-q"]
    collected = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--collect-only", *gpu_suite.TESTS],
        capture_output=True,
        text=True,
        check=True,
        cwd=gpu_suite.ROOT,
    ).stdout
    files = [line.split("::")[0] for line in collected.splitlines() if "::" in line]
    assert list(dict.fromkeys(files)) == [test.split("::")[0] for test in gpu_suite.TESTS]
    kernels = {
        str(path.relative_to(gpu_suite.ROOT))
        for path in (gpu_suite.ROOT / "tests/kernels").glob("test_*.py")
    }
    assert kernels - set(files) == {"tests/kernels/test_compilation.py"}


def test_every_step_of_the_benchmark_is_replayed(
    workload: ModuleType, train_throughput: ModuleType
) -> None:
    """An epoch of stage 2 at batch 16, as the benchmark draws it."""
    texts, size = workload.NUM_RANDOM_TEXTS["bert-base"], 16
    data = workload.random_texts(texts, workload.SHAPES["bert-base"].vocab_size)
    batches = random_batches(texts, size, (train_throughput.SEED, 2), epoch=0)
    lengths_N = data.store.lengths.numpy()
    # No step is taken, so a small model will do.
    graphs = StepGraphs(make_small_step(workload, data, batches), enabled=True)
    buckets = [graphs.find_bucket(rows) for rows in batches]
    assert len(buckets) == 500
    assert None not in buckets
    # Rare buckets go to larger graphs, with little filler: fewer graphs than buckets.
    own = [bucket_of(lengths_N[rows]) for rows in batches]
    assert len(set(buckets)) < len(set(own)) <= 20
    larger = [
        theirs.num_tokens / mine.num_tokens for theirs, mine in zip(buckets, own, strict=True)
    ]
    assert sum(ratio > 1 for ratio in larger) < 15
    assert max(larger) < 1.5


@pytest.mark.slow
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
