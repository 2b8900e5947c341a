"""Every command that the documents tell people to type is started here, small.

What the tests know is collected from the Markdown and from the benchmarks' docstrings, so a command
that is written there and that no test starts is a failure. The commands of `twostage` run word for
word and in the order of the README, in a folder that has what they name: an encoder of two layers
called `bert-base-uncased`, a few texts, a local test server in the place of the remote ones.
"""

import ast
import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from twostage.assets import data_sets
from twostage.augmentation import batch_api
from twostage.cli import main
from twostage.data.tables import write_table

from .assets.test_data_sets import SMALL, zipped
from .augmentation.conftest import ApiServer, Reply
from .augmentation.test_augment import BatchRoutes
from .augmentation.test_batch_api import BatchApi
from .test_demo import make_small_demo

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
DOCUMENTS = (ROOT / "README.md", BENCHMARKS / "README.md")
PROGRAMS = "twostage|python3?|pip|pytest|export|wget|curl|unzip|git|bash|sh|docker|make"

HERE = "test_commands.py::"
STARTED_BY = {
    "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 '.[demo]' && "
    ".venv/bin/twostage demo": HERE + "test_the_first_command_ends_in_a_comparison",
    "python3 -m venv .venv && .venv/bin/pip install torch==2.13.0 -e '.[test]' && "
    ".venv/bin/pytest": "test_readme.py::test_the_two_commands_set_themselves_up_in_one_line_each",
    '.venv/bin/pytest -m "not slow"': HERE + "test_the_quick_tests_are_most_of_them",
    "pip install -e '.[bench]'": HERE + "test_the_extras_that_are_named_exist",
    "python tests/kernels/compile_launches.py": "kernels/test_compilation.py::compiled",
    "python benchmarks/augment_throughput.py": "augmentation/test_throughput.py::"
    "test_the_benchmark_runs_and_nobody_beats_what_is_possible",
    "python benchmarks/gpu_suite.py": "test_benchmarks.py::test_without_a_gpu_the_suite_says_so",
    "python benchmarks/gpu_suite.py --parts stage-2 --output DIR --commit COMMIT": "test_benchmarks"
    ".py::test_the_gpu_suite_rehearses_on_a_cpu",
    "python benchmarks/gpu_suite.py --plan": "test_benchmarks.py::"
    "test_the_plan_of_the_gpu_suite_fits_its_commands",
    "python benchmarks/gpu_suite.py --rehearse": "test_benchmarks.py::"
    "test_the_gpu_suite_rehearses_on_a_cpu",
    "python benchmarks/kernel_throughput.py": HERE + "test_the_kernels_benchmark_asks_for_a_gpu",
    "python benchmarks/kernel_throughput.py --rehearse": HERE
    + "test_the_kernels_benchmark_rehearses_on_a_cpu",
    "python benchmarks/million_rows.py --data demo": "test_million_rows.py::"
    "test_large_tables_are_measured_in_both_ways",
    "python benchmarks/million_rows.py --model bert-base": "test_million_rows.py::"
    "test_large_tables_are_measured_in_both_ways",
    "python benchmarks/predict_throughput.py --data demo": "test_whole_job_benchmarks.py::"
    "test_the_rehearsal_of_predicting_marks_the_best_pipeline",
    "python benchmarks/predict_throughput.py --model bert-base": "test_whole_job_benchmarks.py::"
    "test_the_rehearsal_of_predicting_marks_the_best_pipeline",
    "python benchmarks/savings.py --data demo": HERE + "test_a_saving_is_taken_out_and_timed",
    "python benchmarks/several_seeds.py --data demo": "test_whole_job_benchmarks.py::"
    "test_several_seeds_are_timed_with_and_without_a_common_trunk",
    "python benchmarks/several_seeds.py --model bert-base": "test_whole_job_benchmarks.py::"
    "test_several_seeds_are_timed_with_and_without_a_common_trunk",
    "python benchmarks/time_to_result.py --data demo": "test_whole_job_benchmarks.py::"
    "test_the_rehearsal_of_the_whole_job_has_every_case",
    "python benchmarks/time_to_result.py --model bert-base": "test_whole_job_benchmarks.py::"
    "test_the_rehearsal_of_the_whole_job_has_every_case",
    "python benchmarks/train_throughput.py --data demo": HERE + "test_a_stage_is_timed",
    "python benchmarks/train_throughput.py --model bert-base": HERE + "test_a_stage_is_timed",
    "python benchmarks/train_throughput.py --data demo --profile": "test_benchmarks.py::"
    "test_a_profile_is_printed_and_nothing_written",
    "python benchmarks/two_stage_vs_vanilla.py --data demo": HERE
    + "test_two_stages_are_compared_with_vanilla",
    "python benchmarks/two_stage_vs_vanilla.py --rates 0.1": HERE
    + "test_two_stages_are_compared_with_vanilla",
    "python benchmarks/two_stage_vs_vanilla.py --data demo --rates 0.1": HERE
    + "test_two_stages_are_compared_with_vanilla",
    "python benchmarks/workload.py --data demo": HERE
    + "test_the_histogram_is_that_of_the_snippets",
}
"""The test that starts each documented command but those of `twostage`: path::name in tests/."""


def commands_in(markdown: str) -> list[str]:
    """Each line of a block without a language, and inline code that calls a program.

    The commands of the published code, which stand in a table beside ours, are left out.
    """
    published = r"(?<=\| published \| here \|\n)(?:\|.*\n)+"
    markdown = re.sub(
        published, lambda rows: re.sub(r"^\|[^|]*\|", "|", rows[0], flags=re.M), markdown
    )
    found = r"^```\n(?P<block>.*?)^```|^```.*?^```|(?<!`)`(?P<inline>[^`\n]+)`(?!`)"
    commands: list[str] = []
    for match in re.finditer(found, markdown, flags=re.M | re.S):
        commands += (match["block"] or "").splitlines()
        words = (match["inline"] or "").split()
        # `twostage train` alone names a command; with something behind it, it is to be typed.
        mentioned = len(words) < (3 if words[:1] == ["twostage"] else 2)
        if not mentioned and re.fullmatch(PROGRAMS, Path(words[0]).name):
            commands.append(" ".join(words))
    return commands


def commands_in_docstring(script: Path) -> list[str]:
    """The `python SCRIPT` lines of a benchmark, without the remark two spaces behind them."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"(?:^ +|`)(python3? \S+\.py(?: [^ `\n]+)*)", text, flags=re.M)
    return [str(line) for line in lines]


def documented() -> list[str]:
    """In the order of the documents, each once."""
    found = [command for path in DOCUMENTS for command in commands_in(path.read_text("utf-8"))]
    for script in sorted(BENCHMARKS.glob("*.py")):
        found += commands_in_docstring(script)
    return list(dict.fromkeys(found))


def of_twostage(command: str) -> bool:
    return command.startswith(("twostage ", "export "))


def test_commands_are_found_wherever_they_stand() -> None:
    markdown = (
        "Do `twostage fetch sst2`, see `twostage train`; `python x.py --a b` or\n\n"
        "| published | here |\n|---|---|\n| `python gen.py -d X` | `twostage fetch aug` |\n\n"
        "```text\npython printed.py --c d\n```\n\n```\npip install this\nnew tool\n```\n"
    )
    assert commands_in(markdown) == [
        *("twostage fetch sst2", "python x.py --a b", "twostage fetch aug"),
        *("pip install this", "new tool"),
    ]


@pytest.mark.slow
def test_the_quick_tests_are_most_of_them() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-m", "not slow", "-n", "0"]
    finished = subprocess.run(
        [*command, "--collect-only", "-p", "no:cacheprovider"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    quick, collected = re.findall(r"(\d+)/(\d+) tests collected", finished.stdout)[0]
    assert 0.8 * int(collected) < int(quick) < int(collected)


def test_every_documented_command_is_started() -> None:
    others = {command for command in documented() if not of_twostage(command)}
    assert others - set(STARTED_BY) == set(), "no test is known to start these"
    assert set(STARTED_BY) - others == set(), "these are documented no more"


@pytest.mark.parametrize("command", STARTED_BY)
def test_the_test_that_starts_it_is_there(command: str) -> None:
    path, _, name = STARTED_BY[command].partition("::")
    source = (Path(__file__).parent / path).read_text(encoding="utf-8")
    assert re.search(rf"^def {name}\(", source, flags=re.M), f"{path} has no {name}"
    if match := re.match(r"python (\S+\.py)", command):
        script = ROOT / match[1]
        assert script.is_file()
        assert script.name in source
        # No library reads these words, so one that no parser adds would go unnoticed.
        parsers = script.read_text("utf-8") + (BENCHMARKS / "workload.py").read_text("utf-8")
        for option in re.findall(r" (--[\w-]+)", command):
            assert f'"{option}"' in parsers, f"{script.name} has no {option}"


def test_the_extras_that_are_named_exist() -> None:
    extras = set(re.findall(r'^        "(\w+)": ', (ROOT / "setup.py").read_text("utf-8"), re.M))
    named = re.findall(r"'\.\[(\w+)\]'", "\n".join(documented()))
    assert {"demo", "test", "bench"} <= set(named) <= extras


@pytest.fixture
def desk(demo_folder: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with everything that the documents assume to be there."""
    folder = tmp_path / "desk"
    make_small_demo(demo_folder, tiny, folder / "demo")
    shutil.copytree(tiny, folder / "bert-base-uncased")
    rows = [("good film", 1), ("great fun", 1), ("fine", 1), ("bad film", 0)] * 4
    for name in ("my_folder/train.csv", "my_folder/test.csv", "more_labelled_texts.csv"):
        write_table(folder / name, ("text", "label"), rows)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """All that is remote."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    server = ApiServer()
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    yield server
    server.close()
    assert server.errors == []


@pytest.mark.slow
def test_the_readmes_commands_run_in_order(
    desk: Path,
    server: ApiServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("FIRST_POLL_SECONDS", "MAX_POLL_SECONDS", "SETTLE_SECONDS"):
        monkeypatch.setattr(batch_api, name, 0.001)
    batches = BatchApi()
    serve_downloads_and_batches(server, batches, monkeypatch)
    # The interpreter, in which these tests run Triton's kernels, is not there for people.
    monkeypatch.setattr("twostage.kernels._INTERPRETED", False)
    substitutes = {
        "http://localhost:11434/v1": server.url,
        "D": "down_sampled/0.2",
        "O": "results/published",
    }
    commands = [command for command in documented() if of_twostage(command)]
    assert len(commands) > 15
    for command in commands:
        if command.startswith("export "):
            name, _, value = command.removeprefix("export ").partition("=")
            monkeypatch.setenv(name, value)
            continue
        words = shlex.split(command)
        if words[1] == "augment":  # each from the start, not from what the one before has paid for
            for path in (desk / "down_sampled" / "0.2").iterdir():
                if path.name not in ("train.csv", "test.csv"):
                    path.unlink()
        code = main([substitutes.get(word, word) for word in words[1:]])
        error = capsys.readouterr().err
        if "triton" in words and not torch.cuda.is_available():
            assert code == 2, f"{command}: {error}"
            assert error.startswith("twostage: error: kernels are 'triton', but the Triton kernels")
            assert "need a CUDA GPU" in error
        else:
            assert code == 0, f"{command}: {error}"
    assert len(batches.batches) == 1
    assert {call.body["model"] for call in server.calls} == {
        "gpt-3.5-turbo",
        "gpt-4o-mini",
        "llama3",
    }
    assert (desk / "results" / "augmented" / "metrics.json").is_file()


@pytest.mark.slow
def test_the_first_command_ends_in_a_comparison(
    desk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The installation before it is what `.ci/run` does in a fresh environment."""
    (line,) = [line for line in documented() if line.endswith("/bin/twostage demo")]
    assert main(line.split()[-1:]) == 0
    printed = capsys.readouterr().out
    assert "two-stage" in printed[printed.index("Confusion matrices") :]
    assert "fetching" not in printed


def serve_downloads_and_batches(
    server: ApiServer, batches: BatchApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GLUE's archive and the authors' paraphrases, in small, beside the Batch API."""
    archive = zipped(**SMALL)
    paraphrases = b"org_ind,text,label\n0,a good one,1\n1,a bad one,0\n"

    class AllRoutes(BatchRoutes):
        def get(self, route: Any, default: Any = None) -> Any:
            for name, body in (("SST-2.zip", archive), ("aug.csv", paraphrases)):
                if route == ("GET", f"/v1/{name}"):
                    kind = {"Content-Type": "application/octet-stream"}
                    return lambda request: Reply(headers=kind, body=body)
            return super().get(route, default)

    server.routes = AllRoutes(batches)
    for fetch, name, options in (
        (data_sets.fetch_sst2, "SST-2.zip", {"sha256": None}),
        (data_sets.fetch_aug, "aug.csv", {"allowed_hosts": ("127.0.0.1",)}),
    ):
        redirected = functools.partial(fetch, url=f"{server.url}/{name}", **options)
        monkeypatch.setattr(data_sets, fetch.__name__, redirected)


def run_script(script: str, *arguments: str) -> str:
    """What a benchmark prints, started as people do; its last line is a record, in JSON."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_two_stages_are_compared_with_vanilla(desk: Path) -> None:
    arguments = "--data demo --rates 0.1 --seeds 7 --output results"
    printed = run_script("two_stage_vs_vanilla.py", *arguments.split())
    record = json.loads(printed.splitlines()[-1])
    runs = ["vanilla", "vanilla, 2 epochs", "two-stage", "vanilla, 3 epochs"]
    runs += ["two-stage, offline edits", "two-stage, trunk cached"]
    assert [row["run"] for row in record["rows"]] == runs
    assert all(sum(map(sum, row["confusion"])) == 300 for row in record["rows"])
    written = (desk / "results" / "two_stage_vs_vanilla.md").read_text()
    assert all(f"| 0.1 | {run} | " in written for run in runs)
    assert json.loads((desk / "results" / "two_stage_vs_vanilla.json").read_text()) == record


@pytest.mark.slow
def test_a_stage_is_timed(desk: Path) -> None:
    arguments = "--model tiny --device cpu --stages 2 --batch-sizes 4 --texts 24 --warmup 1"
    runs = ("--runs", "ours bf16", "--output", "results")
    printed = run_script("train_throughput.py", *arguments.split(), *runs)
    record = json.loads(printed.splitlines()[-1])
    assert "error" not in record["limits"]
    timed, profiled = record["rows"]
    assert timed["run"] == "ours bf16"
    assert timed["examples_per_second"] > 0
    assert profiled["profile"]
    written = (desk / "results" / "train_throughput-tiny-cpu.md").read_text()
    assert written.strip() in printed


@pytest.mark.slow
def test_a_saving_is_taken_out_and_timed(desk: Path) -> None:
    """On the demo's texts, which its siblings leave to it."""
    saving = "frozen trunk in large batches"
    arguments = ("--data", "demo", "--savings", saving, "--batch-sizes", "4", "--texts", "24")
    printed = run_script("savings.py", *arguments, "--output", "results")
    whole, without = json.loads(printed.splitlines()[-1])["rows"]
    assert (whole["without"], without["without"]) == (None, saving)
    assert {whole["stage"], without["stage"]} == {1}
    assert f"\n| {saving} | 1 | 4 | {without['examples_per_second']:.1f} | " in printed
    assert (desk / "results" / "savings-minilm-cpu.md").read_text().strip() in printed


@pytest.mark.slow
def test_the_histogram_is_that_of_the_snippets(demo_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "histogram.json"
    run_script("workload.py", "--data", str(demo_folder), "--output", str(output))
    assert output.read_bytes() == (BENCHMARKS / "snippet_histogram.json").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")
def test_the_kernels_benchmark_asks_for_a_gpu() -> None:
    command = [sys.executable, str(BENCHMARKS / "kernel_throughput.py")]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    said = "kernel_throughput: torch sees no CUDA GPU; --rehearse runs here\n"
    assert finished.stderr == said


@pytest.mark.slow
def test_the_kernels_benchmark_rehearses_on_a_cpu(tmp_path: Path) -> None:
    chosen = ("--rehearse", "--operations", "cross-entropy", "--output", str(tmp_path))
    run_script("kernel_throughput.py", *chosen)
    record = json.loads((tmp_path / "kernel_throughput-rehearsal.json").read_text())
    assert {row["operation"] for row in record["kernels"]} == {"cross-entropy"}
    assert all(row["close"] for row in record["kernels"])
