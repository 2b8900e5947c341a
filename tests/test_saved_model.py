"""A trained classifier, written and read back."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from twostage.data.tokenization import load_tokenizer, tokenize
from twostage.errors import ModelError, TwoStageWarning, UsageError
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import build_model, load_checkpoint
from twostage.saved_model import ModelInfo, load_model, save_model

INFO = ModelInfo(("so so", "good", "bad"), (5, 12, 3), max_length=20)


def build(folder: Path) -> BertClassifier:
    return build_model(load_checkpoint(folder), 3, torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tiny: Path, tmp_path: Path) -> Path:
    save_model(tmp_path / "saved", build(tiny), load_tokenizer(tiny), INFO)
    return tmp_path / "saved"


def test_a_saved_classifier_comes_back_with_its_head(tiny: Path, saved: Path) -> None:
    model = build(tiny)
    loaded, tokenizer, info = load_model(saved)
    assert info == INFO
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    inputs = (torch.arange(1, 9), torch.arange(8), torch.tensor([0, 8]))
    assert torch.equal(model(*inputs), loaded(*inputs))
    texts = ["Überaus gut!", "", "x " * 300]
    ids = [tokenize(t, texts, 20).ids for t in (tokenizer, load_tokenizer(tiny))]
    assert torch.equal(*ids)
    assert {path.name for path in saved.parent.iterdir()} == {"tiny", "saved"}


def test_loaded_weights_are_aligned_as_built_ones(tiny: Path, saved: Path) -> None:
    """A matrix product's last bit may depend on that; a file's tensors begin at multiples of 8."""
    in_the_file = load_file(saved / "model.safetensors").values()
    assert any(tensor.data_ptr() % 64 for tensor in in_the_file)
    loaded, _, _ = load_model(saved)
    for tensor in (*loaded.parameters(), *load_checkpoint(tiny).tensors.values()):
        assert tensor.data_ptr() % 64 == 0


def test_a_saved_classifier_is_a_checkpoint_with_the_same_encoder(tiny: Path, saved: Path) -> None:
    first = load_checkpoint(tiny)
    with pytest.warns(TwoStageWarning, match=r"not used: classifier\.0\.bias"):  # a new head comes
        second = load_checkpoint(saved)
    assert first.config == second.config
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[name]), name


def test_the_real_minilm_survives_load_save_load(demo_folder: Path, tmp_path: Path) -> None:
    source = demo_folder / "model"
    save_model(tmp_path / "saved", build(source), load_tokenizer(source), INFO)
    original = load_file(source / "model.safetensors")
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    original.pop("embeddings.position_ids")
    assert {f"bert.{name}" for name in original} | {
        f"classifier.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")
    } == stored.keys()
    for name, tensor in original.items():
        assert torch.equal(stored[f"bert.{name}"], tensor), name


def test_transformers_refuses_a_saved_classifier_instead_of_dropping_its_head(saved: Path) -> None:
    with pytest.raises(ValueError, match="twostage_bert"):
        transformers.AutoModelForSequenceClassification.from_pretrained(saved)


def test_a_head_that_lacks_a_tensor_is_refused(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    del stored["classifier.0.bias"]
    save_file(stored, saved / "model.safetensors")
    with pytest.raises(ModelError, match=r"'classifier\.0\.bias' is missing"):
        load_model(saved)


@pytest.mark.parametrize(
    "change", [{"max_length": "x"}, {"class_counts": [1]}, {"id2label": {}, "class_counts": []}]
)
def test_a_broken_description_is_refused(saved: Path, change: dict[str, object]) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=r"config\.json does not describe a trained classifier"):
        load_model(saved)


def test_a_folder_that_is_no_classifier_is_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not describe a trained classifier"):
        load_model(tiny)
    with pytest.raises(ModelError, match="there is no model folder"):
        load_model(tmp_path / "absent")


def test_a_save_that_fails_leaves_the_earlier_model_whole(
    tiny: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(self: Path, *rest: object, **kw: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(UsageError, match=r"cannot write '.*saved': No space left on device"):
        save_model(saved, build(tiny), load_tokenizer(tiny), INFO)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert {path.name for path in saved.parent.iterdir()} == {"tiny", "saved"}


def test_half_precision_files_load_as_fp32(saved: Path) -> None:
    stored = load_file(saved / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in stored.items()}
    save_file(halves, saved / "model.safetensors")
    model = load_model(saved)[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    weights = model.state_dict()
    assert torch.equal(weights["classifier.2.weight"], halves["classifier.2.weight"].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_length": 513}, r"config\.json: max_length is 513, but there are 512 positions"),
        ({"vocab_size": 30_000}, r"gives id 30521 to token .* vocab_size 30000"),
        ({"vocab_size": 31_000}, r"shape \[30522, 32\]; config\.json asks for \[31000, 32\]"),
    ],
)
def test_a_description_that_does_not_fit_the_weights_is_refused(
    saved: Path, change: dict[str, object], message: str
) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=message):
        load_model(saved)


def test_saving_again_replaces_the_folder(tiny: Path, saved: Path) -> None:
    (saved / "stray").touch()
    save_model(saved, build(tiny), load_tokenizer(tiny), replace(INFO, max_length=9))
    assert load_model(saved)[2].max_length == 9
    assert {path.name for path in saved.parent.iterdir()} == {"tiny", "saved"}
    assert not (saved / "stray").exists()


def test_a_rename_that_fails_loses_no_model(
    tiny: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (saved / "model.safetensors").read_bytes()
    original = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return original(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UsageError, match="Input/output error"):
        save_model(saved, build(tiny), load_tokenizer(tiny), INFO)
    assert (saved.with_name("saved.earlier") / "model.safetensors").read_bytes() == before
