"""Logits of a whole data set.

Texts are sorted by length and batched by token budget, so that the padding inside attention is
small and every batch costs the same; the logits come back in the order of the data.
"""

import numpy as np
import torch
from torch import Tensor

from ..data.packing import TokenStore, pack
from ..data.samplers import length_sorted_batches
from ..errors import NonFiniteError
from ..model.bert import BertClassifier
from ..progress import progress_bar
from .precision import cast_model


def tokens_at_once(device: torch.device) -> int:
    """Tokens of a batch that is not trained on: on a CPU, what its caches hold."""
    return 2_048 if device.type == "cpu" else 16_384


def predict_logits(
    model: BertClassifier,
    store: TokenStore,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    show_progress: bool = False,
) -> Tensor:
    """[N, C] fp32 logits on the CPU, in the order of `store`; dropout off.

    dtype: of forward; the model itself stays as it is. impl: of its operations.
    Raises NonFiniteError when a logit is infinite or not a number.
    """
    work = cast_model(model.bert.config, dict(model.named_parameters()), dtype, impl)
    batches = length_sorted_batches(store.lengths.numpy(), tokens_at_once(model.device))
    logits = [torch.empty(0, model.num_classes, device=model.device)]
    with torch.no_grad(), progress_bar("evaluating", len(store), "text", show_progress) as bar:
        for rows in batches:
            batch = pack(store, torch.from_numpy(rows), model.device)
            logits.append(work(**batch.inputs()).float())
            bar.update(len(rows))
    sorted_NC = torch.cat(logits).cpu()
    order = np.concatenate([np.zeros(0, dtype=np.int64), *batches])
    logits_NC = torch.empty_like(sorted_NC)
    logits_NC[torch.from_numpy(order)] = sorted_NC
    if not torch.isfinite(logits_NC).all():
        raise NonFiniteError(
            "the model's logits are not finite: its weights have diverged or were broken before"
        )
    return logits_NC
