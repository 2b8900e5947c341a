"""What is cleaned off an answer, and what an answer is worth."""

import pytest

from twostage.augmentation.quality import (
    COPY,
    EMPTY,
    GOOD,
    REFUSED,
    TRUNCATED,
    clean,
    judge,
    lexical_overlap,
    normalize,
)
from twostage.data.tables import Table


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("  a fine film \n", "a fine film"),
        ("Rephrased: a fine film", "a fine film"),
        ("Rephrased phrase:\n\na fine film", "a fine film"),
        ("PARAPHRASE: a fine film", "a fine film"),
        ("Alternative phrasing: a fine film", "Alternative phrasing: a fine film"),
        ("Sure! Here's a rephrased version: a fine film", "a fine film"),
        ("Here is an alternative sentence: a fine film", "a fine film"),
        ("Rephrased: “a fine film”", "a fine film"),
        ('"a fine film"', "a fine film"),
        ("'it's a fine film'", "it's a fine film"),
        ("«un beau film»", "un beau film"),
        ("---\n\na fine film\n\n---", "a fine film"),
        ("a\x00 fine\x1b film\ud83d", "a fine film"),
        ("<think>\nhm, a film\n</think>\n\na fine film", "a fine film"),
        # left alone
        ('"fine" and "good"', '"fine" and "good"'),
        ("a film 'of note'", "a film 'of note'"),
        ("rephrase it as you like", "rephrase it as you like"),
        ("the verdict: a fine film", "the verdict: a fine film"),
        ("a fine --- film", "a fine --- film"),
        ('"', '"'),
        ("", ""),
    ],
)
def test_cleaning(content: str, text: str) -> None:
    assert clean(content, "a good film") == text


@pytest.mark.parametrize(
    ("content", "source"),
    [
        ('"a fine film"', '"a good film"'),
        ("Rephrased: a fine film", "paraphrase: a good film"),
        ("a\n---", "b\n---"),
    ],
)
def test_what_the_source_has_too_is_not_cleaned_off(content: str, source: str) -> None:
    assert clean(content, source) == content


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that.",
        "I’m sorry, but I cannot fulfill this request.",
        "I'm sorry, but you haven't provided a phrase.",
        "I apologize, but the phrase you provided is incomplete.",
        "As an AI language model, I have no opinion.",
        "I cannot provide that.",
        "I'm unable to help you rewrite that.",
        "I don't have enough context to rephrase this.",
        "It seems like your phrase is incomplete. Could you provide more?",
        "Please provide the text you would like me to rephrase.",
        "Could you please provide more context?",
        "Unfortunately, I am not able to assist.",
    ],
)
def test_a_model_that_declines_is_recognised(text: str) -> None:
    assert judge(text, "stop", "a good film") == REFUSED
    assert judge(text, "stop", text + " Or so.") == GOOD, "a source may sound like that itself"


@pytest.mark.parametrize(
    "text",
    [
        "i can't help but like it",
        "Sorry, wrong number: a film for nobody",
        "Unfortunately the film is dull",
        "I am sorry, but I cannot recommend this film.",
        "it looks like a film made to provide thrills",
        "please provide a film with heart",
        "a sorry excuse for a film",
        "I don't have any patience for this film",
        "I can't generate enthusiasm for this film",
        "As an AI thriller it barely works.",
        "Unfortunately, the text is missing a plot",
    ],
)
def test_a_text_that_only_sounds_like_it_is_not(text: str) -> None:
    assert judge(text, "stop", "a good film") == GOOD


def test_no_real_snippet_is_taken_for_a_refusal(snippets: Table) -> None:
    refused = [text for text in snippets.texts if judge(text, "stop", "something else") != GOOD]
    assert refused == []


@pytest.mark.parametrize(
    ("text", "reason", "verdict"),
    [
        ("a fine film", "stop", GOOD),
        ("a fine", "length", TRUNCATED),
        ("", "length", TRUNCATED),
        ("", "stop", EMPTY),
        ("", "refusal", REFUSED),
        ("a fine", "content_filter", REFUSED),
        ("", "prompt_filter", REFUSED),
        ("A GOOD  film!", "stop", COPY),
        ("a good, film", "stop", COPY),
    ],
)
def test_verdicts(text: str, reason: str, verdict: str) -> None:
    assert judge(text, reason, "a good film") == verdict


def test_normalisation_keeps_texts_without_words_apart() -> None:
    assert normalize("!!") != normalize("??")
    assert normalize("Straße, NR. 1") == normalize("strasse nr 1")


def test_lexical_overlap_is_the_jaccard_index_of_the_words() -> None:
    assert lexical_overlap("a fine film", "a good film") == pytest.approx(2 / 4)
    assert lexical_overlap("a good film", "A good film!") == 1.0
    assert lexical_overlap("dull", "a good film") == 0.0
    assert lexical_overlap("", "") == 1.0
