"""Scores equal to scikit-learn's."""

import warnings
from functools import partial

import numpy as np
import pytest
import sklearn.metrics

from twostage.training.metrics import Metrics, average_precision, compute_metrics

CASES = {
    "two classes": ([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], 2),
    "tail never predicted": ([0, 0, 1, 1, 1], [1, 1, 1, 1, 1], 2),
    "tail absent": ([1, 1, 1], [1, 0, 1], 2),
    "class absent from both": ([0, 0, 2], [0, 2, 2], 3),
    "class predicted but absent": ([0, 0, 2], [0, 1, 2], 3),
    "all wrong": ([0, 1], [1, 0], 2),
    "one row": ([1], [1], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_sklearns(case: str) -> None:
    labels_N, predictions_N = map(np.array, CASES[case][:2])
    logits_NC = np.random.default_rng(0).normal(size=(len(labels_N), CASES[case][2]))
    logits_NC[np.arange(len(labels_N)), predictions_N] += 10
    check(labels_N, logits_NC.astype(np.float32))


@pytest.mark.parametrize("num_classes", [2, 5, 52])
def test_scores_equal_sklearns_on_random_labels(num_classes: int) -> None:
    generator = np.random.default_rng(num_classes)
    logits_NC = 3 * generator.normal(size=(300, num_classes)).astype(np.float32)
    check(generator.integers(num_classes, size=300), logits_NC)


def test_average_precision_counts_equal_scores_at_once() -> None:
    generator = np.random.default_rng(0)
    for _ in range(50):
        is_class_N = generator.random(30) < 0.2
        is_class_N[0] = True
        scores_N = generator.integers(4, size=30) / 4
        expected = sklearn.metrics.average_precision_score(is_class_N, scores_N)
        assert average_precision(is_class_N, scores_N) == pytest.approx(expected)


@pytest.mark.slow
def test_mcc_of_many_texts_does_not_overflow() -> None:
    labels_N = np.tile([0, 1, 1, 1, 1], 2_000_000)
    logits_NC = np.eye(2, dtype=np.float32)[np.roll(labels_N, 1)]
    expected = sklearn.metrics.matthews_corrcoef(labels_N[:5], logits_NC.argmax(axis=1)[:5])
    assert compute_metrics(labels_N, logits_NC).mcc == pytest.approx(expected)


def test_no_text_at_all_scores_zero() -> None:
    metrics = compute_metrics(np.zeros(0, dtype=np.int64), np.zeros((0, 3), dtype=np.float32))
    assert (metrics.macro_f1, metrics.micro_f1, metrics.mcc) == (0.0, 0.0, 0.0)
    assert metrics.average_precision_C.tolist() == [0.0, 0.0, 0.0]


def check(labels_N: np.ndarray, logits_NC: np.ndarray) -> None:
    with warnings.catch_warnings():
        # scikit-learn warns of a class without a text; what it returns then is what we compare
        warnings.simplefilter("ignore", UserWarning)
        compare(compute_metrics(labels_N, logits_NC), labels_N, logits_NC)


def compare(ours: Metrics, labels_N: np.ndarray, logits_NC: np.ndarray) -> None:
    predictions_N = logits_NC.argmax(axis=1)
    classes = list(range(logits_NC.shape[1]))
    each = sklearn.metrics.precision_recall_fscore_support(
        labels_N, predictions_N, labels=classes, zero_division=0
    )
    for mine, theirs in zip(
        (ours.precision_C, ours.recall_C, ours.f1_C, ours.support_C), each, strict=True
    ):
        np.testing.assert_allclose(mine, theirs)
    f1 = partial(sklearn.metrics.f1_score, labels_N, predictions_N, zero_division=0)
    occurring = np.unique(labels_N).tolist()
    assert ours.macro_f1 == pytest.approx(f1(average="macro", labels=occurring))
    assert ours.micro_f1 == pytest.approx(f1(average="micro", labels=classes))
    for value, score in (
        (ours.micro_f1, sklearn.metrics.accuracy_score),
        (ours.balanced_accuracy, sklearn.metrics.balanced_accuracy_score),
        (ours.mcc, sklearn.metrics.matthews_corrcoef),
    ):
        assert value == pytest.approx(score(labels_N, predictions_N))
    probabilities_NC = np.exp(logits_NC.astype(np.float64))
    probabilities_NC /= probabilities_NC.sum(axis=1, keepdims=True)
    for c in classes:
        expected = sklearn.metrics.average_precision_score(labels_N == c, probabilities_NC[:, c])
        assert ours.average_precision_C[c] == pytest.approx(expected)
    expected = sklearn.metrics.confusion_matrix(labels_N, predictions_N, labels=classes)
    assert np.array_equal(ours.confusion_CC, expected)
