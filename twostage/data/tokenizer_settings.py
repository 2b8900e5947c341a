"""The settings of a model folder's tokenizer: what the files beside the vocabulary say.

tokenizer_config.json has the class, the treatment of capitals, accents and Chinese characters, the
names of special tokens, tokens with their ids (`added_tokens_decoder`), `split_special_tokens`.
Where it has no `added_tokens_decoder`, two older files count as well. special_tokens_map.json names
special tokens, before tokenizer_config.json does; added_tokens.json has tokens with their ids.

What would change ids and is not followed is refused by name. That includes what is said twice and
not alike: which of them counts differs between versions of transformers.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ModelError
from ..model_folder import CONFIG, SAVED_MODEL_TYPE, read_object
from ..printing import as_json, quoted

if TYPE_CHECKING:
    from tokenizers import AddedToken

BERT_CLASSES = ("BertTokenizer", "DistilBertTokenizer")
"""Classes of transformers that build BERT's tokenizer around a vocabulary."""
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes of transformers that take tokenizer.json as it is."""
SPECIAL_TOKENS = {
    "bos_token": None,
    "eos_token": None,
    "unk_token": "[UNK]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "cls_token": "[CLS]",
    "mask_token": "[MASK]",
}
"""Settings that name special tokens, with BERT's defaults, in the order that numbers them."""
TEXT_SETTINGS = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
"""Settings of the normalizer: true or false; `strip_accents` may be null, then case decides."""

# Settings that would change ids, and the values that they may have besides null.
_SUPPORTED: dict[str, list[object]] = {
    "do_basic_tokenize": [True],
    "clean_text": [True],
    "wordpieces_prefix": ["##"],
    "truncation_side": ["right"],
    "init_inputs": [[]],
    "fast_tokenizer_files": [[], ["tokenizer.json"]],
    "auto_map": [],
    "trust_remote_code": [False],
    "vocab": [],
    "post_processor": [],
    "tokenizer_truncation": [],
    "tokenizer_padding": [],
    "add_special_tokens": [],
}


class TokenizerSettings(NamedTuple):
    """What the files beside the vocabulary say."""

    path: Path
    """tokenizer_config.json, which need not exist."""
    values: dict[str, Any]
    """The content of tokenizer_config.json."""
    is_plain: bool
    """Whether tokenizer.json is taken as it is."""
    named: "dict[str, AddedToken | None]"
    """Special tokens by their settings, as far as a file names them; None: there is none."""
    extra: "list[AddedToken]"
    """Special tokens without a setting of their own."""
    added: "dict[int, AddedToken]"
    """Tokens by the ids that the file which counts gives them."""
    listed: "dict[int, AddedToken]"
    """Tokens by the ids that added_tokens.json gives them, whether it counts or not."""
    num_rows: int | None
    """Word embeddings of the model, if config.json is there and says it."""

    @property
    def has_decoder(self) -> bool:
        """Whether tokenizer_config.json has `added_tokens_decoder`, so that it alone counts."""
        return "added_tokens_decoder" in self.values

    def name_of(self, setting: str) -> str:
        """The special token of `setting`."""
        token = self.named.get(setting)
        return str(SPECIAL_TOKENS[setting] if token is None else token.content)


def read_settings(folder: Path) -> TokenizerSettings:
    """Read the three files. Raises ModelError, by file and setting, for what is not followed."""
    path, map_path = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    values = read_object(path) if path.exists() else {}
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    is_plain = _is_plain(values, path, config, folder / CONFIG)
    _check_values(values, path)
    has_decoder = "added_tokens_decoder" in values
    in_map = read_object(map_path) if map_path.exists() and not has_decoder else {}
    extra, with_names = _extra_tokens(values, in_map, path)
    named = _named_tokens(values, in_map, path, map_path)
    named |= {name: read_token(token, path, name) for name, token in with_names.items()}
    added_path = folder / "added_tokens.json"
    listed: dict[int, AddedToken] = {}
    if added_path.exists():
        # transformers looks for their names where they are plain strings, and not everywhere.
        plain = [] if "additional_special_tokens" in in_map else extra
        special = {t for t in (*values.values(), *in_map.values(), *plain) if isinstance(t, str)}
        special |= {token.content for name, token in named.items() if token and name in in_map}
        listed = _read_added_tokens(added_path, special)
    num_rows = config.get("vocab_size")
    return TokenizerSettings(
        path,
        values,
        is_plain,
        named,
        [read_token(token, path, "extra_special_tokens") for token in extra],
        _read_decoder(values["added_tokens_decoder"], path) if has_decoder else listed,
        listed,
        num_rows if isinstance(num_rows, int) else None,
    )


def read_token(value: object, path: Path, name: str) -> "AddedToken":
    """A token as a setting has it: its text, or an object that says how it is matched."""
    from tokenizers import AddedToken

    fields = {"content": value, "special": True} if isinstance(value, str) else value
    fields = dict(fields) if isinstance(fields, dict) else {}
    fields.pop("__type", None)
    try:
        return AddedToken(fields.pop("content"), **fields)
    except (KeyError, TypeError, UnicodeEncodeError):
        raise ModelError(
            f"{path}: {name} is {as_json(value)}; expected a token, or an object with content, "
            "lstrip, rstrip, single_word, normalized and special"
        ) from None


def _is_plain(
    values: dict[str, Any], path: Path, config: dict[str, Any], config_path: Path
) -> bool:
    """Whether tokenizer.json is taken as it is. Raises ModelError for a class not BERT's."""
    name = values.get("tokenizer_class")
    if name is None and config.get("tokenizer_class") is not None:
        name, path = config["tokenizer_class"], config_path
    if name is None:
        # Folders that we saved before they had a tokenizer_config.json.
        return not path.exists() and config.get("model_type") == SAVED_MODEL_TYPE
    for classes, is_plain in ((BERT_CLASSES, False), (PLAIN_CLASSES, True)):
        if name in classes or name in [f"{known}Fast" for known in classes]:
            return is_plain
    raise ModelError(
        f"{path}: tokenizer_class is {as_json(name)}; expected BERT's word pieces, by "
        f"{', '.join(BERT_CLASSES)} or {PLAIN_CLASSES[0]}"
    )


def _check_values(values: dict[str, Any], path: Path) -> None:
    """Raise ModelError for settings of the wrong type, and for those that are not followed."""
    for name in (*TEXT_SETTINGS, "split_special_tokens"):
        value = values.get(name, False)
        if not isinstance(value, bool) and (value is not None or name != "strip_accents"):
            raise ModelError(
                f"{path}: {name} is {as_json(value)}, of the wrong type; expected true or false"
            )
    for name, supported in _SUPPORTED.items():
        value = values.get(name)
        if value is not None and value not in supported:
            listed = " or ".join(map(as_json, supported))
            remedy = f"expected {listed}" if supported else "remove it"
            raise ModelError(
                f"{path}: {name} is {as_json(value)}, which is not supported; {remedy}"
            )
    never_split = values.get("never_split") or []
    if not isinstance(never_split, list) or not {*map(str, never_split)} <= _never_split(values):
        raise ModelError(
            f"{path}: never_split is {as_json(never_split)}, which is not followed, but for "
            "special tokens; remove it (transformers does not follow it either)"
        )


def _never_split(values: dict[str, Any]) -> set[str]:
    """Special tokens, which are not split anyway."""
    named = [values.get(setting, default) for setting, default in SPECIAL_TOKENS.items()]
    return {token for token in named if isinstance(token, str)}


def _named_tokens(
    values: dict[str, Any], in_map: dict[str, Any], path: Path, map_path: Path
) -> "dict[str, AddedToken | None]":
    """Special tokens by their settings; those of special_tokens_map.json come first."""
    named: dict[str, AddedToken | None] = {}
    for name, token in (values | in_map).items():
        if not name.endswith("_token") or isinstance(token, (bool, int, float)):
            continue
        where = map_path if name in in_map else path
        if name not in SPECIAL_TOKENS:
            if values.get(name, token) != token:
                raise ModelError(f"{where}: {name} is said otherwise in {path.name}; keep one")
            if isinstance(token, dict) and name not in in_map and "__type" not in token:
                raise ModelError(f"{where}: {name} is an object without __type, which is not read")
        if isinstance(token, dict) and name in in_map:
            token = token | {"special": True}
        if token is not None:
            named[name] = read_token(token, where, name)
        elif name in ("unk_token", "cls_token", "sep_token"):
            raise ModelError(f"{where}: {name} is null; BERT needs this token")
        elif name in SPECIAL_TOKENS:
            named[name] = None
    return named


def _extra_tokens(
    values: dict[str, Any], in_map: dict[str, Any], path: Path
) -> tuple[list[Any], dict[str, Any]]:
    """Special tokens without a setting of their own: a list, and those with other names."""
    settings = ("extra_special_tokens", "additional_special_tokens")
    found = [file[name] or [] for file in (values, in_map) for name in settings if name in file]
    with_names = values.get("model_specific_special_tokens") or {}
    extra = found[0] if found else []
    if any(tokens != extra for tokens in found) or (with_names and isinstance(extra, dict)):
        raise ModelError(
            f"{path}: extra special tokens are said twice, here or in special_tokens_map.json, and "
            "not alike; keep one of them"
        )
    if isinstance(extra, dict):
        extra, with_names = [], extra
    if not isinstance(extra, list) or not isinstance(with_names, dict):
        raise ModelError(f"{path}: {settings[0]} is {as_json(extra)}; expected a list or an object")
    for name in with_names:
        if name in SPECIAL_TOKENS or name in values or name in in_map:
            raise ModelError(f"{path}: {quoted(name)} is said twice, as an extra special token too")
    return extra, with_names


def _read_decoder(described: object, path: Path) -> "dict[int, AddedToken]":
    if not isinstance(described, dict):
        raise ModelError(f"{path}: added_tokens_decoder is {as_json(described)}, not an object")
    added = {}
    for index, token in described.items():
        if not index.isdecimal():
            raise ModelError(f"{path}: added_tokens_decoder: {quoted(index)} is no id of a token")
        added[int(index)] = read_token(token, path, f"added_tokens_decoder: {quoted(index)}")
    return added


def _read_added_tokens(path: Path, special: set[str]) -> "dict[int, AddedToken]":
    """special: those of these tokens that are special."""
    added = {}
    for token, index in read_object(path).items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise ModelError(f"{path}: {quoted(token)} has the id {as_json(index)}")
        is_special = token in special
        described = {"content": token, "normalized": not is_special, "special": is_special}
        added[index] = read_token(described, path, quoted(token))
    return added
