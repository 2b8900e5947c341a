"""The tokenizer of a model folder: BERT's word pieces, with all that its files say of token ids.

    tokenizer.json or vocab.txt   the vocabulary
    tokenizer_config.json         the class; lower case, accents, Chinese characters; the names of
                                  special tokens; `added_tokens_decoder`; `split_special_tokens`
    special_tokens_map.json       names of special tokens    read where tokenizer_config.json
    added_tokens.json             more tokens, with ids      has no `added_tokens_decoder`

Ids equal those that transformers gives for the same files. Its `BertTokenizer` takes vocabulary and
added tokens from tokenizer.json, all else from the settings and their defaults (lower case, for
example, without any tokenizer_config.json). Its `PreTrainedTokenizerFast` takes tokenizer.json as
it is. What would be left out in silence is refused by name: another class of tokenizer, a setting
that is not followed, files that contradict each other.
"""

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ModelError
from ..model_folder import CONFIG, SAVED_MODEL_TYPE, TOKENIZERS, check_no_pointer, read_object
from ..printing import quoted, shorten

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

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

# Options of tokenizer.json's normalizer: the setting that decides, and what it changes.
_OPTIONS = {
    "lowercase": ("do_lower_case", "A", "a"),
    "strip_accents": ("strip_accents", "é", "e"),
    "handle_chinese_chars": ("tokenize_chinese_chars", "漢", " 漢 "),
}
# Settings that would change ids, and the values that they may have besides null.
_SUPPORTED: dict[str, list[object]] = {
    "do_basic_tokenize": [True],
    "never_split": [[]],
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
}
_OTHER_TOKENIZERS = {
    "vocab.json": "RoBERTa's or GPT-2's",
    "merges.txt": "RoBERTa's or GPT-2's",
    "spiece.model": "SentencePiece's",
    "sentencepiece.bpe.model": "SentencePiece's",
    "tokenizer.model": "SentencePiece's",
}


class _Settings(NamedTuple):
    """What the files beside the vocabulary say."""

    path: Path
    """tokenizer_config.json, which need not exist."""
    values: dict[str, Any]
    """Of tokenizer_config.json."""
    is_plain: bool
    """Whether tokenizer.json is taken as it is."""
    named: "dict[str, AddedToken | None]"
    """Special tokens by their settings, as far as a file names them; None: there is none."""
    extra: "list[AddedToken]"
    """Special tokens without a setting of their own."""
    added: "dict[int, AddedToken]"
    """Tokens by the ids that a file gives them."""
    num_rows: int | None
    """Word embeddings of the model, if config.json is there and says it."""

    def name_of(self, setting: str) -> str:
        """The special token of `setting`."""
        token = self.named.get(setting)
        return str(SPECIAL_TOKENS[setting] if token is None else token.content)


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a model folder, without truncation and padding.

    Raises ModelError, naming the file and the setting, for what is not BERT's or not honoured.
    """
    from tokenizers import AddedToken, models

    settings = _read_settings(folder)
    path, vocabulary_path = (folder / name for name in TOKENIZERS)
    in_file: dict[int, AddedToken] = {}
    if path.is_file():
        stored, in_file = _read_stored(path)
        _refuse_contradictions(stored, settings, path)
        if settings.is_plain and stored.padding:  # transformers takes its token for the pad token
            pad_token = AddedToken(stored.padding["pad_token"], special=True)
            settings.named.setdefault("pad_token", pad_token)
        tokenizer = stored if settings.is_plain else _build(stored.model, settings)
    elif vocabulary_path.is_file():
        path, vocabulary = vocabulary_path, _read_vocabulary(vocabulary_path)
        unknown = settings.name_of("unk_token")
        tokenizer = _build(models.WordPiece(vocabulary, unk_token=unknown), settings)
    else:
        raise ModelError(_explain_missing(folder))
    _add_tokens(tokenizer, settings, in_file)
    if not settings.is_plain:
        _put_ends(tokenizer, settings, path)
    tokenizer.encode_special_tokens = settings.values.get("split_special_tokens", False)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_ids(tokenizer, in_file, path)
    if "added_tokens_decoder" in settings.values:
        _check_ids(tokenizer, settings.added, settings.path)
    added_path = folder / "added_tokens.json"
    if added_path.exists():
        _check_ids(tokenizer, _read_added(added_path, set()), added_path)
    _check_ends(tokenizer, settings, path)
    _refuse_twins(tokenizer, folder)
    return tokenizer


def describe_settings(tokenizer: "Tokenizer") -> dict[str, object]:
    """The tokenizer_config.json with which this tokenizer's tokenizer.json is read as it is."""
    first, last = tokenizer.encode("").tokens
    names = {"unk_token": tokenizer.model.unk_token, "sep_token": last, "cls_token": first}
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    return {
        "tokenizer_class": PLAIN_CLASSES[0],
        **{setting: token for setting, token in names.items() if token in special},
        "split_special_tokens": tokenizer.encode_special_tokens,
    }


def lower_cases(tokenizer: "Tokenizer") -> bool:
    """Whether capitals in a text become small letters."""
    return tokenizer.normalizer is not None and tokenizer.normalizer.normalize_str("A") == "a"


def count_capitals(tokenizer: "Tokenizer") -> int:
    """Tokens of the vocabulary with a capital letter, names of special tokens aside."""
    return sum(
        token != token.lower() and not (token[0] == "[" and token[-1] == "]")
        for token in tokenizer.get_vocab(with_added_tokens=False)
    )


def _read_settings(folder: Path) -> _Settings:
    path = folder / "tokenizer_config.json"
    values = read_object(path) if path.exists() else {}
    config = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    is_plain = _is_plain(values, path, config, folder / CONFIG)
    _check_values(values, path)
    has_decoder = "added_tokens_decoder" in values
    map_path, added_path = folder / "special_tokens_map.json", folder / "added_tokens.json"
    in_map = read_object(map_path) if map_path.exists() and not has_decoder else {}
    said = values | {
        name: token | {"special": True} if isinstance(token, dict) else token
        for name, token in in_map.items()
    }
    extra, with_names = _extra_tokens(values, in_map, path)
    named: dict[str, AddedToken | None] = {}
    for name, token in (said | with_names).items():
        is_setting = name.endswith("_token") or name in with_names
        if token is None or not is_setting or isinstance(token, (bool, int, float)):
            continue
        where = map_path if name in in_map else path
        if (
            name not in SPECIAL_TOKENS
            and name in values
            and in_map.get(name, token) != values[name]
        ):
            raise ModelError(f"{where}: {name} is said otherwise in {path.name}; keep one of them")
        is_read = name in SPECIAL_TOKENS or name in in_map or "__type" in token
        if isinstance(token, dict) and not is_read:
            raise ModelError(f"{where}: {name} is an object without __type, which is not read")
        named[name] = _as_token(token, where, name)
    named |= {name: None for name in SPECIAL_TOKENS if name in said and said[name] is None}
    for name in ("unk_token", "cls_token", "sep_token"):
        if name in named and named[name] is None:
            raise ModelError(f"{path}: {name} is null; BERT needs this token")
    added: dict[int, AddedToken] = {}
    if has_decoder:
        added = _read_decoder(values["added_tokens_decoder"], path)
    elif added_path.exists():
        # transformers looks for their names where they are plain strings, and not everywhere.
        plain = [] if "additional_special_tokens" in in_map else extra
        known = {token for token in (*said.values(), *plain) if isinstance(token, str)}
        known |= {token.content for name, token in named.items() if token and name in in_map}
        added = _read_added(added_path, known)
    special = [_as_token(token, path, "extra_special_tokens") for token in extra]
    num_rows = config.get("vocab_size")
    num_rows = num_rows if isinstance(num_rows, int) else None
    return _Settings(path, values, is_plain, named, special, added, num_rows)


def _extra_tokens(
    values: dict[str, Any], in_map: dict[str, Any], path: Path
) -> tuple[list[Any], dict[str, Any]]:
    """Special tokens without a setting of their own: a list, and those with other names."""
    settings = ("extra_special_tokens", "additional_special_tokens")
    found = [file[name] for file in (values, in_map) for name in settings if name in file]
    found = [tokens or [] for tokens in found] or [[]]
    with_names = values.get("model_specific_special_tokens") or {}
    if any(tokens != found[0] for tokens in found) or (with_names and isinstance(found[0], dict)):
        raise ModelError(
            f"{path}: extra special tokens are said twice, here or in special_tokens_map.json, and "
            "not alike; keep one of them"
        )
    extra = found[0]
    if isinstance(extra, dict):
        extra, with_names = [], extra
    if not isinstance(extra, list) or not isinstance(with_names, dict):
        raise ModelError(f"{path}: {settings[0]} is {shorten(extra)}; expected a list or an object")
    for name in with_names:
        if name in SPECIAL_TOKENS or name in values or name in in_map:
            raise ModelError(f"{path}: {quoted(name)} is said twice, as an extra special token too")
    return extra, with_names


def _is_plain(
    values: dict[str, Any], path: Path, config: dict[str, Any], config_path: Path
) -> bool:
    """Whether tokenizer.json is taken as it is. Raises ModelError for a class not BERT's."""
    name = values.get("tokenizer_class")
    if name is None and config.get("tokenizer_class") is not None:
        name, path = config["tokenizer_class"], config_path
    if name is None:
        return not path.exists() and config.get("model_type") == SAVED_MODEL_TYPE
    if not isinstance(name, str) or name.removesuffix("Fast") not in (
        *BERT_CLASSES,
        *(plain.removesuffix("Fast") for plain in PLAIN_CLASSES),
    ):
        raise ModelError(
            f"{path}: tokenizer_class is {shorten(name)}; expected BERT's word pieces, by "
            f"{', '.join(BERT_CLASSES)} or {PLAIN_CLASSES[0]}"
        )
    return name.removesuffix("Fast") not in BERT_CLASSES


def _check_values(values: dict[str, Any], path: Path) -> None:
    """Raise ModelError for settings of the wrong type, and for those that are not honoured."""
    for name in (*(setting for setting, _, _ in _OPTIONS.values()), "split_special_tokens"):
        value = values.get(name, False)
        if not isinstance(value, bool) and (value is not None or name != "strip_accents"):
            raise ModelError(
                f"{path}: {name} is {shorten(value)}, of the wrong type; expected true or false"
            )
    for name, supported in _SUPPORTED.items():
        value = values.get(name)
        if value is not None and value not in supported:
            expected = " or ".join(map(json.dumps, supported)) or "none"
            raise ModelError(
                f"{path}: {name} is {shorten(value)}, which is not supported; expected {expected}"
            )


def _read_decoder(described: object, path: Path) -> "dict[int, AddedToken]":
    if not isinstance(described, dict):
        raise ModelError(f"{path}: added_tokens_decoder is {shorten(described)}, not an object")
    added = {}
    for index, token in described.items():
        if not index.isdecimal():
            raise ModelError(f"{path}: added_tokens_decoder: {quoted(index)} is no id of a token")
        added[int(index)] = _as_token(token, path, f"added_tokens_decoder: {quoted(index)}")
    return added


def _read_added(path: Path, special: set[str]) -> "dict[int, AddedToken]":
    """special: those of these tokens that are special."""
    added = {}
    for token, index in read_object(path).items():
        if not isinstance(index, int) or isinstance(index, bool):
            raise ModelError(f"{path}: {quoted(token)} has the id {shorten(index)}")
        is_special = token in special
        described = {"content": token, "normalized": not is_special, "special": is_special}
        added[index] = _as_token(described, path, quoted(token))
    return added


def _as_token(value: object, path: Path, name: str) -> "AddedToken":
    """A token as a setting has it: its text, or an object that says how it is matched."""
    from tokenizers import AddedToken

    is_text = isinstance(value, str)
    fields = {"content": value, "special": True} if is_text else value
    fields = dict(fields) if isinstance(fields, dict) else {}
    fields.pop("__type", None)
    try:
        return AddedToken(fields.pop("content"), **fields)
    except (KeyError, TypeError, UnicodeEncodeError):
        raise ModelError(
            f"{path}: {name} is {shorten(value)}; expected a token, or an object with content, "
            "lstrip, rstrip, single_word, normalized and special"
        ) from None


def _read_stored(path: Path) -> "tuple[Tokenizer, dict[int, AddedToken]]":
    """tokenizer.json, and its added tokens by the ids that it gives them."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        check_no_pointer(path)
        raise ModelError(f"{path} is not a readable tokenizer: {error}") from error
    if _kind(tokenizer.model) != "WordPiece":
        raise ModelError(f"{path}: the model is {_kind(tokenizer.model)}; BERT's is WordPiece")
    by_id: dict[int, str] = {}
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        other = by_id.setdefault(index, token)
        if other != token:
            raise ModelError(f"{path}: id {index} is that of {quoted(other)} and {quoted(token)}")
    added: dict[int, AddedToken] = {}
    for entry in read_object(path).get("added_tokens", []):
        index = entry.pop("id")
        if index in added:
            raise ModelError(f"{path}: two added tokens have id {index}")
        added[index] = _as_token(entry, path, "added_tokens")
    return tokenizer, added


def _read_vocabulary(path: Path) -> dict[str, int]:
    """A token a line without white space at its end, the line's number from 0 as its id.

    Of equal lines the last one counts.
    """
    from tokenizers.models import WordPiece

    check_no_pointer(path)
    with path.open("rb") as file:
        if file.read(3) == codecs.BOM_UTF8:
            raise ModelError(f"{path} begins with a byte order mark, which is no token; remove it")
    try:
        vocabulary: dict[str, int] = WordPiece.read_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a readable vocabulary: {error}") from None
    return vocabulary


def _kind(part: object) -> str:
    return "none" if part is None else type(part).__name__


def _refuse_contradictions(stored: "Tokenizer", settings: _Settings, path: Path) -> None:
    """Raise ModelError where tokenizer.json says what the settings leave out, or the reverse."""
    values = settings.values
    side = stored.truncation["direction"] if stored.truncation else "right"
    if values.get("truncation_side") is None and side != "right":
        raise ModelError(f"{path}: truncation on the {side} is not supported; expected right")
    if settings.is_plain:
        normalize = stored.normalizer.normalize_str if stored.normalizer else str
        for setting, before, after in _OPTIONS.values():
            said = values.get(setting)
            if said is not None and said != (normalize(before) == after):
                raise ModelError(
                    f"{settings.path}: {setting} is {json.dumps(said)}, but {path.name} does "
                    "otherwise, and this tokenizer_class takes that as it is; make them agree"
                )
        return
    ends = [settings.name_of("cls_token"), settings.name_of("sep_token")]
    stored.no_truncation()
    stored.no_padding()
    if stored.encode("").tokens != ends:
        raise ModelError(
            f"{path}: the post_processor does not put {ends[0]} and {ends[1]} around a text"
        )
    model = stored.model
    parts = {
        "normalizer": (_kind(stored.normalizer), "BertNormalizer"),
        "pre_tokenizer": (_kind(stored.pre_tokenizer), "BertPreTokenizer"),
        "continuing_subword_prefix": (model.continuing_subword_prefix, "##"),
        "max_input_chars_per_word": (model.max_input_chars_per_word, 100),
        "unk_token": (model.unk_token, settings.name_of("unk_token")),
    }
    for name, (found, expected) in parts.items():
        if found != expected:
            raise ModelError(
                f"{path}: {name} is {found}, but that of BertTokenizer {expected}; if it is "
                f'meant, put "tokenizer_class": "{PLAIN_CLASSES[0]}" into {settings.path.name}'
            )
    lower_case = values.get("do_lower_case", True)
    usual = {"lowercase": True, "strip_accents": lower_case, "handle_chinese_chars": True}
    for option, expected in (usual | {"clean_text": True}).items():
        found = getattr(stored.normalizer, option)
        setting = _OPTIONS[option][0] if option in _OPTIONS else option
        if setting in values or found in (expected, None):
            continue
        if option == "lowercase" and not count_capitals(stored):
            continue  # with no capital in the vocabulary there is nothing that could be kept
        raise ModelError(
            f"{path}: {option} is {json.dumps(found)}, but {settings.path.name} decides and has no "
            f'{setting}; put {{"{setting}": {json.dumps(found)}}} into it, or true'
        )


def _build(model: Any, settings: _Settings) -> "Tokenizer":
    """BERT's tokenizer by the settings, still without special tokens. model: of the word pieces."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings.values.get("do_lower_case", True),
        handle_chinese_chars=settings.values.get("tokenize_chinese_chars", True),
        strip_accents=settings.values.get("strip_accents"),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _add_tokens(
    tokenizer: "Tokenizer", settings: _Settings, in_file: "dict[int, AddedToken]"
) -> None:
    """Added tokens by their ids, then special ones, as transformers does; new ones get new ids.

    in_file: added tokens of tokenizer.json. A special token that BERT has by default, no file
    names and the vocabulary lacks is added as well, but for those that the model has no row for.
    """
    from tokenizers import AddedToken

    added = settings.added
    if "added_tokens_decoder" not in settings.values:
        added = added | in_file
    tokens = [token for _, token in sorted(added.items(), key=lambda item: item[0])]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    names = {token.content for token in settings.named.values() if token is not None}
    for setting in {**SPECIAL_TOKENS, **settings.named}:
        token, default = settings.named.get(setting), SPECIAL_TOKENS.get(setting)
        if default and setting not in settings.named and not settings.is_plain:
            names.add(default)
            is_new = tokenizer.token_to_id(default) is None
            num_new = sum(tokenizer.token_to_id(t.content) is None for t in tokens)
            next_id = tokenizer.get_vocab_size() + num_new
            if not is_new or settings.num_rows is None or next_id < settings.num_rows:
                token = AddedToken(default, special=True)
        if token is not None and token.content not in known:
            known.add(token.content)
            tokens.append(token)
    tokens += [token for token in settings.extra if token.content not in known]
    for token in tokens:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(tokens)


def _refuse_twins(tokenizer: "Tokenizer", folder: Path) -> None:
    """Raise ModelError when two added tokens are equal once normalised: chance would decide."""
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    seen: dict[str, str] = {}
    for token in tokenizer.get_added_tokens_decoder().values():
        if token.normalized:
            other = seen.setdefault(normalize(token.content), token.content)
            if other != token.content:
                raise ModelError(
                    f"the tokenizer of '{folder}' cannot tell its added tokens {quoted(other)} and "
                    f"{quoted(token.content)} apart, which are the same to its normalizer; remove "
                    "one of them"
                )


def _put_ends(tokenizer: "Tokenizer", settings: _Settings, path: Path) -> None:
    """[CLS] before and [SEP] behind each text, or what stands for them."""
    from tokenizers import processors

    first, last = settings.name_of("cls_token"), settings.name_of("sep_token")
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    lacking = [token for token, index in ids if index is None]
    if lacking:
        raise ModelError(f"{path} lacks {' and '.join(lacking)}; expected BERT's vocabulary")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[first, "$A", last], special_tokens=ids
    )


def _check_ids(tokenizer: "Tokenizer", said: "dict[int, AddedToken]", path: Path) -> None:
    """Raise ModelError when a token's id is not the one that the file at `path` says."""
    for index, token in said.items():
        found = tokenizer.token_to_id(token.content)
        if token.content and found != index:
            found_as = "is not read" if found is None else f"has id {found}"
            raise ModelError(
                f"{path} says that token {quoted(token.content)} has id {index}, but by the other "
                f"files it {found_as}; make them agree"
            )


def _check_ends(tokenizer: "Tokenizer", settings: _Settings, path: Path) -> None:
    """Raise ModelError unless each text begins with the token whose state the pooler reads."""
    first, last = settings.name_of("cls_token"), settings.name_of("sep_token")
    ends = [tokenizer.token_to_id(first), tokenizer.token_to_id(last)]
    unknown = tokenizer.model.unk_token
    if tokenizer.model.token_to_id(unknown) is None:
        raise ModelError(f"{path} lacks {unknown}; expected BERT's vocabulary")
    if tokenizer.encode("").ids != ends or tokenizer.num_special_tokens_to_add(False) != 2:
        raise ModelError(
            f"the tokenizer of '{path.parent}' does not put {first} and {last} around a text"
        )


def _explain_missing(folder: Path) -> str:
    """One sentence on a folder without a tokenizer that can be read."""
    for name, whose in _OTHER_TOKENIZERS.items():
        if (folder / name).exists():
            return (
                f"{folder / name} is a tokenizer of {whose} kind; BERT's is expected, in "
                f"{' or '.join(TOKENIZERS)}"
            )
    return (
        f"'{folder}' has neither {' nor '.join(TOKENIZERS)}; get one from where the model is from"
    )
