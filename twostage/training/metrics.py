"""Scores of a classifier on imbalanced data, in numpy.

From the confusion matrix M (row: true class, column: predicted class; N texts), for class c

    precision = M_cc / Σ_r M_rc,   recall = M_cc / Σ_k M_ck,   F1 = 2 M_cc / (Σ_r M_rc + Σ_k M_ck)

with 0 where a denominator is 0. Macro-F1 is the mean F1 and balanced accuracy the mean recall of
the classes that occur: of the others nothing can be said. Micro-F1 adds up the counts of all
classes first; where each text has one label that is the accuracy, which a long tail barely moves.

Average precision judges the ranking of the texts by their probability of class c, so it does not
depend on a threshold: the mean precision at the places of the texts of that class.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Scores on one data set of N texts; C classes."""

    confusion_CC: np.ndarray
    """[C, C] int64: row the true class, column the predicted one."""
    precision_C: np.ndarray
    """[C] float64, as all per-class scores."""
    recall_C: np.ndarray
    f1_C: np.ndarray
    average_precision_C: np.ndarray
    """Class c against all others."""
    macro_f1: float
    """Mean F1 of the classes that occur."""
    micro_f1: float
    """The accuracy."""
    balanced_accuracy: float
    """Mean recall of the classes that occur."""
    mcc: float
    """Matthews correlation: 1 perfect, 0 no better than chance."""

    @property
    def support_C(self) -> np.ndarray:
        """[C] int64: texts of each true class."""
        return np.asarray(self.confusion_CC.sum(axis=1))


def compute_metrics(labels_N: np.ndarray, logits_NC: np.ndarray) -> Metrics:
    """labels_N: [N] integers in 0 … C-1. logits_NC: [N, C] floats."""
    num_classes = logits_NC.shape[1]
    confusion_CC = confusion_matrix(labels_N, logits_NC.argmax(axis=1), num_classes)
    hits_C = np.diag(confusion_CC)
    true_C, predicted_C = confusion_CC.sum(axis=1), confusion_CC.sum(axis=0)
    recall_C = _divide(hits_C, true_C)
    f1_C = _divide(2 * hits_C, true_C + predicted_C)
    probabilities_NC = softmax(logits_NC)
    return Metrics(
        confusion_CC=confusion_CC,
        precision_C=_divide(hits_C, predicted_C),
        recall_C=recall_C,
        f1_C=f1_C,
        average_precision_C=np.array(
            [average_precision(labels_N == c, probabilities_NC[:, c]) for c in range(num_classes)]
        ),
        macro_f1=_mean(f1_C[true_C > 0]),
        micro_f1=float(hits_C.sum() / max(1, len(labels_N))),
        balanced_accuracy=_mean(recall_C[true_C > 0]),
        mcc=matthews_correlation(confusion_CC),
    )


def confusion_matrix(
    labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int
) -> np.ndarray:
    """[C, C] counts: row the true class, column the predicted one."""
    cells = labels_N * num_classes + predictions_N
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)


def matthews_correlation(confusion_CC: np.ndarray) -> float:
    """Correlation of true and predicted class over the texts, 0 if either never varies.

    Source: Gorodkin 2004, "Comparing two K-category assignments by a K-category correlation
    coefficient".
    """
    counts_CC = confusion_CC.astype(np.float64)  # products of counts outgrow int64
    total, hits = counts_CC.sum(), np.trace(counts_CC)
    true_C, predicted_C = counts_CC.sum(axis=1), counts_CC.sum(axis=0)
    covariance = hits * total - true_C @ predicted_C
    variances = (total**2 - true_C @ true_C) * (total**2 - predicted_C @ predicted_C)
    return float(covariance / np.sqrt(variances)) if variances > 0 else 0.0


def average_precision(is_class_N: np.ndarray, scores_N: np.ndarray) -> float:
    """Σ_k (recall_k − recall_{k−1}) · precision_k over the distinct scores k, highest first.

    is_class_N: [N] bool. Texts of equal score count at once. 0 if no text is of the class.
    """
    order = np.argsort(-scores_N, kind="stable")
    hits_N = np.cumsum(is_class_N[order])
    last_N = np.append(np.diff(scores_N[order]) != 0, True)[: len(order)]  # of its score
    hits_K, seen_K = hits_N[last_N], np.flatnonzero(last_N) + 1
    recall_steps_K = np.diff(hits_K, prepend=0)
    return float((recall_steps_K * hits_K / seen_K).sum() / max(1, is_class_N.sum()))


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    """Probabilities, [N, C] float64."""
    shifted_NC = logits_NC.astype(np.float64)
    shifted_NC -= shifted_NC.max(axis=1, keepdims=True)
    exponentials_NC = np.exp(shifted_NC)
    return np.asarray(exponentials_NC / exponentials_NC.sum(axis=1, keepdims=True))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else 0.0


def _divide(numerator_C: np.ndarray, denominator_C: np.ndarray) -> np.ndarray:
    """Float64 quotients, 0 where the denominator is 0."""
    quotients_C = np.zeros(len(numerator_C))
    np.divide(numerator_C, denominator_C, out=quotients_C, where=denominator_C > 0)
    return quotients_C
