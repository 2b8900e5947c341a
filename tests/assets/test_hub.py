"""Models by name, from a hub on this machine, asked as a user's process would ask it.

huggingface_hub reads its environment when it is imported, so each case is a process of its own.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from twostage.assets.hub import fetch_model, find_model
from twostage.errors import ModelError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {
    "config.json": b"{}",
    "model.safetensors": bytes(range(256)) * 500,
    "tokenizer.json": b'{"tokenizer": 1}',
    "tokenizer_config.json": b'{"do_lower_case": true}',
    "special_tokens_map.json": b'{"mask_token": "[MASK]"}',
    "added_tokens.json": b"{}",
    "vocab.txt": b"[PAD]\n[UNK]\n",
}
FILES = tuple(CONTENT)
CONTENT |= {
    "pytorch_model.bin": b"a pickle",
    "flax_model.msgpack": b"flax",
    "onnx/model.onnx": b"onnx",
}
# Runs each call and prints, as JSON, what it returned, said and raised.
SCRIPT = """
import json, sys
from pathlib import Path
from twostage.assets import hub
from twostage.errors import TwoStageError
outcomes = []
for function, name, *folder in json.loads(sys.argv[1]):
    said = []
    try:
        path = getattr(hub, function)(name, *map(Path, folder), say=said.append)
        outcome = {"path": str(path)}
    except TwoStageError as error:
        outcome = {"error": str(error), "exit_code": error.exit_code}
    outcomes.append({**outcome, "said": said})
print(json.dumps(outcomes))
"""


class Hub:
    """A hub of one model, and the cache of a user."""

    def __init__(self, server: Any, home: Path) -> None:
        self.server = server
        self.home = home
        self.cache = home / "hub"

    def has(self, name: str, files: dict[str, bytes], *, gated: bool = False) -> None:
        listed = [{"rfilename": file} for file in files]
        info = {"id": name, "modelId": name, "sha": COMMIT, "siblings": listed, "tags": []}
        tree = [
            {"type": "file", "path": file, "size": len(content), "oid": f"oid-{file}"}
            for file, content in files.items()
        ]
        answer_json = {"kind": "application/json"}
        for path in (f"/api/models/{name}", f"/api/models/{name}/revision/main"):
            self.server.answer(path, json.dumps(info).encode(), **answer_json)
        tree_path = f"/api/models/{name}/tree/{COMMIT}"
        self.server.answer(tree_path, json.dumps(tree).encode(), **answer_json)
        for file, content in files.items():
            headers = {"ETag": f'"etag-{file.replace("/", "-")}"', "X_Repo_Commit": COMMIT}
            refused = {"status": 403, "X_Error_Code": "GatedRepo"} if gated else {}
            self.server.answer(f"/{name}/resolve/{COMMIT}/{file}", content, **headers, **refused)

    def call(self, *calls: tuple[str, ...], **environment: str) -> list[dict[str, Any]]:
        """The outcomes of calls in one process that sees this hub and this cache."""
        kept = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
        kept = {k: v for k, v in kept.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
        kept |= {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self.home)}
        finished = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT, json.dumps(calls)],
            env=kept | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr == ""  # no progress bar, no log
        outcomes: list[dict[str, Any]] = json.loads(finished.stdout)
        return outcomes

    def asked_files(self) -> set[str]:
        """The files whose content was asked for."""
        return {
            path.partition(f"{COMMIT}/")[2]
            for method, path, _ in self.server.requests
            if method == "GET" and "/resolve/" in path
        }


@pytest.fixture
def hub(server: Any, tmp_path: Path) -> Hub:
    return Hub(server, tmp_path / "home")


FIND = ("find_model", "tiny-bert")


def test_the_first_use_downloads_these_files_and_the_second_asks_nobody(hub: Hub) -> None:
    hub.has("tiny-bert", CONTENT)
    (first,) = hub.call(FIND)
    assert first["said"] == [
        f"downloading tiny-bert from the Hugging Face Hub into {hub.cache} (first use)"
    ]
    folder = Path(first["path"])
    assert folder.is_relative_to(hub.cache)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        file: CONTENT[file] for file in FILES
    }
    assert hub.asked_files() == set(FILES)

    hub.server.requests.clear()
    again = hub.call(FIND, ("fetch_model", "tiny-bert"))
    assert again == [{"path": str(folder), "said": []}] * 2
    assert hub.call(FIND, HF_HUB_OFFLINE="1") == [{"path": str(folder), "said": []}]
    assert hub.server.requests == []


def test_a_model_of_an_owner_with_only_a_vocabulary_is_complete(hub: Hub) -> None:
    files = ("config.json", "model.safetensors", "vocab.txt")
    hub.has("ann/tiny", {file: CONTENT[file] for file in files})
    calls = [("find_model", "ann/tiny")] * 2
    first, second = hub.call(*calls)
    assert first["path"] == second["path"]
    assert len(first["said"]) == 1
    assert second["said"] == []
    assert sorted(path.name for path in Path(first["path"]).iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab.txt",
    ]


@pytest.mark.slow
def test_what_another_tool_cached_in_part_is_completed(hub: Hub) -> None:
    hub.has("tiny-bert", CONTENT)
    script = "from huggingface_hub import hf_hub_download as get\nget('tiny-bert', 'config.json')"
    hub.server.answer(
        "/tiny-bert/resolve/main/config.json",
        b"{}",
        ETag='"etag-config.json"',
        X_Repo_Commit=COMMIT,
    )
    environment = {"HF_ENDPOINT": hub.server.url, "HF_HOME": str(hub.home)}
    subprocess.run([sys.executable, "-P", "-c", script], env=os.environ | environment, check=True)
    assert len(list(hub.cache.rglob("snapshots/*/config.json"))) == 1
    hub.server.requests.clear()

    (offline,) = hub.call(FIND, HF_HUB_OFFLINE="1")
    assert offline["exit_code"] == 4
    assert hub.server.requests == []
    (online,) = hub.call(FIND)
    assert len(online["said"]) == 1
    assert {path.name for path in Path(online["path"]).iterdir()} == set(FILES)
    assert "model.safetensors" in hub.asked_files()


def test_the_weights_come_last(hub: Hub) -> None:
    # So that a process that was killed leaves no model with half its tokenizer.
    hub.has("tiny-bert", CONTENT)
    hub.call(FIND)
    asked = [path for method, path, _ in hub.server.requests if method == "GET"]
    assert asked[-1].endswith("/model.safetensors")


SHARDS = {
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {t: f"model-0000{i}-of-00002.safetensors" for i, t in ((1, "a"), (2, "b"))}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}


def test_sharded_weights_are_downloaded_and_found_again(hub: Hub, tmp_path: Path) -> None:
    files = {file: CONTENT[file] for file in ("config.json", "vocab.txt", "pytorch_model.bin")}
    hub.has("tiny-bert", files | SHARDS)
    (first,) = hub.call(FIND)
    wanted = {"config.json", "vocab.txt", *SHARDS}
    assert {path.name for path in Path(first["path"]).iterdir()} == wanted
    assert hub.call(FIND, HF_HUB_OFFLINE="1") == [{"path": first["path"], "said": []}]
    (copied,) = hub.call(("fetch_model", "tiny-bert", str(tmp_path / "copy")))
    assert {path.name for path in Path(copied["path"]).iterdir()} == wanted
    (Path(first["path"]) / "model-00002-of-00002.safetensors").unlink()
    (offline,) = hub.call(FIND, HF_HUB_OFFLINE="1")
    assert offline["exit_code"] == 4


def test_an_adapter_is_named_before_it_is_downloaded(hub: Hub) -> None:
    hub.has("ann/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"})
    (outcome,) = hub.call(("find_model", "ann/lora"))
    assert "has no config.json; there is an adapter (LoRA or the like)" in outcome["error"]
    assert outcome["exit_code"] == 3


@pytest.mark.slow
def test_a_cached_adapter_is_told_offline(hub: Hub) -> None:
    path = "/ann/lora/resolve/main/adapter_config.json"
    hub.server.answer(path, b"{}", ETag='"etag"', X_Repo_Commit=COMMIT)
    script = "from huggingface_hub import hf_hub_download as get\n"
    script += "get('ann/lora', 'adapter_config.json')"
    settings = {"HF_ENDPOINT": hub.server.url, "HF_HOME": str(hub.home)}
    subprocess.run([sys.executable, "-P", "-c", script], env=os.environ | settings, check=True)
    (outcome,) = hub.call(("find_model", "ann/lora"), HF_HUB_OFFLINE="1")
    assert (
        "without model.safetensors, and HF_HUB_OFFLINE is set; there is an adapter"
        in (outcome["error"])
    )


@pytest.mark.slow
@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {}])
def test_what_is_cached_without_safetensors_is_told(hub: Hub, environment: dict[str, str]) -> None:
    """As by a tool that reads pickles; the second time the hub answers nothing."""
    files = {file: CONTENT[file] for file in ("config.json", "vocab.txt", "pytorch_model.bin")}
    for file, content in files.items():
        path = f"/tiny-bert/resolve/main/{file}"
        hub.server.answer(path, content, ETag=f'"etag-{file}"', X_Repo_Commit=COMMIT)
    script = "from huggingface_hub import hf_hub_download as get\n"
    script += "".join(f"get('tiny-bert', {file!r})\n" for file in files)
    settings = {"HF_ENDPOINT": hub.server.url, "HF_HOME": str(hub.home)}
    subprocess.run([sys.executable, "-P", "-c", script], env=os.environ | settings, check=True)
    broken(hub)
    (outcome,) = hub.call(FIND, **environment)
    assert " without model.safetensors" in outcome["error"]
    assert "; pytorch_model.bin can run code when it is read" in outcome["error"]
    assert f"/snapshots/{COMMIT} && python3 -m venv" in outcome["error"]
    assert outcome["exit_code"] == 4


def test_offline_without_a_cache_is_one_sentence_and_no_request(hub: Hub) -> None:
    hub.has("tiny-bert", CONTENT)
    (outcome,) = hub.call(FIND, HF_HUB_OFFLINE="1")
    assert outcome == {
        "error": f"tiny-bert is not in {hub.cache}, and HF_HUB_OFFLINE is set; unset it, or run "
        "`twostage fetch tiny-bert` with a network and the same cache",
        "exit_code": 4,
        "said": [],
    }
    assert hub.server.requests == []


def test_the_cache_may_be_elsewhere(hub: Hub, tmp_path: Path) -> None:
    hub.has("tiny-bert", CONTENT)
    (outcome,) = hub.call(FIND, HF_HUB_CACHE=str(tmp_path / "elsewhere"))
    assert Path(outcome["path"]).is_relative_to(tmp_path / "elsewhere")


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ({"model.safetensors"}, "has no model.safetensors; pytorch_model.bin can run code"),
        (
            {"model.safetensors", "pytorch_model.bin"},
            "has no model.safetensors; flax_model.msgpack holds weights for Flax",
        ),
        (
            {"model.safetensors", "pytorch_model.bin", "flax_model.msgpack", "onnx/model.onnx"},
            "has no model.safetensors; choose another",
        ),
        ({"tokenizer.json", "vocab.txt"}, "has neither tokenizer.json nor vocab.txt"),
        ({"config.json"}, "has no config.json"),
    ],
)
def test_a_model_that_cannot_be_used_is_not_downloaded(
    hub: Hub, left_out: set[str], said: str
) -> None:
    hub.has("tiny-bert", {k: v for k, v in CONTENT.items() if k not in left_out})
    (outcome,) = hub.call(FIND)
    assert said in outcome["error"]
    assert outcome["exit_code"] == 3
    assert outcome["said"] == []
    assert hub.asked_files() == set()


def repository_not_found(hub: Hub) -> None:
    hub.server.answer("/api/models/tiny-bert", status=404, X_Error_Code="RepoNotFound")


def private(hub: Hub) -> None:
    hub.server.answer("/api/models/tiny-bert", status=401)


def gated(hub: Hub) -> None:
    hub.has("tiny-bert", CONTENT, gated=True)


def broken(hub: Hub) -> None:
    hub.server.answer("/api/models/tiny-bert", status=500)


def cut(hub: Hub) -> None:
    def hang_up(handler: BaseHTTPRequestHandler) -> None:
        handler.close_connection = True

    hub.server.answers["/api/models/tiny-bert"] = hang_up


def not_a_hub(hub: Hub) -> None:
    hub.server.answer("/api/models/tiny-bert", b"<html>", kind="text/html")


@pytest.mark.parametrize(
    ("arrange", "said"),
    [
        (repository_not_found, "there is no model tiny-bert at {url}, or it is private"),
        (private, "if a folder was meant, there is none of that name in {folder}"),
        (gated, "tiny-bert is open only to those whom its owner admits; ask at {url}/tiny-bert"),
        (broken, "{url} answered with status 500 for tiny-bert; run the command again later"),
        (cut, "tiny-bert could not be downloaded from {url}"),
        (not_a_hub, "tiny-bert could not be downloaded from {url}"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(
    hub: Hub, arrange: Callable[[Hub], None], said: str
) -> None:
    arrange(hub)
    (outcome,) = hub.call(FIND)
    assert said.format(url=hub.server.url, folder=os.getcwd()) in outcome["error"]
    assert "\n" not in outcome["error"]
    assert outcome["exit_code"] == 4
    assert len(hub.server.requests) > 0


def test_without_a_network_it_is_one_sentence(hub: Hub) -> None:
    (outcome,) = hub.call(FIND, HF_ENDPOINT="http://ann:secret@127.0.0.1:9")
    assert outcome["error"].startswith(
        "tiny-bert could not be downloaded from http://127.0.0.1:9 (ConnectError); check the "
    )
    assert "secret" not in outcome["error"]
    assert outcome["exit_code"] == 4


def test_a_cache_that_cannot_be_written_is_one_sentence(hub: Hub) -> None:
    hub.has("tiny-bert", CONTENT)
    hub.home.touch()
    (outcome,) = hub.call(FIND)
    assert outcome["error"].startswith(f"cannot write '{hub.home}")
    assert outcome["error"].endswith("set HF_HOME to another folder")
    assert outcome["exit_code"] == 2


def test_fetch_puts_the_files_into_a_folder_once_and_spares_what_is_there(
    hub: Hub, tmp_path: Path
) -> None:
    hub.has("tiny-bert", CONTENT)
    folder = tmp_path / "models" / "tiny"
    call = ("fetch_model", "tiny-bert", str(folder))
    first, second = hub.call(call, call)
    assert first["path"] == second["path"] == str(folder)
    assert len(first["said"]) == 1
    assert second["said"] == []
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        file: CONTENT[file] for file in FILES
    }
    assert not any(path.is_symlink() for path in folder.iterdir())

    (folder / "model.safetensors").unlink()  # as after a kill in the middle
    (folder / "notes.txt").write_text("mine")
    hub.server.requests.clear()
    assert hub.call(call)[0]["path"] == str(folder)
    assert (folder / "model.safetensors").read_bytes() == CONTENT["model.safetensors"]
    assert (folder / "notes.txt").read_text() == "mine"

    (folder / "config.json").write_bytes(b'{"mine": 1}')
    (outcome,) = hub.call(call)
    assert outcome["exit_code"] == 2
    assert f"'{folder / 'config.json'}' is not that of tiny-bert" in outcome["error"]
    assert (folder / "config.json").read_bytes() == b'{"mine": 1}'
    assert hub.server.requests == []


def say_nothing(line: str) -> None:
    pytest.fail(f"said {line!r}")


def test_a_folder_is_returned_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "bert-base-uncased"
    folder.mkdir()
    for file in ("config.json", "model.safetensors"):
        (folder / file).touch()
    monkeypatch.chdir(tmp_path)
    assert find_model(str(folder), say=say_nothing) == folder
    for name in ("bert-base-uncased", "./bert-base-uncased", "bert-base-uncased/"):
        assert find_model(name, say=say_nothing) == Path(name)


@pytest.mark.parametrize(
    "name", ["/none", "./none", "../none", "~/none", ".none", "a\\b", "a/b/c", "a/"]
)
def test_a_path_without_a_folder_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        find_model(name, say=say_nothing)
    assert str(caught.value) == (
        f"there is no model folder '{name}'; give one that holds config.json, model.safetensors "
        "and tokenizer.json (`twostage fetch demo` makes demo/model) or the name of a model on the "
        "Hugging Face Hub"
    )
    with pytest.raises(ModelError, match="is not the name of a model on the Hugging Face Hub"):
        fetch_model(name, say=say_nothing)


def test_a_file_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.bin").touch()
    with pytest.raises(ModelError, match=r"'a\.bin' is a file; give the folder that holds it"):
        find_model("a.bin", say=say_nothing)


@pytest.mark.parametrize(
    "name", ["", " ", "a b", "a--b", "-a", "a:b", "x" * 300, "ä", "a\nb", "a\0b"]
)
@pytest.mark.parametrize("function", [find_model, fetch_model])
def test_a_name_that_no_model_can_have_is_refused_without_asking(
    name: str, function: Callable[..., Path]
) -> None:
    with pytest.raises(ModelError) as caught:
        function(name, say=say_nothing)
    assert f"{name!r} cannot be the name of a model" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ctrl_c_passes_through(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*args: object, **settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_model("tiny-bert", say=say_nothing)
