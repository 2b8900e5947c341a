"""Files in Hugging Face's layout, read and written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from twostage.errors import ModelError, TwoStageWarning
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
    to_stored,
)


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Checkpoint) -> Path:
    """The tiny checkpoint as transformers stores a bare BertModel."""
    stored = to_stored(tiny_checkpoint.tensors, 3)
    save_file(
        {name.removeprefix("bert."): tensor.contiguous() for name, tensor in stored.items()},
        tmp_path / "model.safetensors",
    )
    write_config(tmp_path, tiny_checkpoint)
    return tmp_path


def write_config(folder: Path, checkpoint: Checkpoint, **changes: object) -> None:
    config = {f: getattr(checkpoint.config, f) for f in checkpoint.config.__dataclass_fields__}
    config |= {"model_type": "bert", **changes}
    (folder / "config.json").write_text(json.dumps(config))


def rewrite(folder: Path, change: object) -> None:
    path = folder / "model.safetensors"
    stored = load_file(path)
    save_file(change(stored), path)  # type: ignore[operator]


def build(checkpoint: Checkpoint) -> BertClassifier:
    return build_model(checkpoint, 3, torch.Generator().manual_seed(0))


def test_models_of_one_checkpoint_share_nothing(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    a, b = build(checkpoint), build(checkpoint)
    before = checkpoint.tensors["layers.0.qkv.weight"].clone()
    with torch.no_grad():
        a.get_parameter("bert.layers.0.qkv.weight").zero_()
    assert torch.equal(checkpoint.tensors["layers.0.qkv.weight"], before)
    assert torch.equal(b.get_parameter("bert.layers.0.qkv.weight"), before)


def test_old_layer_norm_names_and_the_bert_prefix_are_read(folder: Path) -> None:
    plain = load_checkpoint(folder)

    def old_names(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        def old(name: str) -> str:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            return "bert." + name.replace("LayerNorm.bias", "LayerNorm.beta")

        extra = {
            "cls.predictions.bias": torch.zeros(3),
            "bert.embeddings.position_ids": torch.ones(1),
        }
        return {old(name): tensor for name, tensor in stored.items()} | extra

    rewrite(folder, old_names)
    loaded = load_checkpoint(folder)  # a warning would be an error
    for name, tensor in plain.tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_load_as_fp32(folder: Path, dtype: torch.dtype) -> None:
    exact = load_checkpoint(folder).tensors
    rewrite(folder, lambda stored: {name: t.to(dtype) for name, t in stored.items()})
    for name, tensor in load_checkpoint(folder).tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, exact[name].to(dtype).float())


def test_a_missing_pooler_is_drawn_and_said(folder: Path) -> None:
    rewrite(folder, lambda stored: {n: t for n, t in stored.items() if "pooler" not in n})
    with pytest.warns(TwoStageWarning, match="no pooler"):
        checkpoint = load_checkpoint(folder)
    assert 0 < build(checkpoint).bert.pooler.weight.abs().max() <= 24**-0.5


def test_unknown_tensors_are_named_in_a_warning(folder: Path) -> None:
    rewrite(folder, lambda stored: stored | {"qa_outputs.weight": torch.zeros(2)})
    with pytest.warns(TwoStageWarning, match=r"not used: qa_outputs\.weight"):
        load_checkpoint(folder)


def test_a_missing_tensor_is_an_error_that_names_it(folder: Path) -> None:
    name = "encoder.layer.1.attention.self.key.bias"
    rewrite(folder, lambda stored: {n: t for n, t in stored.items() if n != name})
    with pytest.raises(ModelError, match=name):
        load_checkpoint(folder)


def test_a_mis_shaped_tensor_is_an_error_with_both_shapes(folder: Path) -> None:
    rewrite(folder, lambda stored: stored | {"pooler.dense.bias": torch.zeros(25)})
    with pytest.raises(ModelError, match=r"pooler.dense.bias.*\[25\].*\[24\]"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "roberta"),
        ("position_embedding_type", "relative_key"),
        ("is_decoder", True),
        ("hidden_act", "silu"),
        ("num_hidden_layers", 0),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_an_unsupported_config_field_is_named(
    folder: Path, tiny_checkpoint: Checkpoint, field: str, value: object
) -> None:
    write_config(folder, tiny_checkpoint, **{field: value})
    with pytest.raises(ModelError, match=rf"config\.json.*{field}"):
        load_checkpoint(folder)


def test_a_config_without_a_needed_field_names_it(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert", "hidden_size": 24}')
    with pytest.raises(ModelError, match=r"config\.json lacks.*'vocab_size'"):
        load_checkpoint(folder)


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_config_that_is_no_json_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_checkpoint(folder)


def test_a_folder_without_weights_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors does not exist"):
        load_checkpoint(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match="convert it to safetensors"):
        load_checkpoint(folder)


def test_integer_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda stored: {name: t.to(torch.int8) for name, t in stored.items()})
    with pytest.raises(ModelError, match=r"is torch\.int8; expected fp32"):
        load_checkpoint(folder)


def test_a_file_that_is_not_safetensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"<html>not found</html>")
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load_checkpoint(folder)


def test_a_truncated_or_damaged_weights_file_is_one_sentence(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    cuts = [
        0,
        1,
        7,
        8,
        9,
        header_end - 1,
        header_end,
        header_end + 1,
        len(whole) // 2,
        len(whole) - 1,
    ]
    damaged = [whole[:cut] for cut in cuts]
    damaged += [whole + b"x", b"\xff" * 8 + whole[8:], whole[:8] + b"x" + whole[9:]]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(
            ModelError, match=r"not a readable safetensors file.*get it again"
        ) as caught:
            load_checkpoint(folder)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 3


def test_weights_that_are_not_finite_are_named_in_a_warning(folder: Path) -> None:
    name = "encoder.layer.1.output.dense.weight"

    def spoil(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        stored[name][0, 0] = float("nan")
        return stored

    rewrite(folder, spoil)
    with pytest.warns(TwoStageWarning, match=rf"not a number.*: {name}$"):
        load_checkpoint(folder)
