"""A trained classifier on disk, in Hugging Face layout.

    config.json         shape of the encoder, classes and their training rows, length of texts
    model.safetensors   fp32: the encoder under transformers' names (`bert.*`) and the recipe's
                        head, `classifier.0` and `classifier.2`
    tokenizer.json      without truncation and padding; tokenizer_config.json says how to read it

It serves as a checkpoint to start from as well; a new head then takes the place of the old one.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from .data.tokenization import check_vocabulary, load_tokenizer
from .data.tokenizer_files import describe_settings
from .errors import ModelError, UsageError, writing_to
from .model.assembly import assemble_classifier
from .model.bert import BertClassifier
from .model.checkpoint import (
    from_stored,
    read_config,
    read_tensors,
    to_stored,
)
from .model_folder import CONFIG, SAVED_MODEL_TYPE, WEIGHTS, check_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class ModelInfo:
    """What a saved classifier's `config.json` tells beside the shape of its encoder."""

    class_names: tuple[str, ...]
    """Of classes 0 … C-1; `id2label` in the file."""
    class_counts_C: tuple[int, ...]
    """Training rows of each class."""
    max_length: int
    """Tokens at which texts were cut in training."""


def save_model(
    folder: Path, classifier: BertClassifier, tokenizer: "Tokenizer", info: ModelInfo
) -> None:
    """Write the folder, or replace it; built beside its place, so that it is whole or not there.

    Raises UsageError when it cannot be written.
    """
    partial, earlier = (folder.with_name(folder.name + end) for end in (".partial", ".earlier"))
    with writing_to(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            _write_weights(partial / WEIGHTS, classifier)
            description = json.dumps(_describe(classifier, info), indent=2) + "\n"
            (partial / CONFIG).write_text(description, encoding="utf-8")
            (partial / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            settings = json.dumps(describe_settings(tokenizer), indent=2) + "\n"
            (partial / "tokenizer_config.json").write_text(settings, encoding="utf-8")
            shutil.rmtree(earlier, ignore_errors=True)
            if folder.exists():
                folder.replace(earlier)
            partial.replace(folder)
            shutil.rmtree(earlier, ignore_errors=True)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def load_model(folder: Path) -> tuple[BertClassifier, "Tokenizer", ModelInfo]:
    """A classifier that `save_model` wrote. Raises ModelError for a folder that is not one."""
    check_folder(
        folder,
        "give one that `twostage train --save-models` wrote, such as results/seed-7",
    )
    config, description = read_config(folder / CONFIG)
    info = _read_info(description, folder / CONFIG)
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, config.vocab_size, folder)
    if info.max_length > config.max_position_embeddings:
        raise ModelError(
            f"{folder / CONFIG}: max_length is {info.max_length}, but there are "
            f"{config.max_position_embeddings} positions"
        )
    stored = read_tensors(folder)
    head = {name: stored.pop(name) for name in list(stored) if name.startswith("classifier.")}
    encoder = from_stored(stored, config, str(folder))
    tensors = {f"bert.{name}": tensor for name, tensor in encoder.items()}
    with torch.device("meta"):
        expected = dict(BertClassifier(config, len(info.class_names)).named_parameters())
    for name, parameter in expected.items():
        if name in tensors:
            continue
        if name not in head or head[name].shape != parameter.shape:
            raise ModelError(
                f"the weights of '{folder}': '{name}' is missing or does not have shape "
                f"{list(parameter.shape)}; expected a folder that twostage saved"
            )
        tensors[name] = head[name].to(torch.float32, copy=True)
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    return assemble_classifier(config, parameters), tokenizer, info


def _write_weights(path: Path, classifier: BertClassifier) -> None:
    state = {name: tensor.detach().cpu() for name, tensor in classifier.state_dict().items()}
    encoder = {
        name.removeprefix("bert."): t for name, t in state.items() if name.startswith("bert.")
    }
    stored = to_stored(encoder, classifier.bert.config.num_hidden_layers)
    stored |= {name: t for name, t in state.items() if name.startswith("classifier.")}
    contiguous = {name: tensor.contiguous() for name, tensor in stored.items()}
    try:
        save_file(contiguous, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UsageError(f"cannot write '{path}': {error}") from error


def _describe(classifier: BertClassifier, info: ModelInfo) -> dict[str, Any]:
    return {
        "model_type": SAVED_MODEL_TYPE,
        "architectures": ["BertClassifier"],
        **asdict(classifier.bert.config),
        "id2label": {str(i): name for i, name in enumerate(info.class_names)},
        "label2id": {name: i for i, name in enumerate(info.class_names)},
        "class_counts": list(info.class_counts_C),
        "max_length": info.max_length,
    }


def _read_info(description: dict[str, Any], path: Path) -> ModelInfo:
    names: Any = description.get("id2label")
    counts: Any = description.get("class_counts")
    max_length: Any = description.get("max_length")
    if (
        not isinstance(names, dict)
        or len(names) < 2
        or list(names) != [str(i) for i in range(len(names))]
        or not isinstance(counts, list)
        or len(counts) != len(names)
        or not all(isinstance(number, int) and number > 0 for number in [*counts, max_length])
    ):
        raise ModelError(
            f"{path} does not describe a trained classifier (id2label, class_counts, max_length); "
            "expected a folder that `twostage train --save-models` wrote"
        )
    return ModelInfo(tuple(map(str, names.values())), tuple(counts), max_length)
