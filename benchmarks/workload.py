"""The texts and the encoder that a benchmark runs on, and the least work that they ask for.

`minilm`: the demo's MiniLM (6 layers, hidden 384) on critics' snippets, one rotten to five fresh.
`bert-base`: an encoder of BERT-base's shape with random weights, on random texts whose lengths and
token frequencies are those of the snippets, from `snippet_histogram.json`; it needs no network.
`tiny`: two small layers on such texts, to rehearse.
`sst2_texts`: random texts with the lengths of SST-2's, and the snippets' token frequencies.

All texts are there in every case, however few of them are timed: how many different words a data
set has decides how much of the embedding table there is to train.

The histogram was made by `python benchmarks/workload.py --data demo`.

Shapes: N texts, D hidden, I intermediate, L layers, T real tokens and B texts of a batch.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from harness import RESULTS

from twostage.assets.data_sets import fetch_demo
from twostage.data.downsampling import downsample
from twostage.data.tables import read_table
from twostage.data.token_store import StageData, TokenStore
from twostage.data.tokenization import load_tokenizer, tokenize
from twostage.model.bert import HEAD_SIZE, Bert
from twostage.model.checkpoint import Checkpoint, load_checkpoint
from twostage.model.config import BertConfig

HISTOGRAM = Path(__file__).parent / "snippet_histogram.json"
SST2_HISTOGRAM = HISTOGRAM.with_name("sst2_histogram.json")
SHAPES = {
    "bert-base": BertConfig(30_522, 768, 12, 12, 3_072),
    "tiny": BertConfig(2_000, 64, 2, 2, 128),
}
"""Both have heads for which attention has Triton kernels."""
MODELS = ("minilm", *SHAPES)
NUM_RANDOM_TEXTS = {"bert-base": 8_000, "tiny": 240}
"""About as many as the demo has, and few."""
SST2_TEXTS = 45_082
"""As many as SST-2 has to train on at rate 0.2."""
TAIL_RATE = 0.2
"""Texts of the tail class for each text of the other."""
CLS, SEP = 101, 102


def make_parser(doc: str) -> argparse.ArgumentParser:
    """What every benchmark on these texts can be told.

    doc: the benchmark's docstring. `--job` is for its own child processes.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--model", default="minilm", choices=MODELS)
    parser.add_argument("--data", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser


@dataclass(frozen=True)
class Workload:
    """An encoder and texts to train it on."""

    checkpoint: Checkpoint
    data: StageData
    """N texts of two classes; the first is the tail."""


def make_workload(
    model: str, min_texts: int, folder: Path, dropout: float, num_texts: int | None = None
) -> Workload:
    """The whole data set, as often as it takes to have at least `min_texts` texts.

    model: one of MODELS. folder: the demo's, for `minilm`. dropout: everywhere. num_texts: in the
    data set, if random; None: NUM_RANDOM_TEXTS.
    """
    if model == "minilm":
        texts, labels = downsample(read_table(folder / "train.tsv"), TAIL_RATE)
        store = tokenize(load_tokenizer(folder / "model"), texts, 128)
        data = StageData(store, np.array(labels))
        checkpoint = load_checkpoint(folder / "model")
    else:
        checkpoint = random_checkpoint(SHAPES[model])
        num_texts = num_texts or NUM_RANDOM_TEXTS[model]
        data = random_texts(num_texts, checkpoint.config.vocab_size)
    data = repeat(data, -(-min_texts // len(data)))
    config = replace(
        checkpoint.config, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    return Workload(replace(checkpoint, config=config), data)


def repeat(data: StageData, times: int) -> StageData:
    """All texts `times` times, one round after the other."""
    lengths = data.store.lengths.repeat(times)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    store = TokenStore(data.store.ids.repeat(times), offsets)
    return StageData(store, np.tile(data.labels_N, times))


def random_checkpoint(config: BertConfig) -> Checkpoint:
    """Weights as BERT draws them before pretraining: N(0, 0.02²), norms 1 and biases 0."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Bert(config).named_parameters()}
    tensors = {
        name: torch.ones(shape)
        if "norm.weight" in name
        else torch.zeros(shape)
        if name.endswith("bias")
        else torch.randn(shape, generator=generator) * 0.02
        for name, shape in shapes.items()
    }
    return Checkpoint(config, tensors)


def sst2_texts(num_texts: int, vocab_size: int) -> StageData:
    """Random texts as long as SST-2's: 13.3 tokens on average, where snippets have 26."""
    return random_texts(num_texts, vocab_size, SST2_HISTOGRAM)


def random_texts(num_texts: int, vocab_size: int, lengths_of: Path = HISTOGRAM) -> StageData:
    """Texts with the snippets' token frequencies, [CLS] first and [SEP] last."""
    histogram = json.loads(HISTOGRAM.read_text(encoding="utf-8"))
    generator = np.random.default_rng(0)
    values, counts = np.array(json.loads(lengths_of.read_text(encoding="utf-8"))["lengths"]).T
    lengths = generator.choice(values, size=num_texts, p=counts / counts.sum())
    ranks, frequencies = np.array(histogram["rank_frequencies"], dtype=float).T
    every_rank = np.arange(1, vocab_size - SEP)
    frequency = np.exp(np.interp(np.log(every_rank), np.log(ranks), np.log(frequencies)))
    frequency[every_rank > ranks[-1]] = 0.0  # tokens that never occur
    # Which token has which rank does not matter; a fixed shuffle spreads them over the table.
    token_of_rank = SEP + 1 + generator.permutation(len(every_rank))
    ids = token_of_rank[
        generator.choice(len(every_rank), size=lengths.sum(), p=frequency / frequency.sum())
    ]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids[offsets[:-1]], ids[offsets[1:] - 1] = CLS, SEP
    store = TokenStore(torch.from_numpy(ids).int(), torch.from_numpy(offsets))
    tail = generator.random(num_texts) < TAIL_RATE / (1 + TAIL_RATE)
    return StageData(store, np.where(tail, 0, 1))


def needed_flops(config: BertConfig, lengths_B: np.ndarray, stage: int) -> float:
    """Multiply-adds × 2 that no exact implementation of a training step avoids.

    A product costs its forward once, and once more for each gradient that is needed: of its weight,
    of its input. In the last layer only the first token of a text goes beyond keys and values; in
    stage 1 the layers below the last need no backward, and the last needs no gradient of its input.
    The embeddings, norms and activations count nothing.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    tokens, texts = float(lengths_B.sum()), len(lengths_B)
    pairs = float((lengths_B.astype(float) ** 2).sum())
    full_layer = 2 * (4 * hidden**2 + 2 * hidden * inner) * tokens + 4 * hidden * pairs
    keys_values = 2 * 2 * hidden**2 * tokens
    last_layer = 2 * (2 * hidden**2 + 2 * hidden * inner) * texts + 4 * hidden * tokens
    head = 2 * (hidden**2 + hidden * HEAD_SIZE) * texts
    trunk = (config.num_hidden_layers - 1) * full_layer
    if stage == 1:
        return trunk + 2 * keys_values + 3 * (last_layer + head)
    return 3 * (trunk + keys_values + last_layer + head)


def needed_bytes(config: BertConfig, stage: int) -> float:
    """Bytes that a step of fp32 AdamW with bf16 weights must move, however small its batch.

    The weights that are trained are read in forward and in backward in bf16 (2 + 2), and their
    gradients written (2); AdamW reads weight, gradient and both moments and writes all but the
    gradient (28). The word embeddings, of which a step needs few rows, count nothing; nor do frozen
    weights, which one reading can serve for many steps.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer = 4 * hidden**2 + 2 * hidden * inner
    trained = hidden**2 + layer * (1 if stage == 1 else config.num_hidden_layers)
    return trained * (2 + 2 + 2 + 28)


def write_histogram(folder: Path, output: Path) -> None:
    """Lengths and token frequencies of the snippets: no text, and no token's identity."""
    fetch_demo(folder)
    texts = list(read_table(folder / "train.tsv").texts)
    store = tokenize(load_tokenizer(folder / "model"), texts, 128)
    lengths, counts = np.unique(store.lengths.numpy(), return_counts=True)
    ids, uses = np.unique(store.ids.numpy(), return_counts=True)
    frequencies = np.sort(uses[~np.isin(ids, (CLS, SEP))])[::-1]
    knots = np.unique(np.geomspace(1, len(frequencies), 60).astype(int))
    histogram = {
        "what": "critics' snippets of films: [tokens with [CLS] and [SEP], texts]; [rank, uses]",
        "lengths": np.stack([lengths, counts], axis=1).tolist(),
        "rank_frequencies": [[int(rank), int(frequencies[rank - 1])] for rank in knots],
    }
    output.write_text(json.dumps(histogram) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make snippet_histogram.json from the demo's data")
    parser.add_argument("--data", type=Path, default=Path("demo"), help="the demo's folder")
    parser.add_argument("--output", type=Path, default=HISTOGRAM)
    options = parser.parse_args()
    write_histogram(options.data, options.output)
