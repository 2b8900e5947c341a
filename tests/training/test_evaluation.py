"""Logits of a data set, in its order."""

import pytest
import torch

from twostage.data.packing import pack
from twostage.data.token_store import TokenStore
from twostage.errors import NonFiniteError
from twostage.model.checkpoint import Checkpoint, build_model
from twostage.training import evaluation
from twostage.training.evaluation import predict_logits


def test_logits_come_in_the_order_of_the_data_whatever_the_batches(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build_model(tiny_checkpoint, 3, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 33, (40,), generator=generator)
    ids = torch.randint(1, 101, (int(lengths.sum()),), generator=generator).int()
    store = TokenStore(ids, torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]))
    with torch.no_grad():
        one_by_one = torch.cat([model(*pack(store, torch.tensor([i]))) for i in range(40)])
    for max_tokens in (1, 50, 8_192):
        monkeypatch.setattr(evaluation, "tokens_at_once", lambda device, n=max_tokens: n)
        logits_NC = predict_logits(model, store)
        torch.testing.assert_close(logits_NC, one_by_one, rtol=1e-4, atol=1e-5)
    rounded_NC = predict_logits(model, store, dtype=torch.bfloat16)
    assert rounded_NC.dtype == torch.float32
    assert 1e-4 < (rounded_NC - one_by_one).norm() / one_by_one.norm() < 0.03
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_logits_that_are_not_finite_are_refused(tiny_checkpoint: Checkpoint) -> None:
    model = build_model(tiny_checkpoint, 3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.get_parameter("classifier.2.bias")[1] = float("nan")
    store = TokenStore(torch.arange(1, 4).int(), torch.tensor([0, 3]))
    with pytest.raises(NonFiniteError, match="logits are not finite"):
        predict_logits(model, store)


def test_an_empty_data_set_has_no_logits(tiny_checkpoint: Checkpoint) -> None:
    model = build_model(tiny_checkpoint, 3, torch.Generator())
    empty = TokenStore(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    assert predict_logits(model, empty).shape == (0, 3)
