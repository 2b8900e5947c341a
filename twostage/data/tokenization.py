"""Texts to token ids, once, into a ragged store.

A thin wrapper over the `tokenizers` library: it reads `tokenizer.json`, or builds BERT's word-piece
tokenizer from `vocab.txt`, and overrides what model folders bake in. (MiniLM's `tokenizer.json`
truncates and pads every text to 128 tokens.) Ids equal those of transformers' BERT tokenizer.
"""

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import DataError, ModelError
from ..progress import progress_bar
from .packing import TokenStore

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Texts a call: `encode_batch` works on all cores, and the bar moves between calls.
_CHUNK = 2_048


def load_tokenizer(folder: str | Path) -> "Tokenizer":
    """The tokenizer of a model folder, without truncation and padding."""
    from tokenizers import Tokenizer

    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises bare Exception
            raise ModelError(f"{path} is not a readable tokenizer: {error}") from error
    elif (folder / "vocab.txt").is_file():
        tokenizer = _from_vocabulary(folder)
    else:
        raise ModelError(f"'{folder}' has neither tokenizer.json nor vocab.txt")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Every text must begin with the token whose hidden state the pooler reads.
    if tokenizer.encode("").tokens != ["[CLS]", "[SEP]"]:
        raise ModelError(f"the tokenizer of '{folder}' does not put [CLS] and [SEP] around a text")
    return tokenizer


def check_vocabulary(tokenizer: "Tokenizer", vocab_size: int, folder: str | Path) -> None:
    """Raise ModelError when the tokenizer knows more tokens than the model has embeddings."""
    tokens = tokenizer.get_vocab_size()
    if tokens > vocab_size:
        raise ModelError(
            f"the tokenizer of '{folder}' has {tokens} tokens, but its config.json says "
            f"vocab_size {vocab_size}"
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
    tokenizer.enable_truncation(max_length)
    try:
        with progress_bar(description, len(texts), "text", show_progress) as bar:
            for start in range(0, len(texts), _CHUNK):
                encodings = _encode(tokenizer, list(texts[start : start + _CHUNK]), start)
                lengths.append(np.array([len(ids) for ids in encodings], dtype=np.int64))
                chunks.append(np.fromiter(chain.from_iterable(encodings), dtype=np.int32))
                bar.update(len(encodings))
    finally:
        tokenizer.no_truncation()
    offsets = np.cumsum(np.concatenate(lengths))
    return TokenStore(torch.from_numpy(np.concatenate(chunks)), torch.from_numpy(offsets))


def _encode(tokenizer: "Tokenizer", texts: list[str], start: int) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    except TypeError:
        # A lone surrogate, which only texts made in memory can hold, has no UTF-8 form.
        for row, text in enumerate(texts, start):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise DataError(f"text {row} holds an unpaired surrogate: {text[:40]!r}") from None
        raise


def _from_vocabulary(folder: Path) -> "Tokenizer":
    """BERT's tokenizer from `vocab.txt`, with the settings of `tokenizer_config.json` if there."""
    from tokenizers import (
        AddedToken,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    settings: dict[str, Any] = {}
    settings_path = folder / "tokenizer_config.json"
    if settings_path.is_file():
        try:
            settings = json.loads(settings_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{settings_path} is not readable as JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ModelError(f"{settings_path} does not hold a JSON object")
    try:
        with (folder / "vocab.txt").open(encoding="utf-8") as file:
            vocabulary = {line.rstrip("\n"): index for index, line in enumerate(file)}
    except UnicodeDecodeError:
        raise ModelError(f"{folder / 'vocab.txt'} is not valid UTF-8") from None
    if "[UNK]" not in vocabulary or "[CLS]" not in vocabulary or "[SEP]" not in vocabulary:
        raise ModelError(f"{folder / 'vocab.txt'} lacks [UNK], [CLS] or [SEP]; expected BERT's")

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    try:
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=settings.get("do_lower_case", True),
            handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
            strip_accents=settings.get("strip_accents"),
        )
    except TypeError as error:
        raise ModelError(f"{settings_path}: a setting has the wrong type: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = vocabulary["[CLS]"], vocabulary["[SEP]"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    tokenizer.decoder = decoders.WordPiece()
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special if t in vocabulary]
    )
    return tokenizer
