"""The command as a user meets it: files written, sentences said, exit codes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from twostage.api import Result
from twostage.cli import main
from twostage.data.tables import Classes, write_table
from twostage.experiment import ExperimentData
from twostage.recipe import Recipe
from twostage.training.optim import adamw_


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    rows = [("good film", 1), ("great fun", 1), ("fine", 1), ("bad film", 0)] * 4
    write_table(folder / "train.csv", ("text", "label"), rows)
    write_table(folder / "test.csv", ("text", "label"), rows[:4])
    return folder


def arguments(data: Path, model: Path, output: Path, *more: str) -> list[str]:
    return ["train", "-d", str(data), "-o", str(output), "--model", str(model), *more]


def fails(capsys: pytest.CaptureFixture[str], code: int, message: str, *words: str) -> None:
    """The command exits with `code` and one sentence on standard error that holds `message`."""
    assert main(list(words)) == code
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("twostage: error: ")
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_train_writes_results_as_published_and_prints_the_tail_first(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "out"
    assert main(arguments(data, tiny, output, "--seeds", "7,42", "--save-models")) == 0
    printed = capsys.readouterr().out

    results = pd.read_csv(output / "results.csv", index_col=0)
    assert list(results.columns) == ["Seed", "F1", "F1_0", "F1_1"]
    assert list(results["Seed"]) == [7, 42]
    assert list(results.index) == [0, 1]
    averages = pd.read_csv(output / "ave_sst.csv", index_col=0)
    pd.testing.assert_series_equal(averages.iloc[0], results.mean(), check_names=False)
    assert (output / "results.csv").read_text().startswith(",Seed,F1,F1_0,F1_1\n0,7,")

    header = next(line for line in printed.splitlines() if "micro-F1*" in line)
    assert header.index("tail F1 ('0')") < header.index("macro-F1") < header.index("micro-F1*")
    assert "16 training rows ('0': 4, '1': 12), 4 test rows; reweight, 1 + 1 epochs" in printed
    assert "class '0' has 4 of 16 training rows" in printed
    assert "* micro-F1 is the accuracy" in printed
    mean, std = (next(r for r in printed.splitlines() if r.startswith(n)) for n in ("mean", "std"))
    tail_F1 = results["F1_0"]
    assert mean.split()[1] == f"{tail_F1.mean():.3f}"
    assert std.split()[1] == f"{tail_F1.std():.3f}"

    with (output / "log.csv").open() as file:
        log = list(csv.DictReader(file))
    assert {(row["seed"], row["stage"]) for row in log} == {
        ("7", "1"),
        ("7", "2"),
        ("42", "1"),
        ("42", "2"),
    }
    assert all(float(row["loss"]) > 0 for row in log)

    saved = output / "seed-42"
    assert {p.name for p in saved.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert not list(output.glob("*.partial"))
    # a saved model can be trained further
    assert main(arguments(data, saved, tmp_path / "again", "--seeds", "1", "-e", "0")) == 0


def test_the_plain_engine_trains_by_the_plain_step(
    tiny: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def update(*arguments: Any) -> None:
        calls.append("plain")
        adamw_(*arguments)

    monkeypatch.setattr("twostage.training.stage.adamw_", update)
    for engine in ("fast", "plain"):
        assert bool(calls) is False
        output = tmp_path / engine
        assert main(arguments(data, tiny, output, "--engine", engine)) == 0
        assert json.loads((output / "metrics.json").read_text())["settings"]["engine"] == engine
    assert calls


def test_metrics_json_tells_everything_about_every_seed(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "o"
    command = arguments(data, tiny, output, "--seeds", "7,42,1", "--precision", "fp32")
    assert main([*command, "--max-length", "9"]) == 0
    report = json.loads((output / "metrics.json").read_text())
    assert report["classes"] == [
        {"name": "0", "train_rows": 4},
        {"name": "1", "train_rows": 12},
    ]
    assert report["tail_class"] == "0"
    results = pd.read_csv(output / "results.csv", index_col=0)
    assert [seed["seed"] for seed in report["seeds"]] == [7, 42, 1]
    for seed, row in zip(report["seeds"], results.itertuples(), strict=True):
        assert [c["f1"] for c in seed["per_class"]] == [row.F1_0, row.F1_1]
        assert [c["class"] for c in seed["per_class"]] == ["0", "1"]
        assert [c["support"] for c in seed["per_class"]] == [1, 3]
        assert [sum(row) for row in seed["confusion"]] == [1, 3]
        assert seed["micro_f1"] == row.F1
        assert seed["tail_f1"] == row.F1_0
        assert seed["macro_f1"] == pytest.approx((row.F1_0 + row.F1_1) / 2)
        for score in ("precision", "recall", "average_precision"):
            assert all(0 <= c[score] <= 1 for c in seed["per_class"])
        assert seed["tail_average_precision"] == seed["per_class"][0]["average_precision"]
        assert seed["balanced_accuracy"] == pytest.approx(
            sum(c["recall"] for c in seed["per_class"]) / 2
        )
        assert -1 <= seed["mcc"] <= 1
        assert all(seed["seconds"][part] > 0 for part in ("stage_1", "stage_2", "evaluation"))
    for name in ("tail_f1", "macro_f1", "balanced_accuracy", "mcc", "tail_average_precision"):
        values = pd.Series([seed[name] for seed in report["seeds"]])
        assert report["mean"][name] == pytest.approx(values.mean())
        assert report["std"][name] == pytest.approx(values.std())
    assert report["inputs"] == {
        "model": str(tiny),
        "train": str(data / "train.csv"),
        "test": str(data / "test.csv"),
    }
    assert report["settings"]["max_length"] == 9
    assert report["settings"]["seeds"] == [7, 42, 1]
    assert report["machine"]["arithmetic"] == "fp32 on cpu"
    assert report["versions"]["torch"] == torch.__version__

    assert main([*command[:-3], "7", *command[-2:]]) == 0
    alone = json.loads((output / "metrics.json").read_text())
    assert alone["std"]["tail_f1"] is None
    assert json.loads((output / "metrics.json.previous").read_text()) == report


def test_evaluate_scores_a_saved_model_as_training_did(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    rows = [("a good film " * 9, 1), ("bad film", 0)] * 40
    write_table(data / "test.csv", ("text", "label"), rows)
    flags = ["--seeds", "7", "--save-models", "--max-length", "6", "--lr-stage-2", "1e-2"]
    assert main(arguments(data, tiny, output, *flags)) == 0
    trained = json.loads((output / "metrics.json").read_text())["seeds"][0]
    capsys.readouterr()
    command = ["evaluate", "--model", str(output / "seed-7"), "-d", str(data / "test.csv")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    table = {line.split("  ")[0]: line.split()[1:] for line in printed.splitlines() if line}
    for c, name in enumerate(("'0' (tail)", "'1'")):
        scores = trained["per_class"][c]
        expected = [scores[k] for k in ("precision", "recall", "f1", "average_precision")]
        assert table[name][-5:] == [*(f"{x:.3f}" for x in expected), str(scores["support"])]
    names = ("tail_f1", "tail_average_precision", "macro_f1", "balanced_accuracy", "mcc")
    assert table["all"] == [f"{trained[name]:.3f}" for name in (*names, "micro_f1")]
    for c in (0, 1):
        assert table[f"true '{c}'"][1:] == [str(n) for n in trained["confusion"][c]]
    assert "class '0' has 4 of 16 training rows" in printed


def test_evaluate_refuses_what_it_cannot_score(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    assert main(arguments(data, tiny, output, "--seeds", "7", "--save-models", "-e", "0")) == 0
    capsys.readouterr()
    saved, test = str(output / "seed-7"), data / "test.csv"
    fails(capsys, 3, "there is no model folder", "evaluate", "--model", "nowhere", "-d", str(test))
    fails(capsys, 3, "not describe a trained", "evaluate", "--model", str(tiny), "-d", str(test))
    fails(capsys, 3, "there is no file", "evaluate", "--model", saved, "-d", str(data / "absent"))
    test.write_text("text,label\na,1\nb,5\n")
    message = "test.csv, line 3: class '5' (no such row in the training data of"
    fails(capsys, 3, message, "evaluate", "--model", saved, "-d", str(test))


def test_notes_on_the_model_are_sentences_too(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = load_file(tiny / "model.safetensors")
    kept = {name: tensor for name, tensor in stored.items() if "pooler" not in name}
    save_file(kept, tiny / "model.safetensors")
    assert main(arguments(data, tiny, tmp_path / "o", "--seeds", "1")) == 0
    error = capsys.readouterr().err
    assert error == (f"twostage: note: '{tiny}' has no pooler: it starts from random weights\n")


def test_every_published_short_flag_and_method_runs(tiny: Path, data: Path, tmp_path: Path) -> None:
    write_table(data / "aug.csv", ("org_ind", "text", "label"), [(0, "good", 1), (3, "bad", 0)] * 4)
    runs = [
        ["--method", "augment", "--upstream-schedule", "--sampler", "token-budget"],
        ["--method", "vanilla", "-f", "2"],
        ["--method", "reweight", "-e", "2", "-f", "0", "--sampler", "class-balanced"],
        [
            "--loss",
            "ce",
            "--class-weights",
            "inverse-sqrt",
            "--precision",
            "bf16",
            "--threads",
            "1",
        ],
        ["--ldam-s", "2", "--ldam-max-m", "0.3", "--stage-1-layers", "2", "--device", "cpu"],
        ["--batch-size", "3", "--max-length", "4", "--lr-stage-1", "1e-3", "--lr-stage-2", "1e-3"],
    ]
    for i, run in enumerate(runs):
        assert main(arguments(data, tiny, tmp_path / f"o{i}", "--seeds", "3", *run)) == 0


def test_every_flag_of_train_reaches_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, object] = {}

    def run_experiment(
        model: Path, data: ExperimentData, output: Path, recipe: Recipe, **kw: object
    ) -> Result:
        seen.update(model=model, data=data, output=output, recipe=recipe, **kw)
        return Result(Classes(("0", "1"), "x"), (1, 2))

    def find_model(name: str, **kw: object) -> Path:
        return Path("found") / name

    monkeypatch.setattr("twostage.experiment.run_experiment", run_experiment)
    monkeypatch.setattr("twostage.experiment.read_data", lambda *given, **named: (*given, named))
    monkeypatch.setattr("twostage.assets.hub.find_model", find_model)
    monkeypatch.setattr("twostage.report.format_results", lambda result: "")
    monkeypatch.setattr("torch.set_num_threads", lambda n: seen.update(threads=n))
    monkeypatch.setattr("twostage.memory.keep_freed_memory", lambda: seen.update(memory="kept"))
    assert main(["train", "-d", "D", "-o", "O"]) == 0
    assert seen["memory"] == "kept"
    assert seen["recipe"] == Recipe()
    assert (seen["model"], seen["save_models"]) == (Path("found/bert-base-uncased"), False)

    flags = (
        "-d D -o O --model M --method augment -e 3 -f 4 --seeds 5,6 --batch-size 8 --max-length 9 "
        "--lr-stage-1 0.1 --lr-stage-2 0.2 --stage-1-layers 2 --loss ldam --class-weights inverse "
        "--ldam-s 3 --ldam-max-m 0.4 --sampler class-balanced --precision bf16 --device cpu "
        "--kernels torch --upstream-schedule --cache-trunk --save-models --threads 2 "
        "--encoding cp1252 --delimiter tab --quoting none --text-column T --label-column L"
    )
    assert main(["train", *flags.split()]) == 0
    assert seen["recipe"] == Recipe(
        method="augment",
        epochs_stage_1=3,
        epochs_stage_2=4,
        seeds=(5, 6),
        batch_size=8,
        max_length=9,
        learning_rate_stage_1=0.1,
        learning_rate_stage_2=0.2,
        stage_1_layers=2,
        loss="ldam",
        class_weights="inverse",
        ldam_s=3.0,
        ldam_max_m=0.4,
        sampler="class-balanced",
        precision="bf16",
        device="cpu",
        kernels="torch",
        upstream_schedule=True,
        cache_trunk=True,
    )
    assert (seen["model"], seen["save_models"], seen["threads"]) == (Path("found/M"), True, 2)
    assert seen["data"] == (
        Path("D"),
        seen["recipe"],
        {
            "encoding": "cp1252",
            "delimiter": "tab",
            "quoting": "none",
            "text_column": "T",
            "label_column": "L",
        },
    )


def test_results_of_an_earlier_run_are_kept_aside(tiny: Path, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "o"
    command = arguments(data, tiny, output, "-e", "0", "--save-models", "--seeds")
    assert main([*command, "1"]) == 0
    earlier = (output / "results.csv").read_text()
    weights = (output / "seed-1" / "model.safetensors").read_bytes()
    assert main([*command, "2"]) == 0
    assert (output / "results.csv.previous").read_text() == earlier
    assert (output / "results.csv").read_text() != earlier
    assert (output / "seed-1.previous" / "model.safetensors").read_bytes() == weights
    assert {path.name for path in output.glob("seed-*")} == {"seed-1.previous", "seed-2"}
    assert main([*command, "1"]) == 0
    assert main([*command, "1", "--lr-stage-2", "0.1"]) == 0
    assert (output / "seed-1.previous" / "model.safetensors").read_bytes() == weights
    assert (output / "seed-1" / "model.safetensors").read_bytes() != weights


def test_a_run_that_fails_at_its_start_takes_no_earlier_results_place(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "o"
    command = arguments(data, tiny, output, "-e", "0", "--save-models", "--seeds", "1")
    assert main(command) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    whole = (tiny / "model.safetensors").read_bytes()
    (tiny / "model.safetensors").write_bytes(whole[:-1])
    capsys.readouterr()
    fails(capsys, 3, "model.safetensors is not a readable safetensors file", *command)
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before


def test_string_labels_and_three_classes(tiny: Path, tmp_path: Path) -> None:
    rows = [("good", "great"), ("so so", "fair"), ("bad", "poor"), ("bad", "poor")]
    for name in ("train.csv", "test.csv"):
        write_table(tmp_path / "d" / name, ("text", "label"), rows)
    assert main(arguments(tmp_path / "d", tiny, tmp_path / "o", "--seeds", "1")) == 0
    header = (tmp_path / "o" / "results.csv").read_text().splitlines()[0]
    assert header == ",Seed,F1,F1_0,F1_1,F1_2"


def test_bad_data_is_one_sentence_and_exit_code_3(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data, tiny, tmp_path / "o", "--seeds", "1")
    absent = [*command]
    absent[2] = str(tmp_path / "absent")
    fails(capsys, 3, "there is no data folder", *absent)

    train, test = data / "train.csv", data / "test.csv"
    good = train.read_text()
    for content, message in [
        ("", "train.csv is empty"),
        ("text,label\n", "train.csv has a header but no rows"),
        ("text,label\na,1\nb\nc,\n", "2 bad rows: line 3: 1 fields"),
        ("text,label\na,1\nb,1\n", "all 2 rows have class '1'"),
    ]:
        train.write_text(content)
        fails(capsys, 3, message, *command)
    train.write_text(good)
    test.write_text("text,label\na,1\nb,5\n")
    fails(capsys, 3, "test.csv, line 3: class '5' (no such row in", *command)
    test.unlink()
    fails(capsys, 3, "there is no file", *command)
    assert not (tmp_path / "o" / "results.csv").exists()


def test_augment_without_aug_csv_says_what_it_reads(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data, tiny, tmp_path / "o", "--method", "augment")
    fails(capsys, 3, "aug.csv', which does not exist", *command)


def test_an_unknown_model_path_is_one_sentence_and_exit_code_3(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data, tmp_path / "no-model", tmp_path / "o")
    fails(capsys, 3, f"there is no model folder '{tmp_path / 'no-model'}'", *command)


@pytest.mark.slow
def test_a_models_name_is_looked_up_on_the_hub_after_all_else_was_checked(
    data: Path, tmp_path: Path
) -> None:
    def run(data_path: Path) -> subprocess.CompletedProcess[str]:
        command = ["train", "-d", str(data_path), "-o", str(tmp_path / "o"), "--model", "some/bert"]
        # port 9 discards: nobody listens there
        hub = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub")}
        return subprocess.run(
            [sys.executable, "-m", "twostage", *command],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **hub, "NO_PROXY": "127.0.0.1"},
        )

    unreachable, bad_data = run(data), run(tmp_path / "nowhere")
    assert unreachable.returncode == 4
    assert unreachable.stderr.startswith("twostage: error: some/bert could not be downloaded from")
    assert "check the network" in unreachable.stderr
    assert unreachable.stderr.count("\n") == 1
    assert bad_data.returncode == 3
    assert "there is no data folder" in bad_data.stderr
    assert not (tmp_path / "o").exists()


def test_fetch_hands_each_name_to_its_function_with_its_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[object, ...]] = []
    for name, module in [
        ("fetch_sst2", "data_sets"),
        ("fetch_aug", "data_sets"),
        ("fetch_demo", "data_sets"),
        ("fetch_model", "hub"),
    ]:

        def fetch(*given: object, name: str = name, **kw: object) -> bool:
            calls.append((name, *given))
            return len(calls) % 2 == 1

        monkeypatch.setattr(f"twostage.assets.{module}.{name}", fetch)
    for words in ("sst2", "aug", "demo --to here", "owner/bert", "bert --to there"):
        assert main(["fetch", *words.split()]) == 0
    assert calls == [
        ("fetch_sst2", Path("SST-2")),
        ("fetch_aug", Path("down_sampled/0.2")),
        ("fetch_demo", Path("here")),
        ("fetch_model", "owner/bert", None),
        ("fetch_model", "bert", Path("there")),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "SST-2: train.tsv and dev.tsv"
    assert lines[1] == "down_sampled/0.2: aug.csv were there already"


def test_a_bad_setting_is_one_sentence_and_exit_code_2(
    tiny: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = arguments(data, tiny, tmp_path / "o")
    fails(capsys, 2, "method is 'both'", *command, "--method", "both")
    fails(capsys, 2, "device is 'cuda:77'", *command, "--device", "cuda:77")
    fails(capsys, 2, "batch_size is 0", *command, "--batch-size", "0")
    fails(
        capsys, 2, "kernels is 'fast'; expected one of auto, torch", *command, "--kernels", "fast"
    )
    monkeypatch.setattr("twostage.kernels._INTERPRETED", False)  # as it is outside of tests
    on_cpu = (*command, "--device", "cpu", "--kernels", "triton")
    fails(capsys, 2, "the Triton kernels need a CUDA GPU, and the device is cpu", *on_cpu)
    fails(capsys, 2, "graphs need kernels 'triton'; they are 'auto'", *command, "--graphs")
    fails(capsys, 2, "exclude each other", *command, "--cache-trunk", "--share-trunk")
    fails(capsys, 2, "engine is 'slow'; expected one of fast, plain", *command, "--engine", "slow")
    plain = (*command, "--engine", "plain")
    fails(capsys, 2, "engine 'plain' has no share_trunk: leave it out", *plain, "--share-trunk")
    fails(capsys, 2, "threads is 0", *command, "--threads", "0")
    blocked = tmp_path / "file"
    blocked.touch()
    fails(capsys, 2, "cannot write", *arguments(data, tiny, blocked))
    with pytest.raises(SystemExit) as caught:
        main([*command, "--seeds", "7;8"])
    assert caught.value.code == 2
    assert "invalid list of ints value: '7;8'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "encoding", "code", "message"),
    [
        (b"text,label\na,1\nb\0c,0\n", "utf-8", 3, "train.csv, line 3: holds a NUL byte"),
        (b"text,label\r\na,1\r\ncaf\xe9,0\r\n", "utf-8", 3, "train.csv, line 3: not valid UTF-8"),
        ("text,label\na,1\n".encode("utf-16"), "utf-8", 3, "train.csv, line 1: not valid UTF-8"),
        ("text,label\na,1\n".encode("utf-16-le"), "utf-8", 3, "train.csv, line 1: holds a NUL"),
        (b"text,label\na,1\n\x81,0\n", "cp1252", 3, "train.csv, line 3: not valid CP1252"),
        (b"text,label\na,1\n", "klingon", 2, "encoding is 'klingon'; expected a name"),
        (b"text,label\na,1\n", "base64", 2, "encoding is 'base64'; expected a name"),
    ],
)
def test_a_table_in_another_encoding_is_named_with_its_line(
    tiny: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes,
    encoding: str,
    code: int,
    message: str,
) -> None:
    (data / "train.csv").write_bytes(content)
    command = arguments(data, tiny, tmp_path / "o", "--encoding", encoding)
    assert main(command) == code
    error = capsys.readouterr().err
    assert message in error
    assert ("--encoding" in error) == (code == 3)
    assert error.count("\n") == 1


def test_tables_are_read_in_the_encoding_that_is_named(
    tiny: Path, data: Path, tmp_path: Path
) -> None:
    rows = "text,label\ncafé,oui\nthé,non\n"
    for encoding in ("utf-16", "cp1252", "utf-8-sig", "utf-8"):
        for name in ("train.csv", "test.csv"):
            (data / name).write_bytes(rows.encode(encoding))
        output = tmp_path / encoding
        command = arguments(data, tiny, output, "--seeds", "1", "-e", "0")
        assert main([*command, "--encoding", encoding]) == 0
        report = json.loads((output / "metrics.json").read_text())
        assert [c["name"] for c in report["classes"]] == ["non", "oui"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as Linux does")
@pytest.mark.parametrize(("limit", "file"), [(100, "log.csv"), (5_000, "seed-1")])
def test_a_full_disk_is_one_sentence(
    tiny: Path, data: Path, tmp_path: Path, limit: int, file: str
) -> None:
    output = tmp_path / "o"
    code = (
        "import resource, signal, sys, twostage.cli\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(twostage.cli.main(sys.argv[1:]))"
    )
    command = arguments(data, tiny, output, "--seeds", "1", "--save-models")
    process = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.startswith(f"twostage: error: cannot write '{output / file}")
    assert process.stderr.count("\n") == 1
    assert "File too large" in process.stderr
    assert not list(output.glob("*.partial"))


@pytest.mark.parametrize("method", ["mkdir", "open", "replace"])
def test_a_read_only_output_is_one_sentence(
    tiny: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    method: str,
) -> None:
    output = tmp_path / "o"
    if method != "mkdir":
        output.mkdir()
        (output / "results.csv").touch()
    original = getattr(Path, method)

    def refuse(self: Path, *rest: object, **kw: object) -> object:
        if self.is_relative_to(output):
            raise OSError(30, "Read-only file system")
        return original(self, *rest, **kw)

    monkeypatch.setattr(Path, method, refuse)
    fails(capsys, 2, "Read-only file system", *arguments(data, tiny, output, "--seeds", "1"))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_training_by_the_kernels_scores_as_training_without(
    tiny: Path, data: Path, tmp_path: Path, precision: str
) -> None:
    """On texts of two words, of which every epoch sees all, without dropout."""
    config = json.loads((tiny / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tiny / "config.json").write_text(json.dumps(config))
    reports = []
    for kernels in ("torch", "triton"):
        output = tmp_path / kernels
        settings = ("--seeds", "3", "--precision", precision, "--kernels", kernels)
        assert main(arguments(data, tiny, output, *settings)) == 0
        reports.append(json.loads((output / "metrics.json").read_text()))
        log = pd.read_csv(output / "log.csv")
        assert set(log["stage"]) == {1, 2}
        reports[-1]["losses"] = log["loss"].tolist()
    assert reports[1]["settings"]["kernels"] == "triton"
    assert reports[1]["machine"]["arithmetic"].endswith("by Triton kernels")
    assert reports[1]["losses"] == pytest.approx(reports[0]["losses"], rel=2e-3)


def test_a_run_that_diverges_stops_with_exit_code_7(
    tiny: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(data, tiny, tmp_path / "o", "--ldam-s", "1e38", "--precision", "fp32")
    fails(capsys, 7, "stage 1, step 1: the loss or the gradient is not finite", *command)
    # the very last step may leave weights that only the evaluation finds to be broken
    command = arguments(data, tiny, tmp_path / "o", "-e", "0", "--lr-stage-2", "1e38")
    fails(capsys, 7, "not finite", *command, "--batch-size", "16", "--precision", "fp32")
    assert not (tmp_path / "o" / "results.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "at_start"),
    [
        (signal.SIGINT, 130, signal.SIG_DFL),
        (signal.SIGINT, 130, signal.SIG_IGN),
        (signal.SIGTERM, 143, signal.SIG_IGN),
    ],
)
def test_a_stopped_run_keeps_the_seeds_that_were_finished(
    tiny: Path, data: Path, tmp_path: Path, number: int, code: int, at_start: signal.Handlers
) -> None:
    """A shell without job control starts what stands before an `&` with SIGINT ignored."""
    output = tmp_path / "o"
    seeds = ",".join(map(str, range(1_000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "twostage", *arguments(data, tiny, output, "--seeds", seeds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, at_start),
    )
    deadline = time.monotonic() + 120
    results = output / "results.csv"
    while time.monotonic() < deadline:
        if results.exists() and len(results.read_text().splitlines()) > 2:
            break  # one seed is finished for certain, while the second is being counted
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in error
    assert "of 1000 seeds were finished; they are in" in error
    assert len(pd.read_csv(results)) >= 2


def test_a_command_stopped_outside_training_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(folder: Path, **kw: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("twostage.assets.data_sets.fetch_demo", fetch)
    assert main(["fetch", "demo", "--to", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\ntwostage: stopped\n"


def test_a_closed_pipe_ends_a_command_without_traceback() -> None:
    code = "import twostage.cli; raise SystemExit(twostage.cli.main(['train', '--help']))"
    process = subprocess.run(
        f'{sys.executable} -u -c "{code}" | true',
        shell=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in process.stderr


def test_help_needs_no_more_than_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["demo"], ["fetch"], ["downsample"], ["train"], ["evaluate"]):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        text = capsys.readouterr().out
        assert text.isascii()
        assert "None" not in text


def test_downsample_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(f"text {i}", i % 2) for i in range(40)]
    for name in ("train.tsv", "dev.tsv"):
        write_table(tmp_path / "in" / name, ("sentence", "label"), rows)
    command = ["downsample", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    assert main([*command, "--rates", "0.1,0.5"]) == 0
    assert "20 positive, 2 negative" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0.1", "0.5"}
    assert main(command) == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {f"0.{i}" for i in range(1, 8)}
    (tmp_path / "file").touch()
    fails(capsys, 2, "cannot write", *command[:-1], str(tmp_path / "file"))
    command[2] = str(tmp_path / "absent")
    fails(capsys, 3, "there is no file", *command)


def test_help_of_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("demo", "fetch", "downsample", "train", "evaluate"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert f"example: twostage {command}" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, contextlib, io, twostage.cli\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    twostage.cli.main(['--help'])\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
