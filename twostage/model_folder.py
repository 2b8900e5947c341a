"""The files of a model folder, and what a folder is that lacks them.

    config.json        shape of the encoder
    model.safetensors  its weights; or `model.safetensors.index.json` and the files that it lists
    tokenizer.json     the tokenizer; or `vocab.txt`. What `tokenizer_config.json`,
                       `special_tokens_map.json` and `added_tokens.json` say changes token ids

People give other folders: an adapter, weights of another framework, the folder above, what a clone
without Git LFS has left. `check_folder` tells them apart by the names of their files; nothing of
a pickle is ever read.
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import ModelError
from .printing import count, list_some, shorten, visible

SAVED_MODEL_TYPE = "twostage_bert"
"""`model_type` of a saved classifier. Not `bert`: transformers' own BERT classifier, whose head has
one layer, would load such a folder with a fresh random head, and only warn."""
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "vocab.txt")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")

_OTHER_WEIGHTS = {
    "tf_model.h5": "TensorFlow",
    "flax_model.msgpack": "Flax",
    ".ckpt.index": "TensorFlow",
    ".ckpt.meta": "TensorFlow",
    "saved_model.pb": "TensorFlow",
    "rust_model.ot": "Rust",
    ".onnx": "ONNX",
    ".gguf": "GGUF",
    ".mlmodel": "Core ML",
    "openvino_model.bin": "OpenVINO",
    ".tflite": "TensorFlow Lite",
}
EXPECTED = (
    f"give one that holds {CONFIG}, {WEIGHTS} and {TOKENIZERS[0]} (`twostage fetch demo` makes "
    "demo/model)"
)
"""What to give in the place of a folder that holds no model."""
_POINTER = b"version https://git-lfs"
_CONVERSION = (
    "import glob, torch, safetensors.torch as s; "
    "d = [torch.load(f, weights_only=True) for f in sorted(glob.glob('pytorch_model*.bin'))]; "
    "w = {k: v.clone().contiguous() for x in d for k, v in x.get('state_dict', x).items() "
    "if torch.is_tensor(v)}; s.save_file(w, 'model.safetensors', {'format': 'pt'})"
)


def check_folder(folder: Path, expected: str = EXPECTED, *, hides_hub_name: bool = False) -> None:
    """Raise ModelError for what is no folder, or none that can hold a model.

    expected: what to give instead. hides_hub_name: whether a model of the Hugging Face Hub may have
    been meant.
    """
    if folder.is_file():
        raise ModelError(f"'{folder}' is a file; give the folder that holds it")
    if not folder.is_dir():
        raise ModelError(f"there is no model folder '{folder}'; {expected}")
    names = _names_in(folder)
    has_weights = WEIGHTS in names or INDEX in names
    if CONFIG in names and has_weights:
        return
    if has_weights:
        raise ModelError(f"{folder / CONFIG} does not exist; get it where the weights are from")
    if hides_hub_name and CONFIG not in names:
        kind = "holds no model" if names else "is empty"
        expected = (
            f"this folder {kind}, and hides the model of that name on the Hugging Face Hub, if "
            "there is one: rename or remove it to get that, or give a folder that holds a model"
        )
    raise ModelError(f"{folder / WEIGHTS} does not exist; {_explain(folder, names) or expected}")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: one, or those that its index lists, all of which exist.

    Raises ModelError for an index that cannot be followed.
    """
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return [folder / WEIGHTS]
    names = shard_names(folder / INDEX)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder / INDEX} lists {count(len(names), 'file')} of weights, of which "
            f"{len(missing)} {'is' if len(missing) == 1 else 'are'} missing: "
            f"{list_some(missing, 5, ', ')}; get them again"
        )
    return [folder / name for name in names]


def shard_names(path: Path) -> list[str]:
    """The files that an index lists. Raises ModelError for what is not one."""
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map, which names the file of each tensor")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ModelError(f"{path}: '{tensor}' is said to be in {name!r}, which is no file here")
    return sorted({*weight_map.values()})


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError for all else."""
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        check_no_pointer(path)
        raise ModelError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object, but {shorten(value)}")
    return value


def check_no_pointer(path: Path) -> None:
    """Raise ModelError when Git has left a pointer where the file should be."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_POINTER)) == _POINTER
    except OSError:
        return
    if is_pointer:
        raise ModelError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs install` and `git lfs "
            "pull` in its clone, or download the file by itself"
        )


def explain_files(names: Iterable[str], folder: Path | None = None) -> str:
    """What files of these names are, if not weights that can be loaded here; "" if unknown.

    folder: where they are, None for a repository
    """
    names = {*names}
    if names & {*ADAPTERS}:
        return (
            f"there is an adapter (LoRA or the like){_base_of_adapter(folder)}, not a whole model; "
            "merge the two with peft (`merge_and_unload()`, then `save_pretrained(FOLDER)`) and "
            "give that folder"
        )
    if names & {*PICKLES}:
        if folder is None:
            return (
                "pytorch_model.bin can run code when it is read, so it is not used: "
                "convert it to safetensors, or choose another model"
            )
        return (
            "pytorch_model.bin can run code when it is read, so it is not used: convert it to "
            f"safetensors, with `cd {shlex.quote(str(folder))} && python3 -m venv /tmp/convert && "
            "/tmp/convert/bin/pip install torch safetensors numpy && /tmp/convert/bin/python -c "
            f'"{_CONVERSION}"`'
        )
    for end, framework in _OTHER_WEIGHTS.items():
        found = sorted(name for name in names if name.endswith(end))
        if found:
            return (
                f"{found[0]} holds weights for {framework}; get the model's PyTorch version "
                f"({WEIGHTS}), or choose another model"
            )
    return ""


def _explain(folder: Path, names: set[str]) -> str:
    """What a folder with files of these names is, and what to do; "" if unknown."""
    for name in sorted(names & {*PICKLES, *ADAPTERS, CONFIG}):
        check_no_pointer(folder / name)
    below = [f"'{path}'" for path in _folders_below(folder, {WEIGHTS, INDEX})]
    if below:
        return f"the model is in a folder below: give {list_some(below, 5, ' or ')}"
    exported = {path.name for path in folder.glob("onnx/*.onnx")}
    other = explain_files(names | exported, folder)
    if other:
        return other
    below = [f"'{path}'" for path in _folders_below(folder, {*PICKLES, *ADAPTERS})]
    if below:
        return f"what there is of a model is in a folder below: see {list_some(below, 5, ' or ')}"
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if weights and all("-of-" in name for name in weights):
        return f"{weights[0]} is one of several files, but {INDEX} is missing; get it again"
    if weights and WEIGHTS not in weights:
        return f"there is {list_some(weights, 5, ', ')}: rename the file of the weights"
    return ""


def _names_in(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise ModelError(f"'{folder}' cannot be read: {error.strerror or error}") from error


def _folders_below(folder: Path, files: set[str]) -> list[Path]:
    """Folders that hold one of these files, up to three folders down, as in a cache of the Hub."""
    found = {
        path.parent
        for pattern in ("*/", "*/*/", "*/*/*/")
        for file in files
        for path in folder.glob(pattern + file)
        if (path.parent / CONFIG).exists() or file in ADAPTERS
    }
    return sorted(found, key=lambda path: (len(path.parts), len(path.name), path.name))


def _base_of_adapter(folder: Path | None) -> str:
    if folder is None or not (folder / ADAPTERS[0]).is_file():
        return ""
    try:
        base = read_object(folder / ADAPTERS[0]).get("base_model_name_or_path")
    except ModelError:
        return ""
    return f" for {visible(base)}" if isinstance(base, str) and base else ""
