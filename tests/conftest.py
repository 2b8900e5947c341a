"""What several tests need: the demo's encoder and texts, and a small random BERT of our own."""

import fcntl
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

# Before torch is imported, and for the commands that the tests start: the models here are tiny, and
# two threads that wait for each other on cores that others use take a hundred times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import transformers
from hypothesis import settings

if not torch.cuda.is_available():
    # Before a kernel is defined, and for the commands that the tests start.
    os.environ["TRITON_INTERPRET"] = "1"

from twostage.assets.data_sets import fetch_demo
from twostage.data.tables import Table, read_table
from twostage.data.token_store import TokenStore
from twostage.model.checkpoint import Checkpoint, tensor_names
from twostage.model.config import BertConfig

# The same examples in every run, and no limit on a time that other work on the machine decides.
settings.register_profile("twostage", deadline=None, derandomize=True)
settings.load_profile("twostage")


@pytest.fixture(scope="session")
def demo_folder(pytestconfig: pytest.Config) -> Path:
    """The real MiniLM and the critics' snippets: 93 MB, downloaded once, kept in pytest's cache."""
    folder = pytestconfig.cache.mkdir("demo")
    with (folder.parent / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one of the processes that run tests side by side
        fetch_demo(folder)
    return folder


@pytest.fixture(scope="session")
def snippets(demo_folder: Path) -> Table:
    return read_table(demo_folder / "train.tsv")


@pytest.fixture(scope="session")
def kernel_names() -> set[str]:
    """All Triton kernels in the sources, by the name that a profile has for them."""
    return {
        line.split("(")[0].removeprefix("def ")
        for path in (Path(__file__).parent.parent / "kernels").glob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }


@pytest.fixture
def tiny(demo_folder: Path, tmp_path: Path) -> Path:
    """A model folder that trains in no time: two layers, MiniLM's vocabulary, random weights."""
    folder = tmp_path / "tiny"
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    shutil.copy(demo_folder / "model" / "tokenizer.json", folder)
    return folder


TINY = BertConfig(
    vocab_size=101,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=32,
)


@pytest.fixture
def tiny_checkpoint() -> Checkpoint:
    """Three layers of random weights, large enough for attention to be far from flat."""
    return random_checkpoint(TINY)


@pytest.fixture
def short_heads_checkpoint() -> Checkpoint:
    """Two layers with heads of 32 features, for which attention has Triton kernels."""
    config = replace(TINY, hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
    return random_checkpoint(config)


MakeStore = Callable[[int, int, int], TokenStore]


@pytest.fixture
def random_store() -> MakeStore:
    """Takes a number of texts, the longest's tokens and the number of words: texts of 2 or more."""

    def make(num_texts: int, longest: int, vocabulary: int) -> TokenStore:
        generator = torch.Generator().manual_seed(1)
        lengths = torch.randint(2, longest + 1, (num_texts,), generator=generator)
        ids = torch.randint(1, vocabulary, (int(lengths.sum()),), generator=generator).int()
        return TokenStore(ids, torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]))

    return make


def random_checkpoint(config: BertConfig) -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "embeddings.word.weight": (config.vocab_size, hidden),
        "embeddings.position.weight": (config.max_position_embeddings, hidden),
        "embeddings.token_type.weight": (2, hidden),
        "pooler.weight": (hidden, hidden),
    }
    matrices = {"qkv": (3 * hidden, hidden), "attention_output": (hidden, hidden)}
    matrices |= {"intermediate": (inner, hidden), "output": (hidden, inner)}
    scale = 0.3 * (24 / hidden) ** 0.5
    tensors = {}
    for name, _ in tensor_names(config.num_hidden_layers):
        part = name.split(".")[-2]
        if name.endswith("norm.weight"):
            tensors[name] = 1 + 0.1 * torch.randn(hidden, generator=generator)
        elif name.endswith(".bias"):
            rows = matrices.get(part, (hidden,))[0]
            tensors[name] = 0.1 * torch.randn(rows, generator=generator)
        else:
            shape = shapes.get(name) or matrices[part]
            tensors[name] = scale * torch.randn(shape, generator=generator)
    return Checkpoint(config, tensors)
