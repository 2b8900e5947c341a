"""The demo's data: what becomes of the critics' snippets, and what is said when it can't be had."""

import bz2
import subprocess
from pathlib import Path

import pytest

from twostage import assets
from twostage.assets import fetch_demo, in_dev_split, read_snippets
from twostage.data.tables import read_table
from twostage.errors import DownloadError, UsageError


def test_snippets_lose_repetitions_blanks_and_plots() -> None:
    raw = (
        "category,text,movie_name\n"
        'fresh,"So  good,\nreally",a\nrotten,Bad.,a\nplot,A story.,a\n'
        'fresh,  ,b\nrotten,"So good, really",b\nfresh,Bad.,c\n'
    )
    assert read_snippets(bz2.compress(raw.encode())) == [("So good, really", 1), ("Bad.", 0)]


def test_the_demo_data_is_split_by_text_without_overlap(demo_folder: Path) -> None:
    train, dev = read_table(demo_folder / "train.tsv"), read_table(demo_folder / "dev.tsv")
    assert (len(train), len(dev)) == (11_497, 1_255)
    assert all(in_dev_split(text) for text in dev.texts)
    assert not any(in_dev_split(text) for text in train.texts)
    assert len(set(train.texts) | set(dev.texts)) == 11_497 + 1_255
    assert [list(train.labels).count(label) for label in ("0", "1")] == [4_860, 6_637]
    assert [list(dev.labels).count(label) for label in ("0", "1")] == [524, 731]


def test_a_second_fetch_does_nothing(demo_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetch_demo(demo_folder) is False


@pytest.mark.parametrize(
    ("stderr", "said"),
    [
        ("WARNING: retrying\nERROR: No matching distribution found for x\n", "No matching"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES\n", "DO NOT MATCH THE HASHES"),
        ("/usr/bin/python3: No module named pip\n", "No module named pip"),
        ("", "no message"),
    ],
)
def test_a_failed_download_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str, said: str
) -> None:
    def fail(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(assets.subprocess, "run", fail)
    with pytest.raises(DownloadError, match=said) as caught:
        fetch_demo(tmp_path / "demo")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 4
    assert list((tmp_path / "demo").iterdir()) == []


def test_other_peoples_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nmine\t1\n")
    with pytest.raises(UsageError, match=r"train\.tsv' is not the demo's; choose another folder"):
        fetch_demo(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"cannot write '.*file"):
        fetch_demo(tmp_path / "file")
