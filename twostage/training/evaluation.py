"""Logits of a whole data set.

Texts are sorted by length and batched by token budget, so that the padding inside attention is
small and every batch costs the same; the logits come back in the order of the data.
"""

import torch
from torch import Tensor

from ..data.packing import TokenStore, pack
from ..data.samplers import length_sorted_batches
from ..model.bert import BertClassifier
from ..progress import progress_bar
from .precision import WorkingCopy

EVALUATION_TOKENS = 8_192
"""Tokens of an evaluation batch."""


def predict_logits(
    model: BertClassifier,
    store: TokenStore,
    *,
    dtype: torch.dtype = torch.float32,
    max_tokens: int = EVALUATION_TOKENS,
    description: str = "evaluating",
    show_progress: bool = False,
) -> Tensor:
    """[N, C] fp32 logits on the CPU, in the order of `store`; dropout off.

    dtype: of forward; the model itself stays as it is.
    """
    device = model.device
    work = WorkingCopy(model, dtype).model
    logits_NC = torch.empty(len(store), model.num_classes, device=device)
    with torch.no_grad(), progress_bar(description, len(store), "text", show_progress) as bar:
        for rows in length_sorted_batches(store.lengths.numpy(), max_tokens):
            rows_B = torch.from_numpy(rows)
            batch = pack(store, rows_B).to(device)
            logits_BC = work(**batch.inputs())
            logits_NC[rows_B.to(device)] = logits_BC.float()
            bar.update(len(rows))
    return logits_NC.cpu()
