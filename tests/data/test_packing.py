"""Batches cut from the store."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twostage.data.packing import pack
from twostage.data.token_store import TokenStore


def store_of(lengths: list[int]) -> TokenStore:
    """Text i consists of the ids 100·i + 1, 100·i + 2, …"""
    ids = [100 * i + 1 + j for i, length in enumerate(lengths) for j in range(length)]
    return TokenStore(torch.tensor(ids, dtype=torch.int32), torch.tensor([0, *lengths]).cumsum(0))


def test_a_batch_by_hand() -> None:
    batch = pack(store_of([2, 3, 1]), torch.tensor([2, 1]), round_to=8)
    assert batch.input_ids_T.tolist() == [201, 101, 102, 103, 0, 0, 0, 0]
    assert batch.position_ids_T.tolist() == [0, 0, 1, 2, 0, 0, 0, 0]
    assert batch.cu_seqlens.tolist() == [0, 1, 4]
    assert batch.num_tokens == 4


@given(st.data(), st.lists(st.integers(1, 70), min_size=1, max_size=9))
def test_every_text_of_a_batch_is_whole_and_filler_comes_last(
    data: st.DataObject, lengths: list[int]
) -> None:
    store = store_of(lengths)
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=12))
    round_to = data.draw(st.sampled_from([1, 32, 64]))
    batch = pack(store, torch.tensor(rows), round_to=round_to)
    bounds = batch.cu_seqlens.tolist()
    for row, (start, end) in zip(rows, pairwise(bounds), strict=True):
        expected = store.ids[store.offsets[row] : store.offsets[row + 1]]
        assert torch.equal(batch.input_ids_T[start:end], expected)
        assert batch.position_ids_T[start:end].tolist() == list(range(lengths[row]))
    assert bounds[-1] == batch.num_tokens == sum(lengths[row] for row in rows)
    assert len(batch.input_ids_T) % round_to == 0
    assert len(batch.input_ids_T) - batch.num_tokens < round_to
    assert not batch.input_ids_T[batch.num_tokens :].any()


@pytest.mark.parametrize("length", [1, 64, 512])
def test_one_text(length: int) -> None:
    batch = pack(store_of([length]), torch.tensor([0]))
    assert len(batch.input_ids_T) == max(64, length)
