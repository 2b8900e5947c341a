"""Scores of a classifier on imbalanced data, in numpy.

From the confusion matrix M (row: true class, column: predicted class), for class c

    precision = M_cc / Σ_r M_rc,   recall = M_cc / Σ_k M_ck,   F1 = 2 M_cc / (Σ_r M_rc + Σ_k M_ck)

with 0 where a denominator is 0. Macro-F1 is the mean of the F1s. Micro-F1 adds up the counts of all
classes first; where each text has one label that is the accuracy, which a long tail barely moves.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Metrics:
    """Scores on one data set; C classes."""

    confusion_CC: np.ndarray
    """[C, C] int64: row the true class, column the predicted one."""
    f1_C: np.ndarray
    """[C] float64."""
    macro_f1: float
    micro_f1: float
    """The accuracy."""


def compute_metrics(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> Metrics:
    """labels_N, predictions_N: [N] integers in 0 … C-1."""
    confusion_CC = confusion_matrix(labels_N, predictions_N, num_classes)
    hits_C = np.diag(confusion_CC)
    total_C = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1)
    f1_C = np.divide(2.0 * hits_C, total_C, out=np.zeros(num_classes), where=total_C > 0)
    return Metrics(
        confusion_CC=confusion_CC,
        f1_C=f1_C,
        macro_f1=float(f1_C.mean()),
        micro_f1=float(hits_C.sum() / max(1, confusion_CC.sum())),
    )


def confusion_matrix(
    labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int
) -> np.ndarray:
    """[C, C] counts: row the true class, column the predicted one."""
    cells = labels_N * num_classes + predictions_N
    return np.bincount(cells, minlength=num_classes**2).reshape(num_classes, num_classes)
