"""Losses and class weights for imbalanced data: the readable spec.

Each loss is one setting of the fused operation in `kernels/cross_entropy.py`, which computes the
value and the gradient in one pass:

    z_bc = s · (logits_bc − m_c · [c = y_b])
    L    = Σ_b w_{y_b} · (logsumexp_c z_bc − z_{b,y_b}) / Σ_b w_{y_b}

Shapes: B examples, C classes, n_c training examples of class c.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import DataError, UsageError
from ..kernels.cross_entropy import fused_cross_entropy

LOSSES = ("ldam", "ce")
CLASS_WEIGHTS = ("effective", "inverse", "inverse-sqrt", "none")

Loss = Callable[[Tensor, Tensor], Tensor]
"""(logits_BC, labels_B) → scalar."""


def cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    class_weights_C: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """(Class-weighted) cross-entropy: −Σ_b w_{y_b} log softmax(logits_b)_{y_b} / Σ_b w_{y_b}.

    logits_BC: [B, C]. labels_B: [B] int64. class_weights_C: [C], all ones when None. impl: see
    `kernels/__init__.py`.
    The same as `torch.nn.functional.cross_entropy` with `weight`. Source of the weighting: King &
    Zeng 2001, "Logistic Regression in Rare Events Data" (the weighted log-likelihood).
    """
    return fused_cross_entropy(logits_BC, labels_B, class_weights_C, impl=impl)


def ldam(
    logits_BC: Tensor,
    labels_B: Tensor,
    margins_C: Tensor,
    class_weights_C: Tensor | None = None,
    s: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Label-distribution-aware margin loss: cross-entropy after lowering the true class's logit.

    margins_C: [C], from `ldam_margins`. s: scales the logits after the margin. The LDAM paper uses
    s = 30 because its logits are cosines in [-1, 1]; ours are unbounded, and s = 1.
    Source: Cao et al. 2019 (arXiv 1906.07413), equation 13.
    """
    return fused_cross_entropy(logits_BC, labels_B, class_weights_C, margins_C, s, impl)


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
    if name == "inverse":
        return inverse_frequency_weights(class_counts_C)
    if name == "inverse-sqrt":
        return inverse_frequency_weights(class_counts_C, power=0.5)
    if name == "none":
        return None
    raise UsageError(f"class weights are {name!r}; expected one of {', '.join(CLASS_WEIGHTS)}")


def make_loss(
    name: str,
    class_weights: str,
    class_counts_C: Sequence[int],
    device: torch.device,
    *,
    ldam_s: float = 1.0,
    ldam_max_m: float = 0.5,
    impl: str = "auto",
) -> Loss:
    """The loss called `name`, one of LOSSES, for training data with these class counts."""
    weights_C = make_class_weights(class_weights, class_counts_C)
    if weights_C is not None:
        weights_C = weights_C.to(device)
    if name == "ce":
        return lambda logits_BC, labels_B: cross_entropy(logits_BC, labels_B, weights_C, impl)
    if name == "ldam":
        margins_C = ldam_margins(class_counts_C, ldam_max_m).to(device)
        return lambda logits_BC, labels_B: ldam(
            logits_BC, labels_B, margins_C, weights_C, ldam_s, impl
        )
    raise UsageError(f"loss is {name!r}; expected one of {', '.join(LOSSES)}")


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
