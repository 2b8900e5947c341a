"""Scores equal to scikit-learn's."""

import numpy as np
import pytest
import sklearn.metrics

from twostage.training.metrics import compute_metrics

CASES = {
    "two classes": ([0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 0, 0], 2),
    "tail never predicted": ([0, 0, 1, 1, 1], [1, 1, 1, 1, 1], 2),
    "class absent from both": ([0, 0, 2], [0, 2, 2], 3),
    "all wrong": ([0, 1], [1, 0], 2),
    "one row": ([1], [1], 2),
}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_sklearns(case: str) -> None:
    check(*map(np.array, CASES[case][:2]), CASES[case][2])


@pytest.mark.parametrize("num_classes", [2, 5, 52])
def test_scores_equal_sklearns_on_random_labels(num_classes: int) -> None:
    generator = np.random.default_rng(num_classes)
    check(*generator.integers(num_classes, size=(2, 300)), num_classes)


def check(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> None:
    ours = compute_metrics(labels_N, predictions_N, num_classes)
    all_classes = list(range(num_classes))
    options = {"labels": all_classes, "zero_division": 0}
    f1 = sklearn.metrics.f1_score
    np.testing.assert_allclose(ours.f1_C, f1(labels_N, predictions_N, average=None, **options))
    assert ours.macro_f1 == pytest.approx(f1(labels_N, predictions_N, average="macro", **options))
    assert ours.micro_f1 == pytest.approx(f1(labels_N, predictions_N, average="micro", **options))
    assert ours.micro_f1 == pytest.approx(sklearn.metrics.accuracy_score(labels_N, predictions_N))
    expected = sklearn.metrics.confusion_matrix(labels_N, predictions_N, labels=all_classes)
    assert np.array_equal(ours.confusion_CC, expected)
