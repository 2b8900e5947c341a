"""Answers on disk."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twostage.augmentation import journal as journals
from twostage.augmentation.journal import Answer, Journal
from twostage.errors import TwoStageWarning, UsageError

GOOD = Answer("a fine film", "stop", 31, 4)
ODD = Answer('two\nlines, "quotes" and ünïcode \u2028', "length", 0, 0, 17, True, True)


def open_journal(path: Path) -> Journal:
    return Journal(path / "deep" / "paraphrases.jsonl")


def test_answers_come_back_as_they_were(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.add([("a", GOOD), ("b", ODD)])
    assert (journal.get("a"), journal.get("b"), journal.get("c")) == (GOOD, ODD, None)
    journal.close()
    journal = open_journal(tmp_path)
    assert (journal.get("a"), journal.get("b"), journal.get("c")) == (GOOD, ODD, None)
    assert len(journal) == 2
    assert "a" in journal
    assert "c" not in journal
    journal.close()


def test_a_line_is_json_that_others_can_read(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.add([("a", GOOD)])
    journal.close()
    assert json.loads(journal.path.read_text()) == {
        "key": "a",
        "content": "a fine film",
        "finish_reason": "stop",
        "tokens": [31, 4],
    }


def test_a_journal_cut_off_anywhere_keeps_all_whole_lines(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    journal.add([(str(i), GOOD) for i in range(5)])
    journal.close()
    content = journal.path.read_bytes()
    for end in range(len(content) + 1):
        journal.path.write_bytes(content[:end])
        whole = content[:end].count(b"\n")
        journal = open_journal(tmp_path)
        assert len(journal) == whole
        journal.add([("new", ODD)])
        journal.close()
        journal = open_journal(tmp_path)
        assert len(journal) == whole + 1
        assert journal.get("new") == ODD
        journal.close()


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"key": "x"}', b"\xff\xfe", b'{"key": 1, "content": 2}', b""]
)
def test_a_spoilt_line_costs_itself_alone(tmp_path: Path, line: bytes) -> None:
    journal = open_journal(tmp_path)
    journal.add([("a", GOOD), ("b", GOOD)])
    journal.close()
    first, second = journal.path.read_bytes().splitlines()
    journal.path.write_bytes(b"\n".join([first, line, second, b""]))
    with pytest.warns(TwoStageWarning, match=r"paraphrases.jsonl, line 2"):
        journal = open_journal(tmp_path)
    assert journal.get("a") == journal.get("b") == GOOD
    journal.close()


def test_appends_are_on_disk_when_they_return_and_share_an_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real = os.fsync

    def fsync(file: int) -> None:
        real(file)
        synced.append(journal.path.read_bytes().count(b"\n"))

    journal = open_journal(tmp_path)
    monkeypatch.setattr(os, "fsync", fsync)

    async def append(i: int) -> None:
        await journal.append(str(i), GOOD)
        assert synced[-1] > 0
        assert str(i) in journal

    async def append_all() -> None:
        await asyncio.gather(*(append(i) for i in range(500)))

    asyncio.run(append_all())
    assert synced[-1] == 500
    assert len(synced) < 10
    journal.close()


def test_an_append_whose_caller_was_cancelled_is_kept(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)

    async def append() -> None:
        task = asyncio.create_task(journal.append("a", GOOD))
        await asyncio.sleep(0)
        task.cancel()
        await journal.flush()

    asyncio.run(append())
    assert journal.get("a") == GOOD
    journal.close()


def test_a_disk_that_is_full_leaves_whole_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(tmp_path)
    journal.add([("a", GOOD)])
    real = os.write

    def write(file: int, data: memoryview) -> int:
        if len(data) < 30:
            raise OSError(28, "No space left on device")
        return real(file, data[:20])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(UsageError, match="No space left"):
        journal.add([("b", GOOD)])
    with pytest.raises(UsageError, match="No space left"):
        asyncio.run(journal.append("c", GOOD))
    monkeypatch.undo()
    journal.add([("d", ODD)])
    journal.close()
    journal = open_journal(tmp_path)
    assert (len(journal), journal.get("a"), journal.get("d")) == (2, GOOD, ODD)
    journal.close()


def test_two_processes_do_not_write_to_one_journal(tmp_path: Path) -> None:
    journal = open_journal(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from twostage.augmentation.journal import Journal\n"
        "Journal(Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", code, str(journal.path)]
    other = subprocess.run(command, capture_output=True, text=True)
    assert "is in use" in other.stderr
    journal.close()
    assert subprocess.run(command).returncode == 0


def test_reading_another_folders_journal_changes_nothing_there(tmp_path: Path) -> None:
    missing = Journal(tmp_path / "none" / journals.NAME, read_only=True)
    assert missing.get("a") is None
    assert not (tmp_path / "none").exists()
    journal = open_journal(tmp_path)
    journal.add([("a", GOOD)])
    with journal.path.open("ab") as file:
        file.write(b'{"key": "torn')
    reader = Journal(journal.path, read_only=True)  # while the other one has the lock
    assert (len(reader), reader.get("a")) == (1, GOOD)
    assert journal.path.read_bytes().endswith(b"torn")
    reader.close()
    journal.close()
