"""Texts to token ids, once, into a ragged store.

A thin wrapper over the `tokenizers` library. `tokenizer_files.py` reads the tokenizer of a model
folder; its ids equal those of transformers' BERT tokenizer. What folders bake in is overridden:
MiniLM's `tokenizer.json` truncates and pads every text to 128 tokens.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..errors import DataError, ModelError
from ..printing import count, quoted
from ..progress import progress_bar
from .token_store import TokenStore
from .tokenizer_files import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

# Texts a call: `encode_batch` works on all cores, and the bar moves between calls.
_CHUNK = 2_048


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer of a model folder with all its settings, without truncation and padding.

    Raises ModelError, naming the file and the setting, for what is not BERT's or not honoured
    (`tokenizer_files.py`).
    """
    return read_tokenizer(Path(folder))


def check_vocabulary(tokenizer: "Tokenizer", vocab_size: int, folder: str | Path) -> None:
    """Raise ModelError when the tokenizer can give an id that the model has no embedding for."""
    beyond = sorted(
        (index, token) for token, index in tokenizer.get_vocab().items() if index >= vocab_size
    )
    if beyond:
        index, token = beyond[-1]
        what = f"token {quoted(token)}" if token else "an empty line of vocab.txt (remove it)"
        more = f"; {count(len(beyond), 'token')} lie beyond that" if beyond[1:] else ""
        raise ModelError(
            f"the tokenizer of '{folder}' gives id {index} to {what}, but its config.json says "
            f"vocab_size {vocab_size}, so ids end at {vocab_size - 1}{more}"
        )


def tokenize(
    tokenizer: "Tokenizer",
    texts: Sequence[str],
    max_length: int,
    *,
    description: str = "tokenizing",
    show_progress: bool = False,
) -> TokenStore:
    """Token ids of all texts, [CLS] and [SEP] included, each cut to `max_length` tokens."""
    lengths = [np.zeros(1, dtype=np.int64)]
    chunks = [np.zeros(0, dtype=np.int32)]
    num_cut = 0
    tokenizer.enable_truncation(max_length)
    try:
        with progress_bar(description, len(texts), "text", show_progress) as bar:
            for start in range(0, len(texts), _CHUNK):
                encodings = _encode(tokenizer, list(texts[start : start + _CHUNK]), start)
                ids = [encoding.ids for encoding in encodings]
                lengths.append(np.array([len(i) for i in ids], dtype=np.int64))
                chunks.append(np.fromiter(chain.from_iterable(ids), dtype=np.int32))
                # Only a text that fills the limit can have been cut.
                full = np.flatnonzero(lengths[-1] == max_length)
                num_cut += sum(bool(encodings[i].overflowing) for i in full)
                bar.update(len(ids))
    finally:
        tokenizer.no_truncation()
    offsets = np.cumsum(np.concatenate(lengths))
    ids_T = torch.from_numpy(np.concatenate(chunks))
    return TokenStore(ids_T, torch.from_numpy(offsets), num_cut)


def _encode(tokenizer: "Tokenizer", texts: list[str], start: int) -> "list[Encoding]":
    try:
        return tokenizer.encode_batch_fast(texts)
    except TypeError:
        # A lone surrogate, which only texts made in memory can hold, has no UTF-8 form.
        for row, text in enumerate(texts, start):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DataError(f"text {row} holds an unpaired surrogate: {text[:40]!r}") from None
        raise
