"""Hugging Face checkpoints: `config.json` and safetensors files to and from our parameters.

One table names each of our parameters and the tensors that it is stored as. Loading reads the table
from right to left, saving from left to right; both are exact. The only parameter that is stored in
pieces is `qkv`, which concatenates query, key and value along its rows, so that one matrix
product serves all three.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError, TwoStageWarning
from ..model_folder import (
    CONFIG,
    SAVED_MODEL_TYPE,
    check_folder,
    check_no_pointer,
    read_object,
    weight_files,
)
from .assembly import assemble_classifier
from .bert import HEAD_SIZE, BertClassifier
from .config import BertConfig

ACTIVATION_SYNONYMS = {
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_accurate": "gelu_new",
}
"""Other names of `hidden_act`: the same functions, written differently in transformers."""
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FIRST_TENSOR = "embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Checkpoint:
    """A pretrained encoder in memory: read once, a fresh model from it for each seed."""

    config: BertConfig
    tensors: dict[str, Tensor]
    """Our names (those of `Bert`) to fp32 tensors. Models get copies: these never change."""


def tensor_names(num_layers: int) -> list[tuple[str, tuple[str, ...]]]:
    """The table: (name of our parameter, names it is stored under, concatenated in this order)."""
    table: list[tuple[str, tuple[str, ...]]] = [
        ("embeddings.word.weight", ("embeddings.word_embeddings.weight",)),
        ("embeddings.position.weight", ("embeddings.position_embeddings.weight",)),
        ("embeddings.token_type.weight", ("embeddings.token_type_embeddings.weight",)),
        ("embeddings.norm.weight", ("embeddings.LayerNorm.weight",)),
        ("embeddings.norm.bias", ("embeddings.LayerNorm.bias",)),
        ("pooler.weight", ("pooler.dense.weight",)),
        ("pooler.bias", ("pooler.dense.bias",)),
    ]
    for i in range(num_layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            qkv = tuple(f"{theirs}.attention.self.{x}.{kind}" for x in ("query", "key", "value"))
            table += [
                (f"{ours}.qkv.{kind}", qkv),
                (f"{ours}.attention_output.{kind}", (f"{theirs}.attention.output.dense.{kind}",)),
                (f"{ours}.attention_norm.{kind}", (f"{theirs}.attention.output.LayerNorm.{kind}",)),
                (f"{ours}.intermediate.{kind}", (f"{theirs}.intermediate.dense.{kind}",)),
                (f"{ours}.output.{kind}", (f"{theirs}.output.dense.{kind}",)),
                (f"{ours}.output_norm.{kind}", (f"{theirs}.output.LayerNorm.{kind}",)),
            ]
    return table


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read a BERT-style model: `config.json` and safetensors of fp32, fp64, fp16 or bf16.

    Raises ModelError, naming the file and the field or tensor, for what is missing, mis-shaped or
    not supported.
    """
    folder = Path(folder)
    check_folder(folder)
    config, _ = read_config(folder / CONFIG)
    return load_weights(folder, config)


def load_weights(folder: Path, config: BertConfig) -> Checkpoint:
    """The weights of a folder whose `config.json` has been read. Raises ModelError."""
    return Checkpoint(config, from_stored(read_tensors(folder), config, str(folder)))


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files. Raises ModelError for what cannot be read."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            check_no_pointer(path)
            raise ModelError(
                f"{path} is not a readable safetensors file ({error}); get it again"
            ) from error
    return tensors


def read_config(path: Path) -> tuple[BertConfig, dict[str, Any]]:
    """Read and check `config.json`; what this encoder does not implement is a ModelError.

    Returns the configuration and the whole object.
    """
    raw = read_object(path)
    supported = {
        "model_type": ("bert", SAVED_MODEL_TYPE),
        "position_embedding_type": ("absolute",),
        "is_decoder": (False,),
        "add_cross_attention": (False,),
    }
    for name, values in supported.items():
        if raw.get(name) is not None and raw[name] not in values:
            raise ModelError(
                f"{path}: {name} is {raw[name]!r}; supported: {', '.join(map(repr, values))}"
            )
    if raw.get("pruned_heads"):
        raise ModelError(f"{path}: pruned_heads is set; pruned encoders are not supported")
    known = {field.name for field in fields(BertConfig)}
    shape = {name: value for name, value in raw.items() if name in known}
    if isinstance(raw.get("hidden_act"), str):
        shape["hidden_act"] = ACTIVATION_SYNONYMS.get(raw["hidden_act"], raw["hidden_act"])
    try:
        return BertConfig(**shape), raw
    except TypeError as error:  # a field without default is missing; Python's message names it
        missing = str(error).split("argument")[-1].lstrip("s: ")
        raise ModelError(f"{path} lacks {missing}") from None
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None


def from_stored(stored: Mapping[str, Tensor], config: BertConfig, folder: str) -> dict[str, Tensor]:
    """Stored tensors to our names, in fp32, copied to memory of our own.

    (In the file they begin at any multiple of 8 bytes; torch aligns its memory to 64, and a product
    with one row may differ in the last bit between the two.)

    folder: for messages. Warns of a missing pooler, which is left out (`build_model`
    then initialises it), of tensors that have no place here and of weights that are not finite.
    """
    source = f"the weights of '{folder}'"
    by_name = {_modern_name(name): tensor for name, tensor in stored.items()}
    if FIRST_TENSOR not in by_name:
        raise ModelError(f"{source} {_explain_names(stored)}")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in BertClassifier(config, 2).bert.named_parameters()}
    tensors: dict[str, Tensor] = {}
    used: set[str] = set()
    broken: list[str] = []
    has_pooler = "pooler.dense.weight" in by_name
    for ours, theirs in tensor_names(config.num_hidden_layers):
        missing = [name for name in theirs if name not in by_name]
        if ours.startswith("pooler.") and not has_pooler:
            continue
        if missing:
            raise ModelError(f"{source} have no tensor '{missing[0]}'")
        part_shape = (shapes[ours][0] // len(theirs), *shapes[ours][1:])
        for name in theirs:
            if tuple(by_name[name].shape) != part_shape:
                raise ModelError(
                    f"{source}: '{name}' has shape {list(by_name[name].shape)}; "
                    f"config.json asks for {list(part_shape)}"
                )
            if by_name[name].dtype not in DTYPES:
                raise ModelError(
                    f"{source}: '{name}' is {by_name[name].dtype}; expected fp32, fp64, fp16 or "
                    "bf16"
                )
        parts = [by_name[name].to(torch.float32) for name in theirs]
        tensors[ours] = torch.cat(parts)
        used.update(theirs)
        if not torch.isfinite(tensors[ours]).all():
            broken += [n for n, p in zip(theirs, parts, strict=True) if not p.isfinite().all()]
    if not has_pooler:
        warnings.warn(
            f"'{folder}' has no pooler: it starts from random weights",
            TwoStageWarning,
            stacklevel=3,
        )
    if broken:
        warnings.warn(
            f"{source} are infinite or not a number in places, and so will be what they compute: "
            f"{_shorten(sorted(broken))}",
            TwoStageWarning,
            stacklevel=3,
        )
    ignored = sorted(
        name
        for name in by_name.keys() - used
        if name != "embeddings.position_ids" and not name.startswith("cls.")
    )
    if ignored:
        warnings.warn(
            f"{source} hold tensors that are not used: {_shorten(ignored)}",
            TwoStageWarning,
            stacklevel=3,
        )
    return tensors


def _explain_names(stored: Mapping[str, Tensor]) -> str:
    """Why no tensor is named as a BERT's word embeddings are."""
    for name in stored:
        if name.endswith(FIRST_TENSOR):
            return (
                f"are named with the prefix '{name.removesuffix(FIRST_TENSOR)}'; expected 'bert.' "
                "or none: save the BERT that is inside, or strip the prefix if it is one"
            )
    some = f"; theirs are {_shorten(sorted(stored))}" if stored else " or any other"
    return f"have no tensor '{FIRST_TENSOR}'{some}"


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")


def to_stored(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our names to `bert.*` names as transformers stores them: the inverse of `from_stored`."""
    stored: dict[str, Tensor] = {}
    for ours, theirs in tensor_names(num_layers):
        for name, part in zip(theirs, tensors[ours].chunk(len(theirs)), strict=True):
            stored[f"bert.{name}"] = part
    return stored


def build_model(
    checkpoint: Checkpoint, num_classes: int, generator: torch.Generator
) -> BertClassifier:
    """A classifier with copies of the pretrained weights; its head is drawn from `generator`."""
    hidden = checkpoint.config.hidden_size
    tensors = {f"bert.{name}": tensor.clone() for name, tensor in checkpoint.tensors.items()}
    new = [("classifier.0", HEAD_SIZE, hidden), ("classifier.2", num_classes, HEAD_SIZE)]
    if "pooler.weight" not in checkpoint.tensors:
        new.append(("bert.pooler", hidden, hidden))
    for name, out_features, in_features in new:
        weight, bias = initialize_linear(out_features, in_features, generator)
        tensors |= {f"{name}.weight": weight, f"{name}.bias": bias}
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    return assemble_classifier(checkpoint.config, parameters)


def initialize_linear(
    out_features: int, in_features: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weight and bias as torch.nn.Linear draws them: from U(-1/√in, 1/√in), by `generator`.

    (Its Kaiming-uniform initialisation with a = √5 comes to the same bound.)
    """
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return weight, bias


def _modern_name(name: str) -> str:
    """The name in a bare `BertModel` of today: no `bert.` prefix, LayerNorm weight and bias."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace(
        "LayerNorm.beta", "LayerNorm.bias"
    )
