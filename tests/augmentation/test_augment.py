"""`twostage augment` from the command line to its files, against a server with real sockets."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from twostage.augmentation.balancing import count_draws
from twostage.augmentation.journal import Journal
from twostage.augmentation.paraphrase import PROMPT, ParaphraseSettings
from twostage.cli import main
from twostage.data.tables import read_table, write_table
from twostage.errors import UsageError

from .conftest import ApiServer, Reply, completion, default_reply, error, phrase
from .test_batch_api import BatchApi, Plan, Routes, answer, expiry, result

KEY = "sk-test-0123456789abcdef0123456789"
NEGATIVE, POSITIVE = 6, 20
CALLS = sum(count_draws([NEGATIVE, POSITIVE]))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "0.3")


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def make_folder(folder: Path, negative: int = NEGATIVE, positive: int = POSITIVE) -> Path:
    rows = [(f"snippet {i} of a film", i % 4 != 0) for i in range(4 * max(negative, positive))]
    kept: Counter[bool] = Counter()
    chosen = []
    for text, label in rows:
        kept[label] += 1
        if kept[label] <= (positive if label else negative):
            chosen.append((text, int(label)))
    write_table(folder / "train.csv", ("text", "label"), chosen)
    return folder


def augment(folder: Path, server: ApiServer, *arguments: str) -> int:
    return main(["augment", "-d", str(folder), "--base-url", server.url, *arguments])


def start(
    folder: Path, server: ApiServer, *arguments: str, preexec_fn: Callable[[], object] | None = None
) -> subprocess.Popen[str]:
    """The same in a process of its own, away from the sources."""
    command = [sys.executable, "-m", "twostage", "augment", "-d", str(folder)]
    return subprocess.Popen(
        [*command, "--base-url", server.url, *arguments],
        cwd=folder,
        env=os.environ | {"OPENAI_API_KEY": KEY},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec_fn,
    )


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "augment_report.json").read_text())
    return report


def source_of(body: Any) -> str:
    text: str = body["messages"][0]["content"]
    instruction, rule, source = text.split("\n\n", 2)
    assert (instruction, rule) == (PROMPT, "---")
    return source


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.002)


def wait_for_calls(server: ApiServer, count: int) -> None:
    wait_until(lambda: len(server.calls) >= count)


def expected_table(folder: Path) -> str:
    """aug.csv, by the literal walk and pandas, when the server answers with `phrase(key)`."""
    train = pd.read_csv(folder / "train.csv")
    settings = ParaphraseSettings()
    majority = int(train.label.value_counts().max())
    have = Counter({0: 0, 1: 0})
    pool = []
    pass_ = 0
    while min(have.values()) < 1.01 * majority:
        for row, (text, label) in enumerate(train.itertuples(index=False)):
            if have[label] <= 1.01 * majority:
                have[label] += 1
                pool.append((row, pass_, phrase(settings.key(text, pass_, 0)), label))
        pass_ += 1
    frame = pd.DataFrame(sorted(pool), columns=["org_ind", "pass", "text", "label"])
    parts = [part.sample(majority, random_state=42) for _, part in frame.groupby("label")]
    table = pd.concat(parts).sample(frac=1, random_state=42)
    csv: str = table[["org_ind", "text", "label"]].to_csv(index=False)
    return csv


def test_the_table_is_the_published_one_whoever_answers_first(
    folder: Path, server: ApiServer
) -> None:
    def reply(request_id: str, body: Any) -> Reply:
        answer = default_reply(request_id)
        answer.delay = int(request_id[:2], 16) / 256 * 0.03
        return answer

    server.reply = reply
    assert augment(folder, server, "--concurrency", "8") == 0
    assert (folder / "aug.csv").read_text() == expected_table(folder)
    assert len(server.calls) == CALLS
    assert len(server.answered) == CALLS, "one call a key"
    assert 2 <= server.max_concurrent <= 8
    table = read_table(folder / "aug.csv")
    assert Counter(table.labels) == {"0": POSITIVE, "1": POSITIVE}
    assert not (folder / "aug.partial.csv").exists()


def test_a_call_is_the_published_one(folder: Path, server: ApiServer) -> None:
    augment(folder, server)
    for call in server.calls:
        source = source_of(call.body)
        assert call.body == {
            "model": "gpt-3.5-turbo",
            "messages": [{"role": "user", "content": f"{PROMPT}\n\n---\n\n{source}"}],
            "max_completion_tokens": 64 + len(source) // 2,
        }


def test_a_second_run_calls_nobody_and_writes_the_same(folder: Path, server: ApiServer) -> None:
    augment(folder, server)
    first = (folder / "aug.csv").read_bytes()
    (folder / "aug.csv").unlink()
    calls = len(server.calls)
    assert augment(folder, server) == 0
    assert len(server.calls) == calls
    assert (folder / "aug.csv").read_bytes() == first
    assert report_of(folder)["answers_paid_for"] == CALLS


def test_another_rate_of_the_same_texts_pays_only_for_what_is_new(
    folder: Path, server: ApiServer
) -> None:
    augment(folder, server)
    other = make_folder(folder.parent / "0.5", negative=10)
    assert augment(other, server) == 0
    assert max(server.answered.values()) == 1
    assert (other / "aug.csv").read_text() == expected_table(other)
    report = report_of(other)
    assert report["answers_taken_over"] > POSITIVE
    assert report["answers_paid_for"] + report["answers_taken_over"] == CALLS
    # Its own journal is complete: the first folder may go.
    calls = len(server.calls)
    for path in folder.iterdir():
        path.unlink()
    assert augment(other, server) == 0
    assert len(server.calls) == calls


@pytest.mark.parametrize(
    "change",
    [
        ["--model", "other"],
        ["--prompt", "Say it again."],
        ["--temperature", "0.5"],
        ["--max-completion-tokens", "50"],
    ],
)
def test_other_settings_are_other_requests(
    folder: Path, server: ApiServer, change: list[str]
) -> None:
    augment(folder, server)
    augment(folder, server, *change)
    assert len(server.answered) == 2 * CALLS


def test_a_prompt_may_say_where_the_text_stands(folder: Path, server: ApiServer) -> None:
    augment(folder, server, "--prompt", "Say '{text}' in other words, please.")
    assert server.calls[0].body["messages"][0]["content"].endswith("film' in other words, please.")


def test_answers_that_are_no_paraphrases_are_asked_again_then_dealt_with(
    folder: Path, server: ApiServer
) -> None:
    """By source: a copy, a duplicate, a refusal, a cut one, an empty one; the others are good."""
    texts = list(read_table(folder / "train.csv").texts)
    labels = list(read_table(folder / "train.csv").labels)
    positive = [text for text, label in zip(texts, labels, strict=True) if label == "1"]
    copy, twin, other_twin, refusing, cut, empty = positive[:6]

    def reply(request_id: str, body: Any) -> Reply:
        source = source_of(body)
        if source == copy:
            return completion(source.upper() + "!")
        if source in (twin, other_twin):
            return completion("Rephrased: the same words")
        if source == refusing:
            return completion("I'm sorry, but I can't assist with that.")
        if source == cut:
            return completion("half of a", finish_reason="length")
        if source == empty:
            return completion(None)
        return default_reply(request_id)

    server.reply = reply
    assert augment(folder, server) == 0
    asked = Counter(source_of(call.body) for call in server.calls)
    # The walk's 21 draws are all rows and the first, the copy, once more. Three are given up, so
    # that extra passes go on with the twins and those three. The twin that comes first is good;
    # what is a duplicate is kept once two more attempts were no better.
    assert [asked[text] for text in (copy, twin, other_twin)] == [3 + 3, 1 + 3, 3 + 3]
    table = read_table(folder / "aug.csv")
    assert Counter(table.labels) == {"0": POSITIVE, "1": POSITIVE}
    assert not {"half of a", ""} & set(table.texts)
    report = report_of(folder)
    assert report["complete"]
    fared = report["classes"][1]
    assert fared["asked"] == sum(asked[text] for text in positive)
    assert fared["copy"] == asked[copy]
    assert fared["duplicate"] == asked[twin] + asked[other_twin] - 1
    assert fared["refused"] == asked[refusing]
    assert fared["truncated"] == asked[cut]
    assert fared["empty"] == asked[empty]
    assert fared["given_up"] == (asked[refusing] + asked[cut] + asked[empty]) / 3
    assert fared["kept_copies"] == asked[copy] / 3
    assert fared["kept"] == 20


def test_a_class_that_stays_short_ends_the_job_as_partial(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_table(folder / "train.csv")
    tail = {text for text, label in zip(table.texts, table.labels, strict=True) if label == "0"}

    def reply(request_id: str, body: Any) -> Reply:
        if source_of(body) in tail and request_id[0] != "0":
            return completion(None, refusal="no")
        return default_reply(request_id)

    server.reply = reply
    assert augment(folder, server) == 6
    printed = capsys.readouterr()
    assert "class '0' has" in printed.err
    assert "NOT balanced" in printed.out
    report = report_of(folder)
    assert not report["complete"]
    assert "class '0' has" in report["ended_early_because"]
    assert not (folder / "aug.csv").exists()
    partial = read_table(folder / "aug.partial.csv")
    assert Counter(partial.labels) == {"0": report["classes"][0]["kept"], "1": POSITIVE}
    # The walk and three more passes, each draw asked three times.
    assert report["classes"][0]["asked"] <= 4 * 3 * 21


def test_an_earlier_table_is_kept_and_a_partial_one_goes_when_the_job_is_done(
    folder: Path, server: ApiServer
) -> None:
    (folder / "aug.csv").write_text("the authors' own\n")
    (folder / "aug.partial.csv").write_text("of an earlier run\n")
    augment(folder, server)
    ours = (folder / "aug.csv").read_text()
    assert not (folder / "aug.partial.csv").exists()
    augment(folder, server)
    assert not (folder / "aug.csv.previous-2").exists(), "it is the same"
    augment(folder, server, "--model", "b")
    assert (folder / "aug.csv.previous").read_text() == "the authors' own\n"
    assert (folder / "aug.csv.previous-2").read_text() == ours


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(401, f"Incorrect API key provided: {KEY}"), "the key is refused"),
        (error(403, "Not allowed"), "the key is refused"),
        (error(404, "The model does not exist", "model_not_found"), "--model"),
        (error(429, "You exceeded your current quota", "insufficient_quota"), "quota"),
        (error(400, "temperature is out of range", "invalid_value"), "train.csv, line"),
    ],
)
def test_what_cannot_heal_stops_the_job_and_keeps_what_was_paid_for(
    folder: Path,
    server: ApiServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reply: Reply,
    said: str,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.delay = 0.01
    server.script = [*[default_reply] * 12, *[reply] * 100]
    assert augment(folder, server, "--concurrency", "4") == 5
    printed = capsys.readouterr()
    assert said in printed.err
    assert KEY not in printed.err + printed.out
    assert len(server.calls) <= 12 + 2 * 4, "nobody starts anything new"
    assert report_of(folder)["answers_paid_for"] == 12
    server.script = []
    assert augment(folder, server, "--concurrency", "4") == 0
    assert set(server.answered.values()) == {1}
    assert (folder / "aug.csv").read_text() == expected_table(folder)
    for path in folder.iterdir():
        assert KEY not in path.read_text()


def test_a_server_that_is_not_there_is_a_network_error(
    folder: Path,
    server: ApiServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twostage.augmentation.openai_client.REACH_SECONDS", 0.2)
    server.close()
    assert augment(folder, server) == 4
    assert f"cannot connect to {server.url}" in capsys.readouterr().err
    assert not (folder / "aug.partial.csv").exists(), "there is nothing to write"


@pytest.mark.slow
def test_a_storm_of_passing_faults_changes_nothing(folder: Path, server: ApiServer) -> None:
    faults = [
        error(500, "oops"),
        Reply(status=503, body=b"<html>busy</html>"),
        Reply(body=b'{"choices": ['),
        Reply(body=default_reply("x").body, cut_after=40),
        Reply(reset=True),
        Reply(stall=True),
        error(429, "slow down", headers={"retry-after-ms": "20"}),
        error(429, "slow down", headers={"retry-after": "0"}),
        Reply(body={"error": {"code": 500, "message": "slot unavailable"}}),
        error(408, "timeout", shape="flat"),
    ]
    server.script = [reply for fault in faults for reply in (fault, default_reply)]
    assert augment(folder, server, "--concurrency", "8", "--timeout", "0.3") == 0
    assert (folder / "aug.csv").read_text() == expected_table(folder)
    assert set(server.answered.values()) == {1}
    assert len(server.calls) == CALLS + len(faults)


@pytest.mark.slow
def test_a_text_that_the_server_stumbles_over_costs_its_own_draws_alone(
    folder: Path,
    server: ApiServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("twostage.augmentation.openai_client.RETRY_SECONDS", 0.5)
    victim = read_table(folder / "train.csv").texts[3]
    oops = error(500, "oops", headers={"retry-after-ms": "50"})

    def reply(request_id: str, body: Any) -> Reply:
        return oops if source_of(body) == victim else default_reply(request_id)

    server.reply = reply
    server.delay = 0.05  # so that others are answered, one after the other, for over a second
    assert augment(folder, server, "--concurrency", "2") == 0
    printed = capsys.readouterr().out
    assert "train.csv, line 5: no answer, though others had theirs" in printed
    assert "oops" in printed
    assert Counter(read_table(folder / "aug.csv").labels) == {"0": POSITIVE, "1": POSITIVE}
    assert "line 5" in report_of(folder)["failed"][0]["where"]
    server.reply = default_reply
    assert augment(folder, server) == 0
    assert (folder / "aug.csv").read_text() == expected_table(folder), "healed in the next run"


@pytest.mark.parametrize("how", ["one by one", "in batches"])
def test_a_job_whose_every_answer_is_useless_stops_before_it_has_paid_for_all(
    folder: Path,
    server: ApiServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    make_folder(folder, 60, 200)

    def cut(request_id: str, body: Any = None) -> Reply:
        return completion("", finish_reason="length")

    batch = ["--batch"] if how == "in batches" else []
    if batch:
        monkeypatch.setattr("twostage.augmentation.batch_api.FIRST_POLL_SECONDS", 0.01)
        plans = [Plan(answer=lambda key, body: result(key, cut(key))) for _ in range(5)]
        server.routes = BatchRoutes(BatchApi(*plans))
    server.reply = cut
    assert augment(folder, server, "--concurrency", "4", *batch) == 6
    printed = capsys.readouterr()
    assert "no answer was of any use so far (" in printed.err
    assert "truncated" in printed.err
    assert "--max-completion-tokens" in printed.err
    assert "answers of this run" in printed.out, "and what it cost is said"
    asked = len(server.calls)
    assert asked <= 50 + 4
    assert augment(folder, server, "--concurrency", "4") == 6
    assert len(server.calls) == asked, "what is known already is not paid for again"
    server.reply = default_reply
    assert augment(folder, server, "--max-completion-tokens", "500") == 0


@pytest.mark.parametrize("usage", [(10, 5), None])
def test_answers_with_characters_that_no_table_can_hold_are_cleaned(
    folder: Path, server: ApiServer, usage: tuple[int, int] | None
) -> None:
    def reply(request_id: str, body: Any) -> Reply:
        return completion(f"half \ud83d of\0 {phrase(request_id)}\x1b\r\n", usage=usage)

    server.reply = reply
    assert augment(folder, server) == 0
    texts = read_table(folder / "aug.csv").texts
    assert len(texts) == 2 * POSITIVE
    assert all(text.startswith("half  of ") for text in texts)
    calls = len(server.calls)
    assert augment(folder, server) == 0
    assert len(server.calls) == calls


def test_long_texts_ask_for_no_more_than_the_published_model_gives(
    folder: Path, server: ApiServer
) -> None:
    write_table(folder / "train.csv", ("text", "label"), [("word " * 5_000, 0), ("short", 1)])
    assert augment(folder, server) == 0
    limits = {call.body["max_completion_tokens"] for call in server.calls}
    assert limits == {4096, 64 + len("short") // 2}


def test_an_older_table_is_not_taken_for_what_a_partial_job_made(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    augment(folder, server)
    (folder / "aug.partial.csv").write_text("of an earlier run\n")
    server.reply = lambda request_id, body: error(401, "no")
    capsys.readouterr()
    assert augment(folder, server, "--model", "b") == 5
    assert "aug.csv is still that of an earlier run" in capsys.readouterr().out
    assert not (folder / "aug.partial.csv").exists(), "nor is an older partial one"


def test_a_disk_that_is_full_does_not_hide_why_the_job_ended(
    folder: Path,
    server: ApiServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def write_table(path: Path, *arguments: object) -> None:
        raise UsageError(f"cannot write '{path}': No space left on device")

    monkeypatch.setattr("twostage.augmentation.folder.write_table", write_table)
    server.script = [*[default_reply] * 12, *[error(401, "revoked")] * 40]
    assert augment(folder, server, "--concurrency", "4") == 5
    printed = capsys.readouterr()
    assert "the key is refused: revoked" in printed.err
    assert "aug.partial.csv': No space left" in printed.out
    server.script = []
    assert augment(folder, server) == 2
    assert "aug.csv.new': No space left" in capsys.readouterr().err
    monkeypatch.undo()
    assert augment(folder, server) == 0
    assert set(server.answered.values()) == {1}


def test_only_a_text_that_is_too_long_is_shortened_and_that_is_said(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("short one", 0), ("word " * 100, 1), ("short two", 1)]
    write_table(folder / "train.csv", ("text", "label"), rows)

    def reply(request_id: str, body: Any) -> Reply:
        if len(source_of(body)) > 300:
            return error(400, "too long", "context_length_exceeded")
        return default_reply(request_id)

    server.reply = reply
    assert augment(folder, server) == 0
    sent = sorted({len(source_of(call.body)) for call in server.calls})
    assert sent == [9, 279, 374, 500]
    assert "train.csv, line 3: only 279 of 500 characters" in capsys.readouterr().out
    assert report_of(folder)["shortened"] == [{"row": 1, "line": 3, "characters": 500, "sent": 279}]


def test_a_text_that_the_filter_keeps_out_is_asked_once_a_draw(
    folder: Path, server: ApiServer
) -> None:
    victim = read_table(folder / "train.csv").texts[0]

    def reply(request_id: str, body: Any) -> Reply:
        if source_of(body) == victim:
            return error(400, "The response was filtered", "content_filter")
        return default_reply(request_id)

    server.reply = reply
    assert augment(folder, server) == 0
    asked = sum(source_of(call.body) == victim for call in server.calls)
    fared = report_of(folder)["classes"][0]
    assert fared["refused"] == fared["given_up"] == asked


def test_the_budget_is_never_exceeded_and_a_higher_one_goes_on(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def spent() -> float:
        return sum(
            n * (20 * 100 + len(phrase(k).split()) * 200) / 1e6 for k, n in server.answered.items()
        )

    price = ["--price", "100,200", "--concurrency", "4"]
    for budget in (0.05, 0.06):
        assert augment(folder, server, *price, "--budget", str(budget)) == 6
        assert 0.5 * budget < spent() <= budget
        assert "--budget" in capsys.readouterr().err
        assert report_of(folder)["dollars"] == pytest.approx(spent(), abs=1e-6)
        assert (folder / "aug.partial.csv").exists()
        assert not (folder / "aug.csv").exists()
    assert augment(folder, server, *price, "--budget", "10") == 0
    assert set(server.answered.values()) == {1}
    assert report_of(folder)["dollars"] == pytest.approx(spent(), abs=1e-6)
    assert not (folder / "aug.partial.csv").exists()


def test_a_dry_run_says_what_a_run_asks_and_calls_nobody(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    assert augment(folder, server, "--dry-run", "--model", "gpt-4o-mini") == 0
    printed = capsys.readouterr().out
    assert f"calls    {CALLS};" in printed
    assert "$0.15 and $0.6 a million tokens" in printed
    assert server.calls == []
    assert sorted(folder.iterdir()) == before
    augment(folder, server, "--model", "gpt-4o-mini")
    capsys.readouterr()
    assert augment(folder, server, "--dry-run", "--model", "gpt-4o-mini") == 0
    assert "calls    0;" in capsys.readouterr().out
    assert augment(folder, server, "--dry-run", "--model", "mine") == 0
    assert "no price for 'mine'" in capsys.readouterr().out


def uneven_reply(request_id: str, body: Any = None) -> Reply:
    """A pure function of the request id that also declines, and repeats itself."""
    kind = int(hashlib.sha256(request_id.encode()).hexdigest(), 16) % 10
    if kind == 0:
        return completion(None, refusal="no")
    return completion("the same words") if kind == 1 else default_reply(request_id)


@pytest.mark.slow
@pytest.mark.parametrize("at_start", [signal.SIG_DFL, signal.SIG_IGN], ids=["in front", "behind &"])
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_within_seconds_and_keeps_what_was_on_its_way(
    folder: Path, server: ApiServer, signum: int, code: int, at_start: signal.Handlers
) -> None:
    """A shell without job control starts what stands before an `&` with SIGINT ignored."""
    server.delay = 0.4
    process = start(
        folder,
        server,
        "--concurrency",
        "8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, at_start),
    )
    wait_until(lambda: len(server.calls) >= 12)
    process.send_signal(signum)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == code
    assert "run the same command again to go on" in err
    assert "Traceback" not in out + err
    assert 12 <= sum(server.answered.values()) <= 16
    assert len(server.calls) == sum(server.answered.values()), "nothing new, nothing lost"
    assert (folder / "aug.partial.csv").exists()
    assert augment(folder, server, "--concurrency", "50") == 0
    assert set(server.answered.values()) == {1}
    assert (folder / "aug.csv").read_text() == expected_table(folder)


def test_a_second_ctrl_c_does_not_wait(folder: Path, server: ApiServer) -> None:
    server.delay = 20
    process = start(folder, server)
    wait_until(lambda: len(server.calls) > 0)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "it waits for what is on its way"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


def test_ctrl_c_ends_a_wait_between_two_attempts(folder: Path, server: ApiServer) -> None:
    server.reply = lambda request_id, body: error(429, "wait", headers={"retry-after": "60"})
    process = start(folder, server)
    wait_until(lambda: len(server.calls) > 0)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130


@pytest.mark.slow
def test_killed_fifty_times_it_ends_with_the_same_bytes_and_pays_nothing_twice(
    tmp_path: Path, server: ApiServer
) -> None:
    places = 4
    undisturbed = make_folder(tmp_path / "a" / "0.2", 60, 500)
    server.reply = uneven_reply
    assert augment(undisturbed, server) == 0
    whole = Counter(server.answered)

    folder = make_folder(tmp_path / "b" / "0.2", 60, 500)
    server.answered.clear()
    chance = random.Random(0)
    lost: Counter[str] = Counter()
    for kill in range(50):
        # However fast the machine, fifty runs together do not come to the end of the job.
        server.delay = 0.05 if kill % 5 == 0 else 0.005
        process = start(folder, server, "--concurrency", str(places))
        if kill % 5 == 0:
            time.sleep(chance.uniform(0, 0.6))  # while it starts, or opens the journal
        else:
            wait_for_calls(server, len(server.calls) + chance.randrange(1, 35))
        assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        wait_until(lambda: server._in_progress == 0)
        journal = Journal(folder / "paraphrases.jsonl", read_only=True)
        not_kept = [key for key in server.answered if key not in journal]
        journal.close()
        new = [key for key in not_kept if server.answered[key] > lost[key]]
        assert len(new) <= places, "more was lost than was on its way"
        lost.update(new)
    assert sum(lost.values()) < 50 * places
    assert 300 < sum(server.answered.values()) < sum(whole.values()), "killed while at work"

    server.delay = 0.0
    process = start(folder, server, "--concurrency", str(places))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (folder / "aug.csv").read_bytes() == (undisturbed / "aug.csv").read_bytes()
    assert set(server.answered) == set(whole)
    again = {key: n - 1 for key, n in server.answered.items() if n > 1}
    assert again == {key: n for key, n in lost.items() if n}, "only what was on its way"


class BatchRoutes(Routes):
    """The fake Batch API; calls one by one go to the server itself."""

    def get(self, route: Any, default: Any = None) -> Any:
        return None if route[1].endswith("/chat/completions") else super().get(route, default)


@pytest.fixture
def _quick_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_POLL_SECONDS", "MAX_POLL_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(f"twostage.augmentation.batch_api.{name}", 0.001)


@pytest.mark.usefixtures("_quick_polls")
def test_by_batches_the_table_is_the_same_at_half_the_price(
    folder: Path, server: ApiServer
) -> None:
    """The first batch expires half done; the next one has what is missing."""

    def half(key: str, body: Any) -> dict[str, Any]:
        return answer(key) if key < "8" else expiry(key)

    api = BatchApi(Plan("expired", half))
    server.routes = BatchRoutes(api)
    assert augment(folder, server, "--batch", "--price", "100,200") == 0
    assert server.calls == []
    first, second = api.keys.values()
    assert len(first) == CALLS
    assert second == [key for key in first if key >= "8"]
    assert (folder / "aug.csv").read_text() == expected_table(folder)
    report = report_of(folder)
    dollars = sum(20 * 100 + len(phrase(key).split()) * 200 for key in first) / 1e6
    assert report["dollars"] == pytest.approx(dollars / 2, abs=1e-6)
    assert augment(folder, server, "--price", "100,200") == 0, "and another way asks for nothing"
    assert server.calls == []
    assert report_of(folder)["dollars"] == pytest.approx(dollars / 2, abs=1e-6)


@pytest.mark.usefixtures("_quick_polls")
def test_by_batches_bad_answers_are_asked_again_and_long_texts_one_by_one(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    table = read_table(folder / "train.csv")
    too_long, kept_out = table.texts[1], table.texts[2]

    def answer_batched(key: str, body: Any) -> dict[str, Any]:
        if source_of(body) == too_long:
            return result(key, error(400, "too long", "context_length_exceeded"))
        if source_of(body) == kept_out:
            return result(key, error(400, "filtered", "content_filter"))
        return result(key, uneven_reply(key))

    def reply(request_id: str, body: Any) -> Reply:
        if source_of(body) == too_long:
            return error(400, "too long", "context_length_exceeded")
        return uneven_reply(request_id)

    api = BatchApi(*[Plan(answer=answer_batched) for _ in range(20)])
    server.routes = BatchRoutes(api)
    server.reply = reply
    assert augment(folder, server, "--batch") == 0
    assert api.paid_twice == []
    assert len(api.batches) >= 2, "rounds"
    assert {source_of(call.body)[:9] for call in server.calls} == {too_long[:9]}
    assert "characters fit" in capsys.readouterr().out
    in_batches = (folder / "aug.csv").read_bytes()

    # The same, call by call, is the same table.
    def reply_with_filter(request_id: str, body: Any) -> Reply:
        if source_of(body) == kept_out:
            return error(400, "filtered", "content_filter")
        return reply(request_id, body)

    other = make_folder(folder.parent / "elsewhere" / "0.3")
    server.reply = reply_with_filter
    assert augment(other, server) == 0
    assert (other / "aug.csv").read_bytes() == in_batches


@pytest.mark.usefixtures("_quick_polls")
def test_requests_that_no_batch_answers_end_the_job_as_partial(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def one_never_comes(key: str, body: Any) -> dict[str, Any]:
        return expiry(key) if source_of(body).startswith("snippet 1 ") else answer(key)

    server.routes = BatchRoutes(BatchApi(*[Plan("expired", one_never_comes) for _ in range(9)]))
    assert augment(folder, server, "--batch") == 6
    assert "have no answer after several batches" in capsys.readouterr().err
    assert (folder / "aug.partial.csv").exists()
    assert augment(folder, server) == 0, "one by one they come"
    assert {source_of(call.body) for call in server.calls} == {"snippet 1 of a film"}
    assert (folder / "aug.csv").read_text() == expected_table(folder)


@pytest.mark.usefixtures("_quick_polls")
def test_batches_stay_within_the_budget(folder: Path, server: ApiServer) -> None:
    api = BatchApi()
    server.routes = BatchRoutes(api)
    command = ["--batch", "--price", "100,200"]
    assert augment(folder, server, *command, "--budget", "0.04") == 6
    assert 0.02 < report_of(folder)["dollars"] <= 0.04
    assert len(api.batches) > 1, "what came cheaper than it might have makes room for more"
    assert augment(folder, server, *command, "--budget", "10") == 0
    assert api.paid_twice == []
    assert (folder / "aug.csv").read_text() == expected_table(folder)


@pytest.mark.slow
def test_ctrl_c_leaves_batches_at_the_server_and_the_next_run_harvests_them(
    folder: Path, server: ApiServer
) -> None:
    api = BatchApi(Plan(polls=2))
    server.routes = BatchRoutes(api)
    process = start(folder, server, "--batch")
    wait_until(lambda: api.count("POST", "/v1/batches") > 0)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 130
    assert "run the same command again to go on" in err
    process = start(folder, server, "--batch")
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(api.batches) == 1
    assert (folder / "aug.csv").read_text() == expected_table(folder)


@pytest.mark.usefixtures("_quick_polls")
def test_what_is_under_way_in_batches_is_not_asked_for_again_one_by_one(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    api = BatchApi(Plan(polls=10**9))
    server.routes = BatchRoutes(api)
    process = start(folder, server, "--batch")
    wait_until(lambda: api.count("POST", "/v1/batches") > 0)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=12)
    assert process.returncode == 143
    assert augment(folder, server) == 2
    assert f"{CALLS} of the requests are under way in batches" in capsys.readouterr().err
    assert server.calls == []
    assert augment(folder, server, "--dry-run") == 0
    assert f"{CALLS} under way in batches\ncalls    0;" in capsys.readouterr().out
    # Batches that nobody waits for any more are harvested all the same.
    journal = folder / "paraphrases.jsonl"
    api._plan["batch-0"].polls = 0
    other = make_folder(folder.parent / "elsewhere" / "0.3")
    assert augment(other, server) == 0
    journal.write_bytes((other / "paraphrases.jsonl").read_bytes())
    calls = len(server.calls)
    assert augment(folder, server, "--batch") == 0
    assert (len(server.calls), len(api.batches)) == (calls, 1)
    assert api.count("GET", "/v1/files/") > 0
    assert (folder / "aug.csv").read_text() == expected_table(folder)


def test_the_key_comes_from_a_file_or_the_environment_and_is_nowhere_else(
    folder: Path,
    server: ApiServer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "key.txt").write_text(KEY + "\n")
    assert augment(folder, server, "--api-key-file", str(tmp_path / "key.txt")) == 0
    assert server.calls[-1].headers["authorization"] == f"Bearer {KEY}"
    assert "note" not in capsys.readouterr().err
    monkeypatch.setenv("OPENAI_API_KEY", KEY[::-1])
    assert augment(folder, server, "--model", "b") == 0
    assert server.calls[-1].headers["authorization"] == f"Bearer {KEY[::-1]}"
    assert augment(folder, server, "--model", "c", "-k", "another-" + KEY) == 0
    assert server.calls[-1].headers["authorization"] == f"Bearer another-{KEY}"
    printed = capsys.readouterr()
    assert "can be read by every user of this machine" in printed.err
    server.reply = lambda request_id, body: completion(f"{default_reply(request_id)} {KEY}")
    assert augment(folder, server, "--model", "d", "-k", KEY) == 0
    written = printed.err + printed.out + "".join(capsys.readouterr())
    written += "".join(path.read_text() for path in folder.iterdir())
    assert "[key]" in written
    assert KEY not in written
    assert KEY[::-1] not in written


def test_a_server_of_ones_own_needs_no_key(folder: Path, server: ApiServer) -> None:
    assert augment(folder, server) == 0
    assert "authorization" not in server.calls[0].headers


def test_the_base_url_may_come_from_the_environment(
    folder: Path, server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    assert main(["augment", "-d", str(folder)]) == 0
    assert len(server.calls) == CALLS


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "OPENAI_API_KEY"),
        (["--base-url", "localhost:8000"], 2, "base URL"),
        (["--base-url", "http://me:secret@localhost/v1"], 2, "user name or password"),
        (["--api-key-file", "sk-secret"], 2, "--api-key-file cannot be read: No such file"),
        (["--apikey", "sk-secret"], 2, "unrecognized arguments: --apikey"),
        (["--key=sk-secret"], 2, "unrecognized arguments: --key"),
        (["sk-secret"], 2, "a word too many"),
        (["-k", "two words"], 2, "-k is empty or holds"),
        (["-k", "x", "--concurrency", "0"], 2, "concurrency is 0"),
        (["-k", "x", "--budget", "-1"], 2, "budget is -1"),
        (["-k", "x", "--price", "1"], 2, "--price"),
        (["-k", "x", "--price=-1,2"], 2, "price is -1.0,2.0"),
        (["-k", "x", "--price", "nan,2"], 2, "price is nan,2.0"),
        (["-k", "x", "--max-completion-tokens", "0"], 2, "max_completion_tokens is 0"),
        (["-k", "x", "--model", "mine", "--budget", "1"], 2, "--price"),
        (["-k", "x", "--model", " "], 2, "model is empty"),
        (["-k", "x", "--prompt", " "], 2, "prompt is empty"),
        (["-k", "x", "--temperature", "3"], 2, "temperature is 3"),
        (["-k", "x", "--timeout", "nan"], 2, "timeout is nan"),
        (["--offline", "--dry-run"], 2, "--offline calls nobody"),
        (["--offline", "--batch"], 2, "--offline calls nobody"),
        (["-d", "nowhere", "-k", "x"], 3, "no data folder 'nowhere'"),
        (["-d", "nowhere", "--offline"], 3, "no data folder 'nowhere'"),
        (["-d", "nowhere", "--dry-run"], 3, "no data folder 'nowhere'"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    before = sorted(folder.iterdir())
    try:
        ended = main(["augment", "-d", str(folder), *arguments])
    except SystemExit as by_argparse:
        ended = int(by_argparse.code or 0)
    assert ended == code
    printed = capsys.readouterr().err
    assert said in printed
    assert "secret" not in printed
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("content", ["", "text,label\n", "text,label\na,1\nb,1\n", "text\na\n"])
@pytest.mark.parametrize("how", [["--offline"], ["--dry-run"], []])
def test_a_training_table_that_cannot_be_used_is_said(
    folder: Path, server: ApiServer, content: str, how: list[str]
) -> None:
    (folder / "train.csv").write_text(content)
    assert augment(folder, server, *how) == 3
    assert server.calls == []


def test_labels_keep_their_names(folder: Path, server: ApiServer) -> None:
    write_table(
        folder / "train.csv", ("label", "text"), [("ham", "a"), ("spam", "b"), ("ham", "c")]
    )
    assert augment(folder, server) == 0
    assert sorted(read_table(folder / "aug.csv").labels) == ["ham", "ham", "spam", "spam"]


def test_offline_edits_are_reproducible_and_called_what_they_are(
    folder: Path, server: ApiServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert augment(folder, server, "--offline") == 0
    assert server.calls == []
    first = (folder / "aug.csv").read_bytes()
    assert "overlap" in capsys.readouterr().out
    table = read_table(folder / "aug.csv")
    assert Counter(table.labels) == {"0": POSITIVE, "1": POSITIVE}
    assert report_of(folder)["generator"] == "lexical edits"
    assert augment(folder, server, "--offline") == 0
    assert (folder / "aug.csv").read_bytes() == first
    assert augment(folder, server, "--offline", "--seed", "7") == 0
    assert (folder / "aug.csv").read_bytes() != first


def test_two_stages_train_on_the_table(folder: Path, tiny: Path) -> None:
    main(["augment", "-d", str(folder), "--offline"])
    write_table(folder / "test.csv", ("text", "label"), [("a film", 0), ("a snippet", 1)])
    command = ["train", "--method", "augment", "-d", str(folder), "-o", str(folder / "out")]
    assert main([*command, "--model", str(tiny), "--seeds", "7"]) == 0
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["inputs"]["augmented"] == str(folder / "aug.csv")
