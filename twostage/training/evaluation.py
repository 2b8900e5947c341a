"""Logits of a whole data set.

Texts are sorted by length and batched by token budget, so that the padding inside attention is
small and every batch costs the same; the logits come back in the order of the data.
"""

import torch
from torch import Tensor

from ..data.packing import pack, send
from ..data.samplers import length_sorted_batches, tokens_at_once
from ..data.token_store import TokenStore
from ..errors import NonFiniteError
from ..model.assembly import round_classifier
from ..model.bert import BertClassifier
from ..progress import progress_bar


def predict_logits(
    model: BertClassifier,
    store: TokenStore,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
    show_progress: bool = False,
) -> Tensor:
    """[N, C] fp32 logits on the CPU, in the order of `store`; dropout off.

    Forward computes in `dtype` and by `impl`; the model itself stays as it is.
    Raises NonFiniteError when a logit is infinite or not a number.
    """
    rounded = round_classifier(model.bert.config, dict(model.named_parameters()), dtype, impl)
    logits_NC = torch.empty(len(store), model.num_classes, device=model.device)
    with torch.no_grad(), progress_bar("evaluating", len(store), "text", show_progress) as bar:
        for rows in length_sorted_batches(store.lengths.numpy(), tokens_at_once(model.device.type)):
            rows_B = torch.from_numpy(rows)
            batch = pack(store, rows_B, model.device)
            logits_NC[send(rows_B, model.device)] = rounded(*batch).float()
            bar.update(len(rows))
    logits_NC = logits_NC.cpu()
    if not torch.isfinite(logits_NC).all():
        raise NonFiniteError(
            "the model's logits are not finite: its weights have diverged or were broken before"
        )
    return logits_NC
