"""What is said of model and data before training, with right numbers, and only if it is so."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from twostage.data.tables import Table
from twostage.facts import find_facts
from twostage.preparation import prepare_run
from twostage.recipe import Recipe

RECIPE = Recipe(method="vanilla", device="cpu")
GOOD = [f"a fine film number {i}" for i in range(30)]
BAD = [f"a dull film number {i}" for i in range(20)]
TEST = [f"another film number {i}" for i in range(40)]
CLEAN = Table([*GOOD, *BAD], [1] * 30 + [0] * 20)
CLEAN_TEST = Table(TEST, [1, 0] * 20)


def facts(
    model: Path,
    train: Table = CLEAN,
    test: Table = CLEAN_TEST,
    recipe: Recipe = RECIPE,
    augmented: Table | None = None,
) -> list[str]:
    return find_facts(prepare_run(model, train, test, recipe, augmented))


def with_texts(table: Table, texts: Sequence[str], label: str | int = 1) -> Table:
    return Table([*table.texts, *texts], [*table.labels, *[label] * len(texts)])


def test_nothing_is_said_of_clean_data(tiny: Path) -> None:
    assert facts(tiny) == []


def test_cut_texts_are_counted_by_table(tiny: Path) -> None:
    recipe = replace(RECIPE, max_length=9)
    exact, longer = "a film " * 3 + "x", "a film " * 4
    train = with_texts(CLEAN, [exact, longer, longer, "word " * 5_000])
    test = with_texts(CLEAN_TEST, [exact, longer])
    assert facts(tiny, with_texts(CLEAN, [exact]), recipe=recipe) == []
    assert facts(tiny, train, test, recipe)[:1] == [
        "3 of 54 training texts and 1 of 42 test texts are cut at 9 tokens (--max-length can be up "
        "to 512)"
    ]
    longest = with_texts(CLEAN, ["word " * 511])
    assert facts(tiny, longest, recipe=replace(recipe, max_length=512)) == [
        "1 of 51 training texts is cut at 512 tokens"
    ]


def test_texts_without_anything_to_read_are_counted(tiny: Path) -> None:
    train = with_texts(
        CLEAN, ["", " \u200b", "\U0001f642", "\U0001f642 \U0001f600", "\U0001f642 a"]
    )
    test = with_texts(CLEAN_TEST, ["\t"])
    assert facts(tiny, train, test) == [
        "2 of 55 training texts and 1 of 41 test texts are empty",
        "2 of 55 training texts are made of nothing but unknown tokens",
    ]


def test_augmented_texts_count_too(tiny: Path) -> None:
    augmented = Table(["", "a film " * 100, *GOOD], [0] * 2 + [1] * 30)
    recipe = replace(RECIPE, method="augment", max_length=64)
    said = facts(tiny, recipe=recipe, augmented=augmented)
    assert "1 of 32 augmented texts is cut at 64 tokens (--max-length can be up to 512)" in said
    assert "1 of 32 augmented texts is empty" in said


def test_test_rows_among_the_augmented_ones_count_too(tiny: Path) -> None:
    augmented = Table([*GOOD, TEST[0], TEST[1].upper(), "b"], [1] * 30 + [1, 1, 0])
    recipe = replace(RECIPE, method="augment")
    assert facts(tiny, recipe=recipe, augmented=augmented)[1:] == [
        "of 40 test texts, 1 stand in the training data too (2 when case, white space and Unicode "
        "form are ignored, 1 of them only under another class): scores on them say nothing of new "
        "texts"
    ]


def test_no_text_is_called_empty_that_was_cut_to_nothing(tiny: Path) -> None:
    (said,) = facts(tiny, recipe=replace(RECIPE, max_length=2))
    assert said.startswith("50 of 50 training texts and 40 of 40 test texts are cut at 2 tokens")


def test_test_rows_that_were_trained_on_are_counted(tiny: Path) -> None:
    test = with_texts(
        CLEAN_TEST,
        [GOOD[0], GOOD[0], GOOD[1], BAD[0], "A FINE  film number 2", "ａ fine film number 3\n"],
    )
    assert facts(tiny, test=test) == [
        "of 46 test texts, 4 stand in the training data too (6 when case, white space and Unicode "
        "form are ignored, 1 of them only under another class): scores on them say nothing of new "
        "texts"
    ]
    only_alike = with_texts(CLEAN_TEST, ["A FINE film number 2"])
    (said,) = facts(tiny, test=only_alike)
    assert said.startswith("of 41 test texts, 0 stand in the training data too (1 when")


def test_texts_under_two_classes_are_counted_with_their_rows(tiny: Path) -> None:
    train = with_texts(CLEAN, [GOOD[3], BAD[0], BAD[0], "A dull FILM number 1"])
    assert facts(tiny, train) == [
        "2 training texts stand under more than one class, in 5 rows (case, white space and "
        "Unicode form ignored), such as row 30 and row 51"
    ]
    (said,) = facts(tiny, with_texts(CLEAN, [GOOD[3]], 0))
    assert said.startswith("1 training text stands under more than one class, in 2 rows (case")
    in_file = replace(train, lines=range(2, 2 + len(train)))
    assert facts(tiny, in_file)[0].endswith("such as line 32 and line 53")


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        ({}, "7.56"),
        ({"class_weights": "inverse"}, "10.01"),
        ({"class_weights": "none"}, "1.00"),
        ({"class_weights": "none", "sampler": "class-balanced"}, "10.01"),
        ({"epochs_stage_1": 0}, None),
        ({"method": "vanilla"}, None),
    ],
)
def test_the_weights_of_stage_1_are_said(
    tiny: Path, changes: dict[str, Any], weights: str | None
) -> None:
    """On the demo's counts, where the effective number's ratio is known to be 7.56."""
    texts = [f"film {i}" for i in range(7_300)]
    train = Table(texts, [0] * 663 + [1] * 6_637)
    recipe = replace(RECIPE, **{"method": "reweight", **changes})
    said = facts(tiny, train, recipe=recipe)
    if weights is None:
        assert said == []
    else:
        assert said == [
            f"stage 1 starts with weights of {weights} : 1 for a text of class '0' against one of "
            "class '1', of which there are 10.01 times as many"
        ]


def test_of_balanced_data_no_weights_are_said(tiny: Path) -> None:
    augmented = Table([*GOOD, *GOOD], [0] * 30 + [1] * 30)
    assert facts(tiny, recipe=replace(RECIPE, method="augment"), augmented=augmented) == []
    balanced = Table([*GOOD[:20], *BAD], [1] * 20 + [0] * 20)
    assert facts(tiny, balanced, recipe=replace(RECIPE, method="reweight")) == []


def test_the_weights_of_augmented_data_are_those_of_its_counts(tiny: Path) -> None:
    augmented = Table([*GOOD, *GOOD], [0] * 40 + [1] * 20)
    (said,) = facts(tiny, recipe=replace(RECIPE, method="augment"), augmented=augmented)
    assert "weights of 1.00 : 1 for a text of class '0'" in said
    assert said.endswith("of which there are 0.50 times as many")


def test_classes_that_the_test_data_can_hardly_judge_are_named(tiny: Path) -> None:
    train = Table(GOOD, ["a", "b", "c"] * 10)
    test = Table(TEST[:12], ["a"] * 10 + ["b"] * 2)
    assert facts(tiny, train, test) == [
        "1 of 3 classes has no test row: 'c'",
        "1 of 3 classes has fewer than 10 test rows, so that scores move in large steps: 'b' (2)",
    ]


def change_tokenizer(folder: Path, *, lowercase: bool, capitals: bool, settings: object) -> None:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film", "another", "number"]
    vocabulary += ["Film", "Another"] * capitals
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))


CAPITALS = with_texts(CLEAN, ["A Film", "a FILM", "a film"])


def about_case(folder: Path, train: Table = CAPITALS) -> list[str]:
    return [fact for fact in facts(folder, train) if "capitals" in fact]


def test_a_cased_tokenizer_beside_an_uncased_vocabulary_is_told(tiny: Path) -> None:
    change_tokenizer(tiny, lowercase=True, capitals=False, settings={"do_lower_case": False})
    assert about_case(tiny) == [
        "the tokenizer keeps capitals, but only 0 of its tokens have any; 2 of 93 texts have "
        "capitals"
    ]


def test_the_same_in_tokenizer_json_alone_is_told(tiny: Path) -> None:
    change_tokenizer(tiny, lowercase=False, capitals=False, settings=None)
    assert about_case(tiny) == [
        "tokenizer.json keeps capitals, but its vocabulary has none, and tokenizer_config.json "
        "does not say so: the tokenizer lower-cases, as transformers does; 2 of 93 texts have "
        "capitals"
    ]


def test_an_uncased_tokenizer_beside_a_cased_vocabulary_is_told(tiny: Path) -> None:
    change_tokenizer(tiny, lowercase=True, capitals=True, settings=None)
    assert about_case(tiny) == [
        "the tokenizer lower-cases, but 2 of its tokens have capitals; 2 of 93 texts have capitals"
    ]


@pytest.mark.parametrize(
    ("lowercase", "name"), [(True, "bert-base-cased"), (False, "ann/bert-UNCASED")]
)
def test_a_tokenizer_against_the_name_of_the_model_is_told(
    tiny: Path, lowercase: bool, name: str
) -> None:
    change_tokenizer(
        tiny, lowercase=lowercase, capitals=not lowercase, settings={"do_lower_case": lowercase}
    )
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
    (said,) = about_case(tiny)
    assert f"but the model is named '{name.lower().removeprefix('ann/')}'" in said


def test_texts_without_capitals_have_nothing_to_lose(tiny: Path) -> None:
    change_tokenizer(tiny, lowercase=True, capitals=True, settings=None)
    assert about_case(tiny, CLEAN) == []


def test_a_model_in_the_hubs_cache_has_the_name_of_its_folder(tiny: Path) -> None:
    folder = tiny.parent / "models--ann--bert-cased" / "snapshots" / "0123"
    folder.parent.mkdir(parents=True)
    tiny.rename(folder)
    (said,) = about_case(folder)
    assert "the tokenizer lower-cases, but the model is named 'models--ann--bert-cased'" in said


@pytest.mark.parametrize("name", ["/home/cased/out", "ann/encased-bert", "cased-study/uncased"])
def test_names_that_only_look_like_it_are_none(tiny: Path, name: str) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"_name_or_path": name}))
    assert about_case(tiny) == []


@pytest.mark.parametrize("lowercase", [True, False])
def test_a_tokenizer_that_fits_is_not_spoken_of(tiny: Path, lowercase: bool) -> None:
    change_tokenizer(
        tiny, lowercase=lowercase, capitals=not lowercase, settings={"do_lower_case": lowercase}
    )
    assert about_case(tiny) == []


def test_a_tokenizer_of_another_size_is_told(tiny: Path) -> None:
    change_tokenizer(tiny, lowercase=True, capitals=False, settings=None)
    assert facts(tiny)[-1] == (
        "the model has 30,522 word embeddings, but the tokenizer's ids end at 7: it may be another "
        "model's"
    )


@pytest.mark.slow
def test_numbers_equal_those_of_a_plain_count(tiny: Path) -> None:
    generator = np.random.default_rng(0)
    words = ["film", "Film", "good", "", "\U0001f642", "dull"]

    def draw(rows: int) -> Table:
        texts = [
            " ".join(generator.choice(words, size=generator.integers(1, 5))) for _ in range(rows)
        ]
        return Table(texts, generator.integers(2, size=rows).tolist())

    def form(text: str) -> str:
        return " ".join(text.lower().split())

    train, test = draw(300), draw(100)
    said = " | ".join(facts(tiny, train, test))
    trained = {form(text) for text in train.texts}
    classes: dict[str, set[object]] = {}
    for text, label in zip(train.texts, train.labels, strict=True):
        classes.setdefault(form(text), set()).add(label)
    several = {text for text, labels in classes.items() if text and len(labels) > 1}
    shared = sum(form(text) in trained - {""} for text in test.texts)
    exact = sum(text in {*train.texts} and bool(text.strip()) for text in test.texts)
    rows = sum(form(text) in several for text in train.texts)
    assert f"of 100 test texts, {exact} stand in the training data too ({shared} when" in said
    assert f"{len(several)} training texts stand under more than one class, in {rows} rows" in said
    empty = sum(not text.strip() for text in train.texts)
    assert f"{empty} of 300 training texts and" in said
