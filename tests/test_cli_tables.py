"""Tables as the commands meet them: flags, folders, many classes, foreign text on the screen."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from twostage.cli import main
from twostage.data.tables import TableOptions, write_table
from twostage.errors import UsageError
from twostage.experiment import read_data
from twostage.files import write_json
from twostage.printing import format_table, visible
from twostage.progress import progress_bar
from twostage.recipe import Recipe
from twostage.report import format_evaluation
from twostage.training.metrics import compute_metrics

ROWS = [("good film", 1), ("great fun", 1), ("fine", 1), ("bad film", 0)]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """(exit code, standard output, standard error) of a command."""

    def run_command(*words: object) -> tuple[int, str, str]:
        code = main(list(map(str, words)))
        return code, *capsys.readouterr()

    return run_command


@pytest.fixture
def train(run: Run, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    capsys.readouterr()  # of what made the model

    def run_train(data: Path, *more: object) -> tuple[int, str, str]:
        fixed = ("--model", tiny, "--seeds", 7, "-e", 0, "--max-length", 8)
        return run("train", "-d", data, "-o", tmp_path / "out", *fixed, *more)

    return run_train


def folder_with(path: Path, contents: dict[str, str]) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in contents.items():
        (path / name).write_text(content, encoding="utf-8")
    return path


def delimited(names: str, delimiter: str, repeat: int = 4) -> str:
    rows = [f"{text}{delimiter}{label}" for text, label in ROWS] * repeat
    return "\n".join([names, *rows]) + "\n"


JSONL = "\n".join(json.dumps({"text": text, "label": label}) for text, label in ROWS * 4)


GLUE = delimited("sentence\tlabel", "\t")


@pytest.mark.parametrize(
    "contents",
    [
        {"train.tsv": GLUE, "dev.tsv": GLUE},
        {"train.jsonl": JSONL, "dev.jsonl": JSONL},
        {"train.csv": delimited("text,label", ","), "test.jsonl": JSONL},
    ],
    ids=lambda contents: " ".join(contents),
)
def test_a_data_folder_may_hold_tsv_and_jsonl(
    train: Run, tmp_path: Path, contents: dict[str, str]
) -> None:
    code, out, err = train(folder_with(tmp_path / "d", contents))
    assert (code, err) == (0, "")
    assert "16 training rows ('0': 4, '1': 12), 16 test rows" in out


@pytest.mark.parametrize("name", ["train.tsv", "dev.csv", "test.jsonl"])
def test_two_tables_that_could_be_meant_are_an_error(train: Run, tmp_path: Path, name: str) -> None:
    data = folder_with(tmp_path / "d", {"train.csv": delimited("text,label", ",")})
    shutil.copy(data / "train.csv", data / "test.csv")
    (data / name).touch()
    code, _, err = train(data)
    assert code == 3
    assert f"'{name}'" in err
    assert "each could be meant; leave one of them" in err


def test_an_absent_table_is_named_with_what_was_looked_for(train: Run, tmp_path: Path) -> None:
    data = folder_with(tmp_path / "d", {"train.csv": delimited("text,label", ",")})
    code, _, err = train(data)
    assert code == 3
    assert f"there is no file '{data / 'test.csv'}', nor any of test.tsv, test.jsonl, dev." in err


def test_the_flags_of_tables_reach_every_command(run: Run, train: Run, tmp_path: Path) -> None:
    content = delimited("Review|Stars", "|").encode("utf-16")
    data = folder_with(tmp_path / "d", {})
    for name in ("train.csv", "test.csv"):
        (data / name).write_bytes(content)
    flags = ["--delimiter", "|", "--quoting", "none", "--encoding", "utf-16"]
    flags += ["--text-column", "review", "--label-column", "Stars"]
    code, out, err = train(data, *flags, "--save-models")
    assert (code, err) == (0, "")
    assert "16 training rows ('0': 4, '1': 12)" in out
    model = tmp_path / "out" / "seed-7"
    code, out, err = run("evaluate", "--model", model, "-d", data / "test.csv", *flags)
    assert (code, err) == (0, "")
    code, out, err = run("augment", "-d", data, "--offline", *flags)
    assert (code, err) == (0, "")
    assert "24 rows" in out
    for name in ("train", "dev"):
        shutil.copy(data / "test.csv", data / f"{name}.tsv")
    (data / "train.csv").unlink()
    code, out, err = run(
        "downsample", "--inpu-path", data, "-o", tmp_path / "x", "--rates", "0.3", *flags
    )
    assert (code, err) == (0, "")
    assert "12 positive, 3 negative" in out


def test_what_augment_writes_is_read_as_it_is_written(run: Run, train: Run, tmp_path: Path) -> None:
    data = folder_with(tmp_path / "d", {})
    content = '"schön, so" film|1\nfine|1\nbad|0\nnothing|0\n' * 3
    for name in ("train.csv", "test.csv"):
        (data / name).write_bytes(f"Review|Stars\n{content}".encode("cp1252"))
    flags = ["--delimiter", "|", "--quoting", "none", "--encoding", "cp1252"]
    flags += ["--text-column", "review", "--label-column", "Stars"]
    assert run("augment", "-d", data, "--offline", *flags)[0] == 0
    recipe = Recipe(method="augment")
    options: TableOptions = {
        "delimiter": "|",
        "quoting": "none",
        "encoding": "cp1252",
        "text_column": "review",
        "label_column": "Stars",
    }
    augmented = read_data(data, recipe, **options).augmented
    oracle = pd.read_csv(data / "aug.csv")
    assert augmented is not None
    assert list(augmented.texts) == list(oracle["text"])
    assert any('"schön, so"' in text for text in augmented.texts)
    code, _, err = train(data, "--method", "augment", "-e", 1, *flags)
    assert (code, err) == (0, "")
    # The authors', saved by an editor in the encoding of the others.
    (data / "aug.csv").write_bytes("org_ind,text,label\n0,schön,1\n1,so,0\n".encode("cp1252"))
    augmented = read_data(data, recipe, **options).augmented
    assert augmented is not None
    assert list(augmented.texts) == ["schön", "so"]
    # Another table of that name is read as the others are.
    (data / "aug.csv").write_bytes(f"Review|Stars\n{content}".encode("cp1252"))
    assert len(read_data(data, recipe, **options).augmented or ()) == 12


def test_an_unknown_quoting_is_a_usage_error(train: Run, tmp_path: Path) -> None:
    data = folder_with(tmp_path / "d", {"train.csv": "text,label\na,1\n", "test.csv": ""})
    assert train(data, "--quoting", "loud")[0] == 2
    assert train(data, "--delimiter", "and")[0] == 2


def test_lines_that_quotes_may_join_are_refused_before_anything_is_written(
    train: Run, tmp_path: Path
) -> None:
    data = folder_with(tmp_path / "d", {"test.tsv": delimited("text\tlabel", "\t")})
    (data / "train.tsv").write_text('text\tlabel\nfine\t0\n"great\t1\nfun"\t0\n')
    code, _, err = train(data)
    assert code == 3
    assert "train.tsv, line 3: two ways of reading differ from here on; give --quoting" in err
    assert not (tmp_path / "out").exists()


def test_near_twins_are_one_note_before_training(train: Run, tmp_path: Path) -> None:
    rows = "text,label\n" + "good,Spam\n" * 30 + "bad,ham\n" * 9 + "fine,spam\n" * 2
    data = folder_with(tmp_path / "d", {"train.csv": rows, "test.csv": "text,label\ngood,Spam\n"})
    code, _, err = train(data)
    assert code == 0
    assert err.count("\n") == 1
    assert "train.csv: classes 'Spam' (30 rows) and 'spam' (2 rows) differ only in case" in err


def test_near_twins_are_told_before_anything_is_paid_for(run: Run, tmp_path: Path) -> None:
    rows = "text,label\n" + "good,Spam\n" * 5 + "bad,ham\n" * 2 + "fine,spam\n"
    data = folder_with(tmp_path / "d", {"train.csv": rows})
    code, _, err = run("augment", "-d", data, "--dry-run", "--model", "gpt-4o-mini")
    assert code == 0
    assert "differ only in case" in err


@pytest.mark.parametrize("seeds", ["7,7", "7,42,7"])
def test_a_seed_given_twice_is_a_usage_error(train: Run, tmp_path: Path, seeds: str) -> None:
    code, _, err = train(tmp_path, "--seeds", seeds)
    assert code == 2
    assert "a seed given twice is the same run twice" in err
    with pytest.raises(UsageError):
        Recipe(seeds=(1, 1))


# Many classes


@pytest.mark.slow
def test_a_thousand_classes_take_little_room(run: Run, train: Run, tmp_path: Path) -> None:
    data = tmp_path / "d"
    rows = [(f"good {'film ' * (i % 5)}", f"category {i % 1_000:03}") for i in range(2_000)]
    for name in ("train.csv", "test.csv"):
        write_table(data / name, ("text", "label"), rows)
    code, _, err = train(data, "--seeds", "1,2,3,4,5", "--save-models", "--batch-size", 64)
    assert (code, err) == (0, "")
    out = tmp_path / "out"
    assert (out / "metrics.json").stat().st_size < 1_000_000
    report = json.loads((out / "metrics.json").read_text())
    assert len(report["seeds"][4]["per_class"]) == 1_000
    assert "confusion" not in report["seeds"][0]
    confusion = pd.read_csv(out / "confusion.csv")
    assert list(confusion.columns) == ["Seed", "true", "predicted", "texts"]
    of_one = confusion[confusion["Seed"] == 3]
    assert of_one["texts"].sum() == 2_000
    hits = of_one[of_one["true"] == of_one["predicted"]]["texts"].sum()
    assert hits / 2_000 == report["seeds"][2]["micro_f1"]

    model = out / "seed-1"
    code, printed, err = run("evaluate", "--model", model, "-d", data / "test.csv")
    assert (code, err) == (0, "")
    assert sum(line.startswith("'category") for line in printed.splitlines()) == 20
    assert f"all 1,000 classes: {model / 'scores-test.csv'}" in printed
    scores = pd.read_csv(model / "scores-test.csv")
    assert list(scores["class"]) == [f"category {c:03}" for c in range(1_000)]
    assert scores["support"].sum() == 2_000


def test_the_worst_classes_that_occur_are_printed() -> None:
    num_classes = 30
    labels_N = np.arange(num_classes - 5).repeat(4)
    logits_NC = np.eye(num_classes)[labels_N]
    logits_NC[labels_N == 7] = np.eye(num_classes)[3]
    metrics = compute_metrics(labels_N, logits_NC)
    names = [f"class {c}" for c in range(num_classes)]
    text = format_evaluation(metrics, names, [1] * num_classes)
    assert "The 20 classes with the lowest F1, of 30 (25 of which occur in these texts):" in text
    lines = [line for line in text.splitlines() if line.startswith("'class")]
    assert len(lines) == 20
    assert [line.split("  ")[0] for line in lines[:2]] == ["'class 7'", "'class 3'"]
    assert not any("'class 29'" in line for line in lines)


def test_scores_go_to_the_file_that_is_named(run: Run, train: Run, tmp_path: Path) -> None:
    data = folder_with(tmp_path / "d", {"train.csv": delimited("text,label", ",")})
    shutil.copy(data / "train.csv", data / "test.csv")
    assert train(data, "--save-models")[0] == 0
    command = ("evaluate", "--model", tmp_path / "out" / "seed-7", "-d", data / "test.csv")
    code, printed, _ = run(*command)
    assert code == 0
    assert "classes:" not in printed
    code, printed, _ = run(*command, "-o", tmp_path / "scores.csv")
    assert code == 0
    assert f"all 2 classes: {tmp_path / 'scores.csv'}" in printed
    assert list(pd.read_csv(tmp_path / "scores.csv")["class"]) == [0, 1]


# Classes that the test data lack


def test_no_headline_is_about_a_class_that_the_test_data_lack(
    run: Run, train: Run, tmp_path: Path
) -> None:
    rows = [("good film", "a"), ("great fun", "a"), ("bad film", "b"), ("fine", "b"), ("dull", "c")]
    data = folder_with(tmp_path / "d", {})
    write_table(data / "train.csv", ("text", "label"), rows)
    write_table(data / "test.csv", ("text", "label"), [(f"{text} too", c) for text, c in rows[:4]])
    code, printed, err = train(data, "--save-models")
    assert (code, err) == (0, "")
    (seed,) = [line for line in printed.splitlines() if line.startswith("seed 7: ")]
    assert seed.startswith("seed 7: macro-F1 0.")
    assert "tail F1" not in printed
    assert "tail AP" not in printed
    assert (
        "class 'c' has 1 of 5 training rows, and no row here, so nothing is known of it.\n"
        "macro-F1 and balanced accuracy are means over the 2 of 3 classes that occur in the scored "
        "texts."
    ) in printed
    table = printed[printed.index("macro-F1  ") :].splitlines()
    header, row = (line.split() for line in table[:2])
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    (scored,) = report["seeds"]
    for scores in (scored, report["mean"]):
        assert scores["tail_f1"] is None
        assert scores["tail_average_precision"] is None
    f1 = {of_class["class"]: of_class["f1"] for of_class in scored["per_class"]}
    assert scored["macro_f1"] == pytest.approx((f1["a"] + f1["b"]) / 2)
    assert (header[-2:], row[-1]) == (["F1", "'b'"], f"{f1['b']:.3f}")

    model = tmp_path / "out" / "seed-7"
    code, printed, err = run("evaluate", "--model", model, "-d", data / "test.csv")
    assert (code, err) == (0, "")
    lines = printed.splitlines()
    (tail,) = [line for line in lines if line.startswith("'c' (tail)")]
    assert tail.split()[2:] == ["-", "-", "-", "-", "0"]
    assert "tail F1" not in printed
    assert "means over the 2 of 3 classes" in printed


def test_an_absent_class_that_is_not_the_tail_has_no_score(
    run: Run, train: Run, tmp_path: Path
) -> None:
    data = folder_with(tmp_path / "d", {})
    rows = [("good film", "a"), ("bad film", "b"), ("fine", "b"), ("dull", "c"), ("long", "c")]
    write_table(data / "train.csv", ("text", "label"), rows)
    write_table(data / "test.csv", ("text", "label"), [("a good film", "a"), ("bad", "b")])
    code, printed, _ = train(data, "--seeds", "7,42")
    assert code == 0
    (mean,) = [line.split() for line in printed.splitlines() if line.startswith("mean")]
    assert mean[-1] == "-"
    assert "tail F1 ('a')" in printed
    assert "means over the 2 of 3 classes" in printed


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", "text,label\nx,a\ny,b\nz,a|b\n"),
        ("train.csv", "text,label\nx,\"['a', 'b']\"\ny,['b']\n"),
        ("train.jsonl", '{"text": "x", "label": "a"}\n{"text": "y", "label": ["a", "b"]}\n'),
    ],
)
def test_multi_label_data_are_declined_in_a_sentence(
    run: Run, train: Run, tmp_path: Path, name: str, content: str
) -> None:
    data = folder_with(tmp_path / "d", {name: content, "test.csv": "text,label\nx,a\n"})
    for command in (train(data), run("augment", "-d", data, "--offline")):
        code, _, err = command
        assert code == 3
        assert err.count("\n") == 1
        assert "multi-label data are not supported" in err


def test_notes_on_the_data_wait_for_the_model(
    run: Run, train: Run, tiny: Path, tmp_path: Path
) -> None:
    semicolons = delimited("text;label", ";")
    data = folder_with(tmp_path / "d", {"train.csv": semicolons, "test.csv": semicolons})
    code, _, err = train(data)
    assert code == 0
    assert err.count("is read with semicolons") == 2
    (tiny / "config.json").unlink()
    code, out, err = train(data)
    assert (code, out) == (3, "")
    assert err.startswith("twostage: error: ")
    assert err.count("\n") == 1
    (data / "test.csv").write_text("text;label\nx;unknown\n")
    code, out, err = train(data)
    assert code == 3
    assert "is read with semicolons" in err, "notes are not lost when the data are at fault"


# Foreign text


HOSTILE = "a\x1b[31mred\x1b[0m\u202eb\nc"


def test_what_a_terminal_would_obey_is_shown_escaped() -> None:
    assert visible("plain é 好 🙂") == "plain é 好 🙂"
    assert visible(HOSTILE) == r"a\x1b[31mred\x1b[0m\u202eb\nc"
    table = format_table(["", "F1"], [[HOSTILE, 0.5]])
    assert table.count("\n") == 1
    assert table.replace("\n", "").isprintable()


def test_a_hostile_label_reaches_no_screen(run: Run, train: Run, tmp_path: Path) -> None:
    data = tmp_path / "d"
    rows = [("good film", HOSTILE), ("bad film", "x")] * 4
    for name in ("train.csv", "test.csv"):
        write_table(data / name, ("text", "label"), rows)
    code, out, err = train(data, "--save-models")
    assert (code, err) == (0, "")
    assert visible(HOSTILE) in out
    code, more, err = run(
        "evaluate", "--model", tmp_path / "out" / "seed-7", "-d", data / "test.csv"
    )
    assert (code, err) == (0, "")
    code, offline, err = run("augment", "-d", data, "--offline")
    assert (code, err) == (0, "")
    command = ("downsample", "-i", data, "-o", tmp_path / "x\x1b[31m", "--rates", "0.5")
    lines = "".join(f"a\t{i % 2}\n" for i in range(8))
    for name in ("train.csv", "test.csv"):
        (data / name).unlink()
    for name in ("train.tsv", "dev.tsv"):
        (data / name).write_text("sentence\tlabel\n" + lines)
    code, downsampled, err = run(*command)
    assert (code, err) == (0, "")
    for text in (out, more, offline, downsampled):
        assert text.replace("\n", "").isprintable()
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["classes"][0]["name"] == HOSTILE, "files keep what the data say"
    data = tmp_path / "e"
    write_table(data / "train.csv", ("text", "label"), [("a", "x"), ("b", "y")])
    write_table(data / "test.csv", ("text", "label"), [("a", HOSTILE)])
    code, out, err = train(data)
    assert code == 3
    assert err.count("\n") == 1
    assert err.strip().isprintable()


def test_a_progress_bar_shows_no_escape_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    class Bar:
        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr("tqdm.tqdm", lambda **given: seen.update(given) or Bar())
    with progress_bar(f"tokenizing {HOSTILE}", 1, "text", show=True):
        pass
    assert seen["desc"] == f"tokenizing {visible(HOSTILE)}"


def test_json_files_have_a_line_for_each_row(tmp_path: Path) -> None:
    value = {"a": {"b": [[1, 2], [3, 4]], "c": []}, "d": [{"e": 1.5, "f": None}], "g": "é\n"}
    write_json(tmp_path / "x.json", value)
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == value
    assert "      [1, 2],\n      [3, 4]\n" in text
    assert '    {"e": 1.5, "f": null}\n' in text
