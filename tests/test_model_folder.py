"""The containers that weights come in, and folders that hold no model."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from twostage.assets.hub import find_model
from twostage.cli import main
from twostage.data.containers import Table
from twostage.data.packing import pack
from twostage.data.token_store import TokenStore
from twostage.errors import ModelError, TwoStageWarning
from twostage.kernels.attention import packed_layout
from twostage.model.checkpoint import build_model, load_checkpoint
from twostage.model_folder import INDEX, WEIGHTS, check_folder
from twostage.preparation import prepare_run
from twostage.recipe import Recipe
from twostage.saved_model import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 90868376\n"
DATA = "text,label\n" + "a fine film,1\n" * 9 + "dull,0\n" * 3


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder).tensors


def shard(folder: Path) -> dict[str, str]:
    """Divide the weights among three files; returns the map of the index."""
    stored = load_file(folder / WEIGHTS)
    names = [f"model-{i}-of-00003.safetensors" for i in ("00001", "00002", "00003")]
    weight_map = {tensor: names[i % 3] for i, tensor in enumerate(sorted(stored))}
    for name in names:
        save_file({t: stored[t] for t in stored if weight_map[t] == name}, folder / name)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0


def test_shards_load_as_one_file(tiny: Path) -> None:
    whole = tensors_of(tiny)
    shard(tiny)
    assert_equal(tensors_of(tiny), whole)


def test_shards_as_transformers_writes_them_load(tiny: Path) -> None:
    whole = tensors_of(tiny)
    model = transformers.BertModel.from_pretrained(tiny)
    (tiny / WEIGHTS).unlink()
    model.save_pretrained(tiny, max_shard_size="200KB")
    assert (tiny / INDEX).exists()
    assert_equal(tensors_of(tiny), whole)


def test_a_missing_shard_is_named(tiny: Path) -> None:
    shard(tiny)
    (tiny / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"lists 3 files.*1 is missing: model-00002-of-00003"):
        load_checkpoint(tiny)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", None, 3])
def test_an_index_cannot_point_out_of_its_folder(tiny: Path, name: object) -> None:
    weight_map: dict[str, object] = {**shard(tiny)}
    weight_map["embeddings.word_embeddings.weight"] = name
    (tiny / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"'embeddings\.word_embeddings\.weight' is said to be in"):
        load_checkpoint(tiny)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{"])
def test_a_broken_index_is_named(tiny: Path, content: str) -> None:
    shard(tiny)
    (tiny / INDEX).write_text(content)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
        load_checkpoint(tiny)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_float_loads_as_fp32(tiny: Path, dtype: torch.dtype) -> None:
    exact = tensors_of(tiny)
    stored = {name: tensor.to(dtype) for name, tensor in load_file(tiny / WEIGHTS).items()}
    save_file(stored, tiny / WEIGHTS)
    assert_equal(tensors_of(tiny), {name: t.to(dtype).float() for name, t in exact.items()})


def test_fp64_beyond_fp32_is_noted(tiny: Path) -> None:
    stored = {name: tensor.double() for name, tensor in load_file(tiny / WEIGHTS).items()}
    stored["encoder.layer.1.attention.self.key.bias"][0] = 1e60
    save_file(stored, tiny / WEIGHTS)
    with pytest.warns(TwoStageWarning, match=r"infinite.*: encoder\.layer\.1.*key\.bias$"):
        load_checkpoint(tiny)


@pytest.mark.parametrize(
    "name",
    ["gelu", "gelu_python", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "relu"],
)
def test_activations_by_any_name_equal_transformers(tiny: Path, name: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"hidden_act": name}))
    with torch.no_grad():
        for parameter in (reference := transformers.BertModel.from_pretrained(tiny)).parameters():
            parameter.mul_(5)  # far enough from 0 for the functions to differ
    reference.save_pretrained(tiny)
    ours = build_model(load_checkpoint(tiny), 2, torch.Generator())
    ids = torch.arange(1_000, 1_012)
    batch = pack(TokenStore(ids.int(), torch.tensor([0, 12])), torch.tensor([0]), round_to=1)
    layout = packed_layout(batch.cu_seqlens)
    hidden_TD = ours.bert(batch.input_ids_T, batch.position_ids_T, layout)
    theirs = reference.eval()(ids[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden_TD, theirs, rtol=1e-4, atol=1e-5)


def adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_model.safetensors").touch()
    base = {"base_model_name_or_path": "bert-base-uncased"}
    (folder / "adapter_config.json").write_text(json.dumps(base))


def lfs_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_text(POINTER)


def lfs_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text(POINTER)


def lfs_config(folder: Path) -> None:
    (folder / "config.json").write_text(POINTER)


def tensorflow(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "tf_model.h5")


def google(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "bert_model.ckpt.index").touch()


def onnx(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.onnx")


def pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def shards_of_pickles(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin.index.json").touch()


def lfs_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_text(POINTER)


def exported(folder: Path) -> None:
    (folder / "onnx").mkdir()
    (folder / WEIGHTS).rename(folder / "onnx" / "model.onnx")


def shard_alone(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def pickle_below(folder: Path) -> None:
    pickle(folder)
    into_folder(folder, folder / "checkpoint-500")


def adapter_below(folder: Path) -> None:
    adapter(folder)
    into_folder(folder, folder / "checkpoint-500")


def pickle_above(folder: Path) -> None:
    into_folder(folder, folder / "checkpoint-500")
    (folder / "pytorch_model.bin").touch()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "pytorch_model.bin").touch()  # which is not what the folder lacks


def other_name(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "bert.safetensors")


def one_level_up(folder: Path) -> None:
    into_folder(folder, folder / "checkpoint-500")


def two_levels_up(folder: Path) -> None:
    into_folder(folder, folder / "snapshots" / "0123")


def cache_root(folder: Path) -> None:
    into_folder(folder, folder / "models--ann--tiny" / "snapshots" / "0123")


def into_folder(folder: Path, target: Path) -> None:
    files = list(folder.iterdir())
    target.mkdir(parents=True)
    for path in files:
        path.rename(target / path.name)


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def distilbert(folder: Path) -> None:
    change_config(folder, model_type="distilbert")


def roberta(folder: Path) -> None:
    change_config(folder, model_type="roberta")


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def prefixed(prefix: str) -> Callable[[Path], None]:
    def rename(folder: Path) -> None:
        stored = load_file(folder / WEIGHTS)
        stored = {name: t for name, t in stored.items() if "pooler" not in name}
        save_file({prefix + name: tensor for name, tensor in stored.items()}, folder / WEIGHTS)

    rename.__name__ = f"prefix {prefix}"
    return rename


def foreign_names(folder: Path) -> None:
    save_file({"wte.weight": torch.zeros(2)}, folder / WEIGHTS)


def smaller(folder: Path) -> None:
    stored = load_file(folder / WEIGHTS)
    stored["embeddings.word_embeddings.weight"] = stored["embeddings.word_embeddings.weight"][:99]
    save_file(stored, folder / WEIGHTS)
    change_config(folder, vocab_size=99)


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (adapter, r"an adapter \(LoRA or the like\) for bert-base-uncased.*merge_and_unload"),
    (lfs_weights, r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    (lfs_tokenizer, r"tokenizer\.json is a Git LFS pointer.*git lfs pull"),
    (lfs_config, r"config\.json is a Git LFS pointer.*git lfs pull"),
    (tensorflow, r"tf_model\.h5 holds weights for TensorFlow; get the model's PyTorch version"),
    (google, r"bert_model\.ckpt\.index holds weights for TensorFlow"),
    (onnx, r"model\.onnx holds weights for ONNX"),
    (pickle, r"pytorch_model\.bin can run code.*`cd /.* && python3 -m venv .*torch\.load"),
    (shards_of_pickles, "pytorch_model.bin can run code"),
    (lfs_pickle, r"pytorch_model\.bin is a Git LFS pointer"),
    (exported, r"model\.onnx holds weights for ONNX"),
    (shard_alone, r"model-00001-of-00003\.safetensors is one of several files.*index.*missing"),
    (no_config, r"/config\.json does not exist; get it where the weights are from"),
    (other_name, r"there is bert\.safetensors: rename"),
    (one_level_up, r"the model is in a folder below: give '.*/tiny/checkpoint-500'$"),
    (two_levels_up, r"the model is in a folder below: give '.*/tiny/snapshots/0123'$"),
    (cache_root, r"give '.*/tiny/models--ann--tiny/snapshots/0123'$"),
    (pickle_below, r"what there is of a model is in a folder below: see '.*/checkpoint-500'$"),
    (adapter_below, r"what there is of a model is in a folder below: see '.*/checkpoint-500'$"),
    (pickle_above, r"the model is in a folder below: give '.*/checkpoint-500'$"),
    (nothing, r"model\.safetensors does not exist; give one that holds config\.json"),
    (no_tokenizer, r"has neither tokenizer\.json nor vocab\.txt"),
    (distilbert, "model_type is 'distilbert'; supported: 'bert'"),
    (roberta, "model_type is 'roberta'; supported: 'bert'"),
    (
        prefixed("module.bert."),
        r"named with the prefix 'module\.bert\.'; expected 'bert\.' or none",
    ),
    (prefixed("electra."), r"named with the prefix 'electra\.'"),
    (prefixed("bert.bert."), r"named with the prefix 'bert\.bert\.'"),
    (
        foreign_names,
        r"have no tensor 'embeddings\.word_embeddings\.weight'; theirs are wte\.weight",
    ),
    (smaller, r"gives id 30521 to token '##～'.*vocab_size 99, so ids end at 98; 30,423 tokens"),
]


@pytest.mark.parametrize(("spoil", "message"), WRONG, ids=[spoil.__name__ for spoil, _ in WRONG])
def test_a_wrong_folder_is_told_for_what_it_is_before_all_else(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(tiny)
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").write_text(DATA)
    output = tmp_path / "out"
    assert main(["train", "-d", str(tmp_path), "-o", str(output), "--model", str(tiny)]) == 3
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(rf"twostage: error: .*{message}.*\n", said.err)
    assert not output.exists()


def test_an_adapter_beside_the_name_of_no_base_is_one_too(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(ModelError, match=r"an adapter \(LoRA or the like\), not a whole model"):
        check_folder(tmp_path)


def test_a_folder_can_hide_a_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("bert-base-uncased", "ann/tiny"):
        Path(name).mkdir(parents=True)
        with pytest.raises(ModelError, match="is empty, and hides the model of that name on the"):
            find_model(name)
    Path("ann/tiny/notes.txt").touch()
    with pytest.raises(ModelError, match="holds no model, and hides"):
        find_model("ann/tiny")
    for path in ("./ann/tiny", "ann/tiny/", str(tmp_path / "ann")):
        with pytest.raises(ModelError, match=r"does not exist; give one that holds config\.json"):
            find_model(path)
    with pytest.raises(ModelError, match="does not exist; give one that `twostage train --save"):
        load_model(Path("ann/tiny"))


def test_a_file_or_nothing_is_no_folder(tiny: Path) -> None:
    for load in (load_checkpoint, load_model):
        with pytest.raises(ModelError, match=r"model\.safetensors' is a file; give the folder"):
            load(tiny / WEIGHTS)
        with pytest.raises(ModelError, match=r"there is no model folder '.*none'; give one"):
            load(tiny / "none")


def test_the_folder_of_a_run_names_the_models_in_it(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "results"
    run.mkdir()
    for seed in ("seed-7", "seed-42"):
        (run / seed).mkdir()
        for path in tiny.iterdir():
            (run / seed / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match=r"give '.*results/seed-7' or '.*results/seed-42'$"):
        load_model(run)


def test_the_command_that_converts_a_pickle_makes_a_folder_that_loads(tiny: Path) -> None:
    expected = tensors_of(tiny)
    stored = load_file(tiny / WEIGHTS)
    (tiny / WEIGHTS).unlink()
    names = sorted(stored)
    torch.save({name: stored[name] for name in names[::2]}, tiny / "pytorch_model-00001.bin")
    whole = {"state_dict": {name: stored[name] for name in names[1::2]}, "epoch": 3}
    torch.save(whole, tiny / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_checkpoint(tiny)
    (command,) = re.findall(r'/python -c ("[^"]*")`', str(caught.value))
    # The environment that the command makes first is left out: it would be downloaded.
    script = f"cd '{tiny}' && {sys.executable} -c {command}"
    subprocess.run(script, shell=True, check=True, env=os.environ)
    assert_equal(tensors_of(tiny), expected)


@pytest.mark.parametrize("spoil", [prefixed("module."), no_tokenizer, distilbert, smaller])
def test_no_note_comes_before_the_error(tiny: Path, spoil: Callable[[Path], None]) -> None:
    stored = load_file(tiny / WEIGHTS)  # of which two things would be noted
    stored = {name: tensor for name, tensor in stored.items() if "pooler" not in name}
    save_file(stored | {"unused": torch.zeros(1)}, tiny / WEIGHTS)
    spoil(tiny)
    table = Table(["a", "b"], ["x", "y"])
    with pytest.raises(ModelError):
        prepare_run(tiny, table, table, Recipe())  # a warning would be an error
