"""Token ids equal to transformers', on the demo's texts and on hostile ones."""

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import transformers

from twostage.data.tables import Table, read_table
from twostage.data.token_store import TokenStore
from twostage.data.tokenization import load_tokenizer, tokenize
from twostage.errors import DataError, ModelError

HOSTILE = [
    "",
    " ",
    "\t\n\r",
    "🙂 emoji 👩‍👩‍👧‍👦 🏳️‍🌈",
    "漢字 and かな and 한국어",
    "nul \0 bell \a escape \x1b soft\xadhyphen zero\u200bwidth \ufeff bom",
    "İstanbul ﬁne ½ ÀÉÎÕÜ ñ ß Straße ẞ",
    "e\u0301 combining \u0327\u0301",
    "مرحبا שלום नमस्ते ภาษาไทย",
    "[CLS] [SEP] [MASK] [PAD] [UNK] [cls] ##ing",
    "word" * 60,
    "don't stop-me_now! (ok?) $3.50 <br/> http://x.y/z?q=1&r=2",
    "\U0010ffff \ud7ff \ue000 \ufffd",
    "x" * 100_000,
    "a b " * 25_000,
    "。" * 1_000,
]


def ids_of(store: TokenStore) -> list[list[int]]:
    bounds = store.offsets.tolist()
    return [store.ids[a:b].tolist() for a, b in pairwise(bounds)]


def without_tokenizer_json(source: Path, target: Path, **settings: object) -> Path:
    target.mkdir()
    shutil.copy(source / "vocab.txt", target)
    if settings:
        config = {"tokenizer_class": "BertTokenizer", **settings}
        (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def theirs(folder: Path, texts: list[str], max_length: int) -> list[list[int]]:
    tokenizer = transformers.BertTokenizer.from_pretrained(folder)
    out = tokenizer(texts, truncation=True, max_length=max_length, padding=False)
    return out["input_ids"]


@pytest.mark.parametrize("max_length", [128, 512])
def test_ids_equal_transformers_on_hostile_texts(demo_folder: Path, max_length: int) -> None:
    folder = demo_folder / "model"
    store = tokenize(load_tokenizer(folder), HOSTILE, max_length)
    assert ids_of(store) == theirs(folder, HOSTILE, max_length)
    assert store.lengths.tolist() == [len(ids) for ids in ids_of(store)]


@pytest.mark.slow
def test_ids_equal_transformers_on_every_text_of_the_demo_data(
    demo_folder: Path, snippets: Table
) -> None:
    folder = demo_folder / "model"
    texts = [*snippets.texts, *read_table(demo_folder / "dev.tsv").texts]
    assert len(texts) == 12_752
    assert ids_of(tokenize(load_tokenizer(folder), texts, 128)) == theirs(folder, texts, 128)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_lower_case": True},
        {"do_lower_case": False},
        {"do_lower_case": False, "strip_accents": True},
        {"do_lower_case": True, "tokenize_chinese_chars": False},
    ],
)
def test_a_tokenizer_from_vocab_txt_equals_transformers(
    demo_folder: Path, snippets: Table, tmp_path: Path, settings: dict[str, object]
) -> None:
    folder = without_tokenizer_json(demo_folder / "model", tmp_path / "m", **settings)
    texts = HOSTILE + list(snippets.texts[:300])
    assert ids_of(tokenize(load_tokenizer(folder), texts, 128)) == theirs(folder, texts, 128)


def test_without_any_settings_vocab_txt_means_lower_case(demo_folder: Path, tmp_path: Path) -> None:
    folder = without_tokenizer_json(demo_folder / "model", tmp_path / "m")
    lower, upper = ids_of(tokenize(load_tokenizer(folder), ["a fine film", "A FINE Film"], 128))
    assert lower == upper


def test_truncation_and_padding_baked_into_a_folder_are_overridden(demo_folder: Path) -> None:
    tokenizer = load_tokenizer(demo_folder / "model")
    assert len(tokenizer.encode("good").ids) == 3
    assert len(tokenizer.encode("good " * 300).ids) == 302
    assert tokenize(tokenizer, ["good " * 300, "good"], 5).lengths.tolist() == [5, 3]


def test_no_texts_give_an_empty_store(demo_folder: Path) -> None:
    assert len(tokenize(load_tokenizer(demo_folder / "model"), [], 128)) == 0


def test_an_unpaired_surrogate_is_refused_by_row(demo_folder: Path) -> None:
    tokenizer = load_tokenizer(demo_folder / "model")
    with pytest.raises(DataError, match="text 1 holds an unpaired surrogate"):
        tokenize(tokenizer, ["fine", "b\ud800d"], 128)
    assert tokenizer.truncation is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [("[]", "not hold a JSON object"), ('{"do_lower_case": "no"}', "wrong type"), ("{", "JSON")],
)
def test_broken_settings_beside_vocab_txt_are_refused(
    demo_folder: Path, tmp_path: Path, settings: str, message: str
) -> None:
    folder = without_tokenizer_json(demo_folder / "model", tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json.*{message}"):
        load_tokenizer(folder)


def test_a_tokenizer_that_does_not_add_cls_and_sep_is_refused(
    demo_folder: Path, tmp_path: Path
) -> None:
    described = json.loads((demo_folder / "model" / "tokenizer.json").read_text())
    described["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(ModelError, match=r"does not put \[CLS\] and \[SEP\] around"):
        load_tokenizer(tmp_path)


def test_folders_without_a_usable_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ModelError, match=r"vocab\.txt lacks"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[CLS]\n\xff\n")
    with pytest.raises(ModelError, match=r"vocab\.txt is not .* valid UTF-8"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json is not a readable tokenizer"):
        load_tokenizer(tmp_path)
