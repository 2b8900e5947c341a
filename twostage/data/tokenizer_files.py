"""The tokenizer of a model folder: BERT's word pieces, with all that its files say of token ids.

The vocabulary is in tokenizer.json or vocab.txt; `tokenizer_settings.py` reads the other files. Ids
equal those that transformers gives for the same files:

- `BertTokenizer`, the usual class, takes vocabulary and added tokens from tokenizer.json and
  everything else from the settings and their defaults. (Without tokenizer_config.json it
  lower-cases.)
- `PreTrainedTokenizerFast` takes tokenizer.json as it is.

Files that contradict each other are refused by name.
"""

import codecs
import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError
from ..model_folder import TOKENIZERS, check_no_pointer, read_object
from ..printing import quoted
from .tokenizer_settings import (
    PLAIN_CLASSES,
    SPECIAL_TOKENS,
    TokenizerSettings,
    read_settings,
    read_token,
)

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordPiece

# Options of tokenizer.json's normalizer: the setting that decides, and what it changes.
_OPTIONS = {
    "lowercase": ("do_lower_case", "A", "a"),
    "strip_accents": ("strip_accents", "é", "e"),
    "handle_chinese_chars": ("tokenize_chinese_chars", "漢", " 漢 "),
}
_OTHER_TOKENIZERS = {
    "vocab.json": "RoBERTa's or GPT-2's",
    "merges.txt": "RoBERTa's or GPT-2's",
    "spiece.model": "SentencePiece's",
    "sentencepiece.bpe.model": "SentencePiece's",
    "tokenizer.model": "SentencePiece's",
}


def read_tokenizer(folder: Path) -> "Tokenizer":
    """The tokenizer of a model folder, without truncation and padding.

    Raises ModelError, naming the file and the setting, for what is not BERT's or not followed.
    """
    from tokenizers import models

    settings = read_settings(folder)
    path, vocabulary_path = (folder / name for name in TOKENIZERS)
    in_file: dict[int, AddedToken] = {}
    pad_token: str | None = None
    if path.is_file():
        stored, in_file = _read_stored(path)
        if settings.is_plain:
            _check_against_text_settings(stored, settings, path)
            # transformers takes the padding's token for the pad token.
            pad_token = stored.padding["pad_token"] if stored.padding else None
            tokenizer = stored
        else:
            _check_is_bert(stored, settings, path)
            tokenizer = _build(stored.model, settings)
    elif vocabulary_path.is_file():
        path, vocabulary = vocabulary_path, _read_vocabulary(vocabulary_path)
        unknown = settings.name_of("unk_token")
        tokenizer = _build(models.WordPiece(vocabulary, unk_token=unknown), settings)
    else:
        raise ModelError(_explain_missing(folder))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, settings, in_file, pad_token)
    if not settings.is_plain:
        _put_ends(tokenizer, settings, path)
    tokenizer.encode_special_tokens = settings.values.get("split_special_tokens", False)
    _check_ids(tokenizer, in_file, path)
    if settings.has_decoder:
        _check_ids(tokenizer, settings.added, settings.path)
    _check_ids(tokenizer, settings.listed, folder / "added_tokens.json")
    _check_ends(tokenizer, settings, path)
    _check_twins(tokenizer, folder)
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
    # Once loaded, they have other ids where the file's are taken or leave gaps.
    for entry in read_object(path).get("added_tokens", []):
        index = entry.pop("id")
        if index in added:
            raise ModelError(f"{path}: two added tokens have id {index}")
        added[index] = read_token(entry, path, "added_tokens")
    return tokenizer, added


def _read_vocabulary(path: Path) -> dict[str, int]:
    """A token a line without white space at its end, the line's number from 0 as its id.

    Of equal lines the last one counts.
    """
    from tokenizers.models import WordPiece

    check_no_pointer(path)
    try:
        with path.open("rb") as file:
            has_mark = file.read(3) == codecs.BOM_UTF8
        vocabulary: dict[str, int] = WordPiece.read_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a readable vocabulary: {error}") from None
    if has_mark:
        raise ModelError(f"{path} begins with a byte order mark, which is no token; remove it")
    return vocabulary


def _check_against_text_settings(
    stored: "Tokenizer", settings: TokenizerSettings, path: Path
) -> None:
    """Raise ModelError where tokenizer.json, taken as it is, does not do what a setting says."""
    _check_truncation(stored, settings, path)
    normalize = stored.normalizer.normalize_str if stored.normalizer else str
    for setting, before, after in _OPTIONS.values():
        said = settings.values.get(setting)
        if said is not None and said != (normalize(before) == after):
            raise ModelError(
                f"{settings.path}: {setting} is {json.dumps(said)}, but {path.name} does "
                "otherwise, and this tokenizer_class takes that as it is; make them agree"
            )


def _check_is_bert(stored: "Tokenizer", settings: TokenizerSettings, path: Path) -> None:
    """Raise ModelError where tokenizer.json says what BertTokenizer would leave out."""
    _check_truncation(stored, settings, path)
    stored.no_truncation()
    stored.no_padding()
    ends = [settings.name_of("cls_token"), settings.name_of("sep_token")]
    if stored.encode("").tokens != ends:
        raise ModelError(
            f"{path}: the post_processor does not put {ends[0]} and {ends[1]} around a text; give "
            "it one that does, or put vocab.txt in its place"
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
    _check_options(stored, settings, path)


def _check_options(stored: "Tokenizer", settings: TokenizerSettings, path: Path) -> None:
    """Raise ModelError for options of the normalizer that no setting confirms."""
    lower_case = settings.values.get("do_lower_case", True)
    usual = {"lowercase": True, "strip_accents": lower_case, "handle_chinese_chars": True}
    for option, expected in (usual | {"clean_text": True}).items():
        found = getattr(stored.normalizer, option)
        setting = _OPTIONS[option][0] if option in _OPTIONS else option
        if setting in settings.values or found in (expected, None):
            continue
        if option == "lowercase" and not count_capitals(stored):
            continue  # with no capital in the vocabulary there is nothing that could be kept
        remedy = f'"{setting}": {json.dumps(found)}'
        if option == "clean_text":  # BertTokenizer always does
            remedy = f'"tokenizer_class": "{PLAIN_CLASSES[0]}"'
        raise ModelError(
            f"{path}: {option} is {json.dumps(found)}, but by {settings.path.name} BertTokenizer "
            f"takes {json.dumps(expected)}; if {json.dumps(found)} is meant, put {{{remedy}}} there"
        )


def _check_truncation(stored: "Tokenizer", settings: TokenizerSettings, path: Path) -> None:
    """Raise ModelError for texts that are to lose their beginning."""
    side = stored.truncation["direction"] if stored.truncation else "right"
    if settings.values.get("truncation_side") is None and side != "right":
        raise ModelError(f"{path}: truncation on the {side} is not supported; expected right")


def _build(model: "WordPiece", settings: TokenizerSettings) -> "Tokenizer":
    """BERT's tokenizer by the settings, still without special tokens."""
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
    tokenizer: "Tokenizer",
    settings: TokenizerSettings,
    in_file: "dict[int, AddedToken]",
    pad_token: str | None,
) -> None:
    """Added tokens by their ids, then special ones, as transformers does; new ones get new ids.

    in_file: added tokens of tokenizer.json. pad_token: where no file names it. A special token that
    BERT has by default, no file names and the vocabulary lacks is added as well, but not where the
    model has no row for it.
    """
    from tokenizers import AddedToken

    added = settings.added if settings.has_decoder else settings.added | in_file
    tokens = [token for _, token in sorted(added.items(), key=lambda item: item[0])]
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {token.content for token in tokens}
    names = {token.content for token in settings.named.values() if token is not None}
    defaults = {"pad_token": pad_token} if settings.is_plain else SPECIAL_TOKENS
    for setting in {**SPECIAL_TOKENS, **settings.named}:
        token, default = settings.named.get(setting), defaults.get(setting)
        if default and setting not in settings.named:
            names.add(default)
            num_new = sum(tokenizer.token_to_id(t.content) is None for t in tokens)
            next_id = tokenizer.get_vocab_size() + num_new
            has_row = settings.num_rows is None or next_id < settings.num_rows
            if has_row or tokenizer.token_to_id(default) is not None:
                token = AddedToken(default, special=True)
        if token is not None and token.content not in known:
            known.add(token.content)
            tokens.append(token)
    tokens += [token for token in settings.extra if token.content not in known]
    for token in tokens:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(tokens)


def _put_ends(tokenizer: "Tokenizer", settings: TokenizerSettings, path: Path) -> None:
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


def _check_ends(tokenizer: "Tokenizer", settings: TokenizerSettings, path: Path) -> None:
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


def _check_twins(tokenizer: "Tokenizer", folder: Path) -> None:
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


def _kind(part: object) -> str:
    return "none" if part is None else type(part).__name__


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
