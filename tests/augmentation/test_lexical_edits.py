"""Offline edits: what changes, how much, drawn from which words, and the same everywhere."""

import hashlib
import os
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twostage.augmentation.lexical_edits import LexicalEditor

# Classes whose words nobody else has, so that a drawn word tells where it came from.
TEXTS = ["x y z", "p q", "x x y", "r"]
LABELS_N = np.array([0, 1, 0, 1])
WORDS_OF = {0: {"x", "y", "z"}, 1: {"p", "q", "r"}}
SOURCE = [f"w{i}" for i in range(20)]  # 20 words that differ: 2 edits


def operation_of(source: list[str], edited: list[str]) -> str:
    """Which operation it was, for a source without repeats and a vocabulary without its words."""
    if len(edited) > len(source):
        return "insert"
    if len(edited) < len(source):
        return "delete"
    return "swap" if sorted(edited) == sorted(source) else "replace"


def edits_by_operation(
    source: list[str], label: int, num_draws: int = 400
) -> dict[str, list[list[str]]]:
    editor = LexicalEditor(TEXTS, LABELS_N)
    edits: dict[str, list[list[str]]] = {}
    for k in range(num_draws):
        edited = editor.edit(" ".join(source), label, f"draw {k}").split(" ")
        edits.setdefault(operation_of(source, edited), []).append(edited)
    return edits


def is_subsequence(part: list[str], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


def test_edits_are_the_same_in_processes_that_hash_differently() -> None:
    code = """
import numpy as np
from twostage.augmentation.lexical_edits import LexicalEditor
texts = [" ".join(f"w{(7 * i + j) % 31}é" for j in range(12)) for i in range(40)]
editor = LexicalEditor(texts, np.arange(40) % 2)
for i, text in enumerate(texts):
    print(ascii(editor.edit(text, i % 2, f"key {i}")))
"""
    outputs = set()
    for hash_seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
        assert process.stdout.count("\n") == 40
        outputs.add(process.stdout)
    assert len(outputs) == 1


def test_the_order_of_calls_and_of_the_corpus_rows_changes_nothing() -> None:
    calls = [(" ".join(SOURCE), k % 2, f"draw {k}") for k in range(100)]
    editor = LexicalEditor(TEXTS, LABELS_N)
    forward = [editor.edit(*call) for call in calls]
    backward = [editor.edit(*call) for call in reversed(calls)]
    assert backward[::-1] == forward
    turned_round = LexicalEditor(TEXTS[::-1], LABELS_N[::-1])
    assert [turned_round.edit(*call) for call in calls] == forward


def test_neither_the_callers_list_nor_the_global_generator_plays_a_part() -> None:
    texts = list(TEXTS)
    editor = LexicalEditor(texts, LABELS_N)
    before = [editor.edit("a b c", 0, f"draw {k}") for k in range(50)]
    texts[:] = ["other"] * 4
    random.seed(271828)
    state = random.getstate()
    assert [editor.edit("a b c", 0, f"draw {k}") for k in range(50)] == before
    assert random.getstate() == state


def test_another_key_is_another_draw() -> None:
    editor = LexicalEditor(TEXTS, LABELS_N)
    edits = {editor.edit(" ".join(SOURCE), 0, f"draw {k}") for k in range(100)}
    assert len(edits) > 95


def test_the_four_operations_come_equally_often() -> None:
    edits = edits_by_operation(SOURCE, 0, num_draws=4000)
    assert set(edits) == {"swap", "delete", "insert", "replace"}
    for drawn in edits.values():
        assert len(drawn) == pytest.approx(1000, abs=110)  # four standard deviations of 27.4


@pytest.mark.parametrize(
    ("num_words", "num_edits"),
    [(2, 1), (3, 1), (10, 1), (14, 1), (15, 2), (20, 2), (26, 3), (100, 10), (512, 51)],
)
def test_a_tenth_of_the_words_is_edited_and_at_least_one(num_words: int, num_edits: int) -> None:
    source = [f"w{i}" for i in range(num_words)]
    edits = edits_by_operation(source, 0, num_draws=100)
    assert set(edits) == {"swap", "delete", "insert", "replace"}
    for edited in edits["delete"]:
        assert len(edited) == num_words - num_edits
        assert is_subsequence(edited, source)
    for edited in edits["insert"]:
        assert len(edited) == num_words + num_edits
        assert is_subsequence(source, edited)
    for edited in edits["replace"]:
        changed = [new for old, new in zip(source, edited, strict=True) if old != new]
        assert len(changed) == num_edits
        assert set(changed) <= WORDS_OF[0]
    # Each swap moves at most two words. Swaps may share a word, so the most is reached by some.
    moved = [sum(a != b for a, b in zip(source, edited, strict=True)) for edited in edits["swap"]]
    assert min(moved) >= 2
    assert max(moved) <= 2 * num_edits
    if num_edits <= 3 and num_words >= 2 * num_edits:
        assert max(moved) == 2 * num_edits


def test_every_position_is_edited_by_every_operation() -> None:
    source = ["a", "b", "c", "d"]
    edits = edits_by_operation(source, 0)
    assert {" ".join(edited) for edited in edits["delete"]} == {"b c d", "a c d", "a b d", "a b c"}
    assert {" ".join(edited) for edited in edits["swap"]} == {
        "b a c d", "c b a d", "d b c a", "a c b d", "a d c b", "a b d c"
    }  # fmt: skip
    inserted = {next(i for i, word in enumerate(e) if word in WORDS_OF[0]) for e in edits["insert"]}
    assert inserted == {0, 1, 2, 3, 4}
    replaced = {next(i for i in range(4) if e[i] != source[i]) for e in edits["replace"]}
    assert replaced == {0, 1, 2, 3}


@pytest.mark.parametrize("label", [0, 1])
def test_new_words_are_those_of_the_texts_own_class(label: int) -> None:
    edits = edits_by_operation(SOURCE, label)
    for operation in ("insert", "replace"):
        new = {word for edited in edits[operation] for word in edited} - set(SOURCE)
        assert new == WORDS_OF[label]


def test_words_are_drawn_as_often_as_the_class_uses_them() -> None:
    texts = ["the " * 6 + "film film film was", "the " * 100]
    editor = LexicalEditor(texts, np.array([0, 1]))
    drawn: dict[str, Counter[str]] = {"insert": Counter(), "replace": Counter()}
    for k in range(4000):
        edited = editor.edit(" ".join(SOURCE), 0, f"draw {k}").split()
        operation = operation_of(SOURCE, edited)
        if operation in drawn:
            drawn[operation].update(word for word in edited if word not in SOURCE)
    for counts in drawn.values():
        total = counts.total()
        assert total > 1800
        for word, share in (("the", 0.6), ("film", 0.3), ("was", 0.1)):
            assert counts[word] / total == pytest.approx(share, abs=0.045)


def test_a_replaced_word_leaves_the_others_their_proportions() -> None:
    # "b" stands in the middle of the sorted vocabulary and makes nine tenths of it.
    editor = LexicalEditor(["a a a " + "b " * 54 + "c c d"], np.array([0]))
    edits = Counter(editor.edit("b", 0, f"draw {k}") for k in range(4000))
    replaced = {word: count for word, count in edits.items() if " " not in word}
    total = sum(replaced.values())
    assert total == pytest.approx(2000, abs=130)
    assert set(replaced) == {"a", "c", "d"}
    for word, share in (("a", 3 / 6), ("c", 2 / 6), ("d", 1 / 6)):
        assert replaced[word] / total == pytest.approx(share, abs=0.045)


@pytest.mark.parametrize("word", ["a", "b", "c"])
def test_a_replaced_word_is_never_itself(word: str) -> None:
    editor = LexicalEditor(["a b c"], np.array([0]))
    replaced = {editor.edit(word, 0, f"draw {k}") for k in range(200)}
    assert {edited for edited in replaced if " " not in edited} == {"a", "b", "c"} - {word}


def test_a_text_of_one_word_gets_a_second_one_or_another_one() -> None:
    editor = LexicalEditor(["x", "y"], np.array([0, 0]))
    edits = Counter(editor.edit("x", 0, f"draw {k}") for k in range(400))
    assert set(edits) == {"x x", "x y", "y x", "y"}
    assert edits["y"] == pytest.approx(200, abs=40)


@pytest.mark.parametrize("empty", ["", " ", "\t\n\u00a0"])
def test_an_empty_text_gets_a_word_of_its_class(empty: str) -> None:
    editor = LexicalEditor(TEXTS, LABELS_N)
    assert {editor.edit(empty, 1, f"draw {k}") for k in range(100)} == WORDS_OF[1]


def test_an_empty_text_of_a_class_without_words_comes_back() -> None:
    editor = LexicalEditor(["", " \t", "x"], np.array([0, 0, 1]))
    assert editor.edit("", 0, "draw") == ""
    assert editor.edit(" \t", 0, "draw") == " \t"


def test_a_class_without_words_still_swaps_and_deletes() -> None:
    editor = LexicalEditor([""], np.array([0]))
    assert {editor.edit("a b", 0, f"draw {k}") for k in range(50)} == {"b a", "a", "b"}
    assert editor.edit("a", 0, "draw") == "a"


def test_one_distinct_word_in_a_class_replaces_only_others() -> None:
    editor = LexicalEditor(["so so so"], np.array([0]))
    assert {editor.edit("so", 0, f"draw {k}") for k in range(50)} == {"so so"}
    assert {editor.edit("so so", 0, f"draw {k}") for k in range(50)} == {"so", "so so so"}
    # 20 words ask for two edits; one alone can be replaced.
    source = "so " * 19 + "good"
    edits = {editor.edit(source, 0, f"draw {k}") for k in range(200)}
    assert " ".join(["so"] * 20) in edits
    assert source not in edits


def test_swaps_that_cancel_out_are_drawn_again() -> None:
    # Two swaps of a text with one odd word end where they began in one case of 14.
    source = "a " * 14 + "b"
    editor = LexicalEditor([""], np.array([0]))
    edits = [editor.edit(source, 0, f"draw {k}") for k in range(1000)]
    assert source not in edits
    assert sum(len(edited.split()) == 15 for edited in edits) > 400


def test_words_are_split_at_any_white_space_and_joined_by_one_space() -> None:
    editor = LexicalEditor(["naïve\u3000映画 🙂\n«очень»"], np.array([0]))
    seen = set()
    for k in range(200):
        edited = editor.edit("naïve\u00a0 映画\t🙂", 0, f"Schlüssel {k}")
        words = edited.split(" ")
        assert edited == " ".join(edited.split())
        seen.update(words)
    assert seen == {"naïve", "映画", "🙂", "«очень»"}


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 0, 0, 1, 1]])
def test_as_many_labels_as_texts_are_asked_for(labels: list[int]) -> None:
    with pytest.raises(ValueError, match="zip"):
        LexicalEditor(TEXTS, np.array(labels))


# Few words and many repeats, where an edit most easily changes nothing.
SMALL_TEXTS = st.lists(st.sampled_from(["a", "b", "ü"]), max_size=40).map(" ".join)


@given(
    st.lists(st.tuples(st.one_of(SMALL_TEXTS, st.text()), st.integers(0, 2)), min_size=1),
    st.text(),
)
def test_every_text_of_any_corpus_changes_and_is_never_empty(
    rows: list[tuple[str, int]], key: str
) -> None:
    editor = LexicalEditor([text for text, _ in rows], np.array([label for _, label in rows]))
    words_of: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    for text, label in rows:
        words_of[label].update(text.split())
    for text, label in rows:
        edited = editor.edit(text, label, key)
        if words_of[label]:
            assert edited.split() != text.split()
            assert edited.split()
            assert set(edited.split()) <= words_of[label]
        else:
            assert edited == text


def test_the_draw_is_seeded_with_the_sha256_of_the_key() -> None:
    editor = LexicalEditor(["x", "y"], np.array([0, 0]))
    for k in range(30):
        rng = random.Random(int(hashlib.sha256(f"draw {k}".encode()).hexdigest(), 16))
        operation = rng.choice(["insert", "replace"])
        assert (operation == "replace") == (editor.edit("x", 0, f"draw {k}") == "y")
