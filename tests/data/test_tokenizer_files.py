"""What a model folder's files say of token ids: read as transformers does, or refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import normalizers, pre_tokenizers, processors

from twostage.data.tokenization import check_vocabulary, load_tokenizer, tokenize
from twostage.errors import ModelError

WORDS = (
    "the", "film", "good", "bad", "dull", "fun", "great", "plot", "is", "was", "not", "very", "and",
    "of", "it", "to", "in", "long", "short",
)  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SMALL = [*SPECIAL, *WORDS, *LETTERS, *(f"##{c}" for c in LETTERS), *".,!?'\"-"]
VOCABULARY = [*SMALL, "Film", "The", "A", "##A", "é", "É", "漢", "##漢"]
TEXTS = [
    "",
    " \t\n",
    "the film is good",
    "The FILM, É é e\u0301 [SEP] covid19 film <url> bad",
    "[CLS] [MASK] [PAD] [UNK] [sep] [mask]. <mask> <s> </s>",
    "漢字漢 film漢 漢",
    "xcovid19x  <url>  . COVID19 <URL> covid19",
    "a\0b\u200bc soft\xadhyphen \ufeffbom \x1b[31m",
    "the " * 40,
    "b" * 101,
    "<ent>good <ent> good",
    "İstanbul ﬁne ½ \U0001f642 ###a ##a",
]
URL = {"content": "<url>", "lstrip": True, "rstrip": False, "normalized": True}
DECODER = {
    str(index): {"content": token, "normalized": False, "special": True}
    for index, token in enumerate(SPECIAL)
}

Settings = dict[str, Any]


def make_folder(
    folder: Path,
    settings: Settings | None = None,
    *,
    tokenizer: "tokenizers.Tokenizer | None" = None,
    config: Settings | None = None,
    **files: Settings,
) -> Path:
    """A model folder without weights: vocab.txt, or `tokenizer` as tokenizer.json, and settings."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"} | (config or {})))
    if tokenizer is None:
        (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    else:
        tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        files["tokenizer_config"] = settings
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def make_tokenizer(**options: Any) -> tokenizers.Tokenizer:
    """options: of the normalizer."""
    vocabulary = {token: index for index, token in enumerate(VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def changed(change: Callable[[tokenizers.Tokenizer], object]) -> tokenizers.Tokenizer:
    tokenizer = make_tokenizer()
    change(tokenizer)
    return tokenizer


def rewritten(change: Callable[[Any], object]) -> Any:
    """A tokenizer.json that was written by hand."""

    class Written:
        def save(self, path: str) -> None:
            described = json.loads(make_tokenizer().to_str())
            change(described)
            Path(path).write_text(json.dumps(described))

    return Written()


def add(*tokens: tuple[int, str]) -> Callable[[Any], None]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    return lambda described: described["added_tokens"].extend(
        {"id": index, "content": token, "normalized": True, **flags} for index, token in tokens
    )


def bake_in(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)


def ours(folder: Path, max_length: int) -> list[list[int]]:
    store = tokenize(load_tokenizer(folder), TEXTS, max_length)
    bounds = store.offsets.tolist()
    return [store.ids[a:b].tolist() for a, b in pairwise(bounds)]


def theirs(folder: Path, max_length: int) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids: list[list[int]] = tokenizer(TEXTS, truncation=True, max_length=max_length)["input_ids"]
    return ids


HONOURED: dict[str, tuple[Settings | None, dict[str, Any]]] = {
    "no settings": (None, {}),
    "cased": ({"do_lower_case": False}, {}),
    "accents stripped": ({"do_lower_case": False, "strip_accents": True}, {}),
    "accents kept": ({"strip_accents": False}, {}),
    "accents by case": ({"strip_accents": None}, {}),
    "Chinese": ({"tokenize_chinese_chars": False}, {}),
    "split": ({"split_special_tokens": True}, {}),
    "Fast": ({"tokenizer_class": "BertTokenizerFast"}, {}),
    "DistilBERT's class": ({"tokenizer_class": "DistilBertTokenizer"}, {}),
    "class in config.json": ({}, {"config": {"tokenizer_class": "BertTokenizer"}}),
    "harmless": (
        {
            "do_basic_tokenize": True,
            "never_split": ["[UNK]", "[SEP]"],
            "model_max_length": 7,
            "padding_side": "left",
            "truncation_side": "right",
            "clean_up_tokenization_spaces": True,
            "name_or_path": "elsewhere",
        },
        {},
    ),
    "other ends": ({"cls_token": "the", "sep_token": "film"}, {}),
    "other mask": ({"mask_token": "<mask>"}, {}),
    "no mask": ({"mask_token": None}, {}),
    "mask as an object": ({"mask_token": {"__type": "AddedToken", **URL, "content": "[MASK]"}}, {}),
    "ends of sentences": ({"bos_token": "<s>", "eos_token": "</s>"}, {}),
    "token of its own": ({"ent_token": "<ent>"}, {}),
    "additional": ({"additional_special_tokens": ["<url>", "<ent>"]}, {}),
    "extra": ({"extra_special_tokens": ["<ent>"]}, {}),
    "extra with names": ({"extra_special_tokens": {"ent": "<ent>"}}, {}),
    "decoder": ({"added_tokens_decoder": DECODER | {"91": URL}}, {}),
    "decoder and split": (
        {"added_tokens_decoder": DECODER | {"91": URL}, "split_special_tokens": True},
        {},
    ),
    "empty decoder": ({"added_tokens_decoder": {}}, {}),
    "model's own": ({"model_specific_special_tokens": {"ent_token": "<ent>"}}, {}),
    "added": (None, {"added_tokens": {"covid19": 91, "<url>": 92}}),
    "added out of order": (None, {"added_tokens": {"<url>": 92, "covid19": 91}}),
    "added and special": (
        {"additional_special_tokens": ["<url>"]},
        {"added_tokens": {"<url>": 91}},
    ),
    "map": (None, {"special_tokens_map": {"mask_token": "<mask>", "cls_token": "the"}}),
    "map of objects": (None, {"special_tokens_map": {"mask_token": URL | {"content": "[MASK]"}}}),
    "map before settings": (
        {"mask_token": "[MASK]"},
        {"special_tokens_map": {"mask_token": "<mask>"}},
    ),
    "map after decoder": (
        {"added_tokens_decoder": DECODER},
        {"special_tokens_map": {"mask_token": "<mask>"}},
    ),
    "map with additional": (
        None,
        {
            "special_tokens_map": {"additional_special_tokens": ["<url>"]},
            "added_tokens": {"<url>": 91},
        },
    ),
    "tokenizer.json": (None, {"tokenizer": make_tokenizer()}),
    "tokenizer.json, cased settings": (
        {"do_lower_case": False},
        {"tokenizer": make_tokenizer()},
    ),
    "tokenizer.json, other settings": (
        {"do_lower_case": True, "strip_accents": False, "tokenize_chinese_chars": False},
        {"tokenizer": make_tokenizer(lowercase=False, strip_accents=True)},
    ),
    "tokenizer.json, split": ({"split_special_tokens": True}, {"tokenizer": make_tokenizer()}),
    "tokenizer.json, added": (
        None,
        {
            "tokenizer": changed(lambda t: t.add_tokens(["covid19"])),
            "added_tokens": {"covid19": 91, "<url>": 92},
        },
    ),
    "tokenizer.json, added backwards": (
        None,
        {"tokenizer": rewritten(add((92, "covid19"), (91, "<url>")))},
    ),
    "tokenizer.json, padded and cut": (
        None,
        {"tokenizer": changed(bake_in)},
    ),
    "tokenizer.json, BertProcessing": (
        {},
        {
            "tokenizer": changed(
                lambda t: setattr(
                    t, "post_processor", processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
                )
            )
        },
    ),
    "tokenizer.json as it is": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer": make_tokenizer(lowercase=False, handle_chinese_chars=False)},
    ),
    "tokenizer.json as it is, dirty": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer": make_tokenizer(clean_text=False)},
    ),
    "tokenizer.json as it is, with another normalizer": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]"},
        {
            "tokenizer": changed(
                lambda t: setattr(
                    t,
                    "normalizer",
                    normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
                )
            )
        },
    ),
    "tokenizer.json as it is, padded": (
        {"tokenizer_class": "TokenizersBackend", "cls_token": "[CLS]"},
        {"tokenizer": changed(lambda t: t.enable_padding(length=4))},
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_ids_equal_transformers(tmp_path: Path, name: str) -> None:
    settings, files = HONOURED[name]
    folder = make_folder(tmp_path / "m", settings, **files)
    for max_length in (6, 128):
        assert ours(folder, max_length) == theirs(folder, max_length)


def test_every_honoured_setting_changes_ids(tmp_path: Path) -> None:
    """Else the table above would prove nothing."""
    plain = ours(make_folder(tmp_path / "plain"), 128)
    same = set()
    for number, (name, (settings, files)) in enumerate(HONOURED.items()):
        if ours(make_folder(tmp_path / str(number), settings, **files), 128) == plain:
            same.add(name)
    assert same == {
        "no settings",
        "accents by case",
        "Fast",
        "DistilBERT's class",
        "class in config.json",
        "harmless",
        "map after decoder",
        "empty decoder",
        "tokenizer.json",
        "tokenizer.json, padded and cut",
        "tokenizer.json, BertProcessing",
    }


REFUSED: dict[str, tuple[Settings | None, dict[str, Any], str]] = {
    "class": ({"tokenizer_class": "RobertaTokenizer"}, {}, r"_config\.json: tokenizer_class.*Robe"),
    "class in config.json": (
        None,
        {"config": {"tokenizer_class": "BertJapaneseTokenizer"}},
        r"/config\.json: tokenizer_class is .BertJap",
    ),
    "words as they are": ({"do_basic_tokenize": False}, {}, "do_basic_tokenize is false"),
    "never split": ({"never_split": ["good"]}, {}, "never_split is"),
    "cut at the beginning": ({"truncation_side": "left"}, {}, "truncation_side is .left."),
    "code": ({"auto_map": {"AutoTokenizer": ["x.Y", None]}}, {}, "auto_map is"),
    "wrong type": ({"do_lower_case": "yes"}, {}, "do_lower_case is .yes., of the wrong type"),
    "null": ({"do_lower_case": None}, {}, "do_lower_case is null"),
    "no unknown token": ({"unk_token": None}, {}, "unk_token is null"),
    "unknown token unknown": ({"unk_token": "<unk>"}, {}, "lacks <unk>"),
    "token as a list": ({"added_tokens_decoder": {"5": ["a"]}}, {}, "added_tokens_decoder: '5' is"),
    "decoder as a list": ({"added_tokens_decoder": []}, {}, "added_tokens_decoder is"),
    "id as a word": ({"added_tokens_decoder": {"x": "a"}}, {}, "'x' is no id"),
    "extra as a word": ({"extra_special_tokens": "<url>"}, {}, "extra_special_tokens is .<url>."),
    "extra said twice": (
        {"extra_special_tokens": ["<ent>"]},
        {"special_tokens_map": {"additional_special_tokens": ["<url>"]}},
        "said twice",
    ),
    "added with another id": (None, {"added_tokens": {"covid19": 500}}, "'covid19' has id 500"),
    "added without an id": (None, {"added_tokens": {"covid19": None}}, "'covid19' has the id null"),
    "decoder with another id": (
        {"added_tokens_decoder": {"7": {"content": "[CLS]"}}},
        {},
        r"'\[CLS\]' has id 7, but by the other files it has id 2",
    ),
    "added, not in the decoder": (
        {"added_tokens_decoder": DECODER},
        {"added_tokens": {"covid19": 91}},
        r"added_tokens\.json says.*'covid19' has id 91.*is not read",
    ),
    "in tokenizer.json, not in the decoder": (
        {"added_tokens_decoder": DECODER},
        {"tokenizer": changed(lambda t: t.add_tokens(["covid19"]))},
        r"tokenizer\.json says.*'covid19' has id 91.*is not read",
    ),
    "cased in tokenizer.json alone": (
        None,
        {"tokenizer": make_tokenizer(lowercase=False)},
        'lowercase is false, .* put {"do_lower_case": false} there',
    ),
    "accents in tokenizer.json alone": (
        {"model_max_length": 512},
        {"tokenizer": make_tokenizer(strip_accents=False)},
        'strip_accents is false, .* put {"strip_accents": false} there',
    ),
    "Chinese in tokenizer.json alone": (
        {},
        {"tokenizer": make_tokenizer(handle_chinese_chars=False)},
        "handle_chinese_chars is false",
    ),
    "dirt in tokenizer.json alone": (
        {},
        {"tokenizer": make_tokenizer(clean_text=False)},
        'clean_text is false, .* put {"tokenizer_class": "PreTrainedTokenizerFast"} there',
    ),
    "as it is, against its settings": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "do_lower_case": False},
        {"tokenizer": make_tokenizer()},
        r"do_lower_case is false, but tokenizer\.json does otherwise",
    ),
    "another normalizer": (
        {},
        {"tokenizer": changed(lambda t: setattr(t, "normalizer", normalizers.Lowercase()))},
        "normalizer is Lowercase",
    ),
    "another pre-tokenizer": (
        None,
        {"tokenizer": changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()))},
        "pre_tokenizer is Whitespace",
    ),
    "longer words": (
        None,
        {"tokenizer": changed(lambda t: setattr(t.model, "max_input_chars_per_word", 7))},
        "max_input_chars_per_word is 7",
    ),
    "another prefix": (
        None,
        {"tokenizer": changed(lambda t: setattr(t.model, "continuing_subword_prefix", "@@"))},
        "continuing_subword_prefix is @@",
    ),
    "two words with one id": (
        None,
        {"tokenizer": rewritten(lambda t: t["model"]["vocab"].update(fun=7))},
        r"tokenizer\.json: id 7 is that of '(fun|good)' and '(fun|good)'",
    ),
    "two added tokens with one id": (
        None,
        {"tokenizer": rewritten(add((91, "covid19"), (91, "<url>")))},
        "two added tokens have id 91",
    ),
    "added with a taken id": (
        None,
        {"tokenizer": rewritten(add((91, "covid19"), (20, "<url>")))},
        r"'(<url>|covid19)' has id (20|91), but by the other files it has id 9",
    ),
    "added that are one in small letters": (
        None,
        {"tokenizer": changed(lambda t: t.add_tokens(["covid19", "COVID19"]))},
        "cannot tell its added tokens '(covid|COVID)19' and '(covid|COVID)19' apart",
    ),
    "named twice": (
        {"extra_special_tokens": {"sep_token": "good"}},
        {},
        "'sep_token' is said twice",
    ),
    "named otherwise in the map": (
        {"ent_token": "<ent>"},
        {"special_tokens_map": {"ent_token": "<url>"}},
        r"special_tokens_map\.json: ent_token is said otherwise",
    ),
    "object of no type": ({"ent_token": {"content": "<ent>"}}, {}, "without __type"),
    "half a character": ({"extra_special_tokens": ["\ud83d"]}, {}, r"\\ud83d.; expected a token"),
    "half a character, added": (None, {"added_tokens": {"\ud83d": 91}}, "expected a token"),
    "remote code": ({"trust_remote_code": True}, {}, "trust_remote_code is true"),
    "no ends": (
        None,
        {
            "tokenizer": changed(
                lambda t: setattr(t, "post_processor", processors.ByteLevel(trim_offsets=True))
            )
        },
        r"does not put \[CLS\] and \[SEP\] around a text",
    ),
    "cut at the beginning by tokenizer.json": (
        None,
        {"tokenizer": changed(lambda t: t.enable_truncation(4, direction="left"))},
        "truncation on the left",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_honoured_is_refused_by_name(tmp_path: Path, name: str) -> None:
    settings, files, message = REFUSED[name]
    folder = make_folder(tmp_path / "m", settings, **files)
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(folder)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordLevel"])
def test_models_other_than_word_pieces_are_refused(tmp_path: Path, kind: str) -> None:
    model = {
        "BPE": tokenizers.models.BPE({"a": 0}, []),
        "Unigram": tokenizers.models.Unigram([("a", 0.0)], 0),
        "WordLevel": tokenizers.models.WordLevel({"a": 0}, "a"),
    }[kind]
    for settings in ({"tokenizer_class": "PreTrainedTokenizerFast"}, {}):
        folder = make_folder(tmp_path, settings, tokenizer=tokenizers.Tokenizer(model))
        with pytest.raises(ModelError, match=rf"tokenizer\.json: the model is {kind}"):
            load_tokenizer(folder)


@pytest.mark.parametrize(("name", "whose"), [("merges.txt", "GPT-2"), ("spiece.model", "Sentence")])
def test_a_tokenizer_of_another_kind_is_named(tmp_path: Path, name: str, whose: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=rf"{name} .*{whose}"):
        load_tokenizer(tmp_path)


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name in ("vocab.txt", "tokenizer.json"):
        (tmp_path / name).write_text(pointer)
        with pytest.raises(ModelError, match=rf"{name} is a Git LFS pointer.*git lfs pull"):
            load_tokenizer(tmp_path)


def cased_without_capitals() -> tokenizers.Tokenizer:
    tokenizer = make_tokenizer(lowercase=False)
    small = {token: index for index, token in enumerate(SMALL)}
    tokenizer.model = tokenizers.models.WordPiece(small, unk_token="[UNK]")
    return tokenizer


def test_without_capitals_in_the_vocabulary_none_are_kept(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", tokenizer=cased_without_capitals())
    assert ours(folder, 128) == theirs(folder, 128)
    assert load_tokenizer(folder).encode("FILM").tokens == ["[CLS]", "film", "[SEP]"]


REAL: dict[str, Settings | None] = {
    "bert-base-uncased": {"do_lower_case": True, "model_max_length": 512},
    "bert-base-cased": {"do_lower_case": False, "model_max_length": 512},
    "bert-base-multilingual-cased": {"do_lower_case": False, "model_max_length": 512},
    "MiniLM": {
        "do_lower_case": True,
        **{f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")},
        "tokenize_chinese_chars": True,
        "strip_accents": None,
        "do_basic_tokenize": True,
        "never_split": None,
        "tokenizer_class": "BertTokenizer",
        "model_max_length": 512,
    },
    "bert-tiny": None,
}


@pytest.mark.parametrize("name", REAL)
def test_folders_shaped_as_real_ones_equal_transformers(tmp_path: Path, name: str) -> None:
    """With both files, with either, and as transformers saves it again."""
    settings = REAL[name]
    lower_case = settings is None or settings["do_lower_case"]
    tokenizer = make_tokenizer(lowercase=lower_case)
    tokenizer.add_special_tokens(SPECIAL)
    if name == "MiniLM":
        tokenizer.enable_truncation(8)
        tokenizer.enable_padding(length=8)
    both = make_folder(tmp_path / "both", settings, tokenizer=tokenizer)
    only_text = make_folder(tmp_path / "text", settings)
    shutil.copy(only_text / "vocab.txt", both)
    expected = theirs(both, 128)
    assert any(ids != expected[0] for ids in expected)
    transformers.AutoTokenizer.from_pretrained(both).save_pretrained(tmp_path / "again")
    shutil.copy(both / "config.json", tmp_path / "again")
    for folder in (both, only_text, tmp_path / "again"):
        assert ours(folder, 128) == theirs(folder, 128) == expected


@pytest.mark.parametrize("name", HONOURED)
def test_a_saved_tokenizer_is_read_alike_by_us_and_transformers(tmp_path: Path, name: str) -> None:
    from twostage.data.tokenizer_files import describe_settings

    settings, files = HONOURED[name]
    tokenizer = load_tokenizer(make_folder(tmp_path / "m", settings, **files))
    saved = make_folder(tmp_path / "saved", describe_settings(tokenizer), tokenizer=tokenizer)
    expected = ours(tmp_path / "m", 128)
    assert ours(saved, 128) == theirs(saved, 128) == expected


def test_the_greatest_id_is_what_is_checked(tmp_path: Path) -> None:
    vocabulary = {token: index for index, token in enumerate(SMALL)} | {"fun": 500}
    tokenizer = make_tokenizer()
    tokenizer.model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    folder = make_folder(tmp_path / "m", tokenizer=tokenizer)
    with pytest.raises(ModelError, match=r"id 500 to token 'fun'.*vocab_size 84, so ids end at 83"):
        check_vocabulary(load_tokenizer(folder), 84, folder)
    check_vocabulary(load_tokenizer(folder), 501, folder)


def test_tokens_twice_in_vocab_txt_leave_the_last_id_the_greatest(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "vocab.txt").write_text("\n".join([*SMALL, "good", "bad"]), encoding="utf-8")
    assert ours(folder, 128) == theirs(folder, 128)
    with pytest.raises(ModelError, match=rf"id {len(SMALL) + 1} to token 'bad'"):
        check_vocabulary(load_tokenizer(folder), len(SMALL), folder)


@pytest.mark.parametrize("end", ["\n", " \n", "\t \n", "\r\n", "\u2028\n", "\x85\n"])
def test_white_space_at_line_ends_of_vocab_txt_is_dropped(tmp_path: Path, end: str) -> None:
    folder = make_folder(tmp_path / "m")
    vocabulary = [*VOCABULARY, "fi\rlm", " led", ""]
    (folder / "vocab.txt").write_text(end.join(vocabulary), encoding="utf-8", newline="")
    assert ours(folder, 128) == theirs(folder, 128)
    assert load_tokenizer(folder).token_to_id(" led") == len(VOCABULARY) + 1


@pytest.mark.parametrize("end", ["\r", "\x1c\n"])
def test_other_line_ends_of_vocab_txt_are_part_of_tokens(tmp_path: Path, end: str) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "vocab.txt").write_text(end.join(VOCABULARY), encoding="utf-8", newline="")
    with pytest.raises(ModelError, match="lacks"):
        load_tokenizer(folder)
    with pytest.raises(Exception, match=r"Missing \[UNK\]"):
        theirs(folder, 128)


def test_a_byte_order_mark_in_vocab_txt_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY), encoding="utf-8-sig")
    with pytest.raises(ModelError, match=r"begins with a byte order mark.*remove it"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("num_rows", "is_added"), [(None, True), (91, True), (90, False)])
def test_missing_special_tokens_are_added_if_there_is_room(
    tmp_path: Path, num_rows: int | None, is_added: bool
) -> None:
    """Without room transformers gives it an id that the model does not have."""
    config = {} if num_rows is None else {"vocab_size": num_rows}
    folder = make_folder(tmp_path / "m", config=config)
    vocabulary = [token for token in VOCABULARY if token != "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    assert (ours(folder, 128) == theirs(folder, 128)) == is_added
    assert (load_tokenizer(folder).token_to_id("[MASK]") == 90) == is_added
    check_vocabulary(load_tokenizer(folder), num_rows or 91, folder)


def test_an_empty_last_line_of_vocab_txt_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m")
    (folder / "vocab.txt").write_text("\n".join(SMALL) + "\n\n", encoding="utf-8")
    with pytest.raises(ModelError, match=r"an empty line of vocab\.txt \(remove it\)"):
        check_vocabulary(load_tokenizer(folder), len(SMALL), folder)


def test_vocab_txt_alone_is_enough(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    shutil.copy(make_folder(tmp_path / "n") / "vocab.txt", tmp_path / "m")
    assert os.listdir(tmp_path / "m") == ["vocab.txt"]
    assert ours(tmp_path / "m", 128) == ours(tmp_path / "n", 128)
