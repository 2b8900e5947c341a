"""Losses and class weights for imbalanced data.

`kernels/cross_entropy.py` computes these losses and their gradient in one pass.

Shapes: B examples, C classes, n_c training examples of class c.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError, UsageError

LOSSES = ("ldam", "ce")
CLASS_WEIGHTS = ("effective", "inverse", "inverse-sqrt", "none")

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits_BC, labels_B) → scalar."""


def cross_entropy(
    logits_BC: Tensor, labels_B: Tensor, class_weights_C: Tensor | None = None
) -> Tensor:
    """(Class-weighted) cross-entropy: −Σ_b w_{y_b} log softmax(logits_b)_{y_b} / Σ_b w_{y_b}.

    logits_BC: [B, C], any floating dtype; the arithmetic is fp32 (fp64 for fp64). labels_B: [B]
    int64. class_weights_C: [C], all ones when None. Source of the weighting: King & Zeng 2001,
    "Logistic Regression in Rare Events Data" (the weighted log-likelihood).
    """
    dtype = torch.promote_types(logits_BC.dtype, torch.float32)
    log_probabilities_BC = torch.log_softmax(logits_BC.to(dtype), dim=1)
    true_B = log_probabilities_BC.gather(1, labels_B[:, None])[:, 0]
    if class_weights_C is None:
        return -true_B.mean()
    weights_B = class_weights_C.to(dtype)[labels_B]
    return -(weights_B * true_B).sum() / weights_B.sum()


def ldam(
    logits_BC: Tensor,
    labels_B: Tensor,
    margins_C: Tensor,
    class_weights_C: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Label-distribution-aware margin loss: cross-entropy after lowering the true class's logit.

    margins_C: [C], from `ldam_margins`. scale: multiplies the logits after the margin. The LDAM
    paper scales by 30 because its logits are cosines in [-1, 1]; ours are unbounded.
    Source: Cao et al. 2019 (arXiv 1906.07413), equation 13.
    """
    lowered_BC = logits_BC - F.one_hot(labels_B, logits_BC.shape[1]) * margins_C
    return cross_entropy(scale * lowered_BC, labels_B, class_weights_C)


def ldam_margins(class_counts_C: Sequence[int], max_m: float = 0.5) -> Tensor:
    """m_c ∝ n_c^(-1/4), scaled so that the rarest class has margin `max_m`. [C] fp32.

    Source: Cao et al. 2019, equation 11.
    """
    counts_C = _checked_counts(class_counts_C)
    return (max_m * (counts_C / counts_C.min()) ** -0.25).float()


def effective_number_weights(class_counts_C: Sequence[int], beta: float = 0.9999) -> Tensor:
    """w_c ∝ (1 − β) / (1 − β^n_c), scaled to sum to C. [C] fp32.

    (1 − β^n) / (1 − β) is the effective number of n examples that overlap in what they show.
    Source: Cui et al. 2019 (arXiv 1901.05555), equation 2.
    """
    counts_C = _checked_counts(class_counts_C)
    return _scaled_to_sum((1 - beta) / (1 - beta**counts_C))


def inverse_frequency_weights(class_counts_C: Sequence[int], power: float = 1.0) -> Tensor:
    """w_c ∝ 1 / n_c^power, scaled to sum to C. [C] fp32.

    power 0.5 is the softer choice. Source: Huang et al. 2016, "Learning Deep Representation for
    Imbalanced Classification" (power 1); Mahajan et al. 2018, arXiv 1805.00932 (power 0.5).
    """
    return _scaled_to_sum(_checked_counts(class_counts_C) ** -power)


def make_class_weights(name: str, class_counts_C: Sequence[int]) -> Tensor | None:
    """The weights called `name`, one of CLASS_WEIGHTS; None for `none`."""
    if name == "effective":
        return effective_number_weights(class_counts_C)
    if name in ("inverse", "inverse-sqrt"):
        return inverse_frequency_weights(class_counts_C, 1.0 if name == "inverse" else 0.5)
    if name == "none":
        return None
    raise UsageError(f"class weights are {name!r}; expected one of {', '.join(CLASS_WEIGHTS)}")


def _checked_counts(class_counts_C: Sequence[int]) -> Tensor:
    for c, count in enumerate(class_counts_C):
        if count < 1:
            raise DataError(
                f"class {c} has no training row: it can have neither weight nor margin; "
                "add rows of it or drop the class"
            )
    return torch.tensor(class_counts_C, dtype=torch.float64)


def _scaled_to_sum(weights_C: Tensor) -> Tensor:
    return (weights_C * len(weights_C) / weights_C.sum()).float()
