"""The shape of an encoder, as Hugging Face's `config.json` describes it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from ..errors import ModelError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""The functions between the two matrices of the feed-forward layer."""


@dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder; the field names are those of Hugging Face's `config.json`."""

    vocab_size: int
    """V, rows of the word-embedding table."""
    hidden_size: int
    """D."""
    num_hidden_layers: int
    """Encoder layers."""
    num_attention_heads: int
    """H, which divides `hidden_size`."""
    intermediate_size: int
    """I, width of the feed-forward layer."""
    max_position_embeddings: int = 512
    """Longest sequence in tokens."""
    type_vocab_size: int = 2
    """Rows of the token-type table, of which only the first is used."""
    hidden_act: str = "gelu"
    """`gelu` (the erf form), `gelu_new` (the tanh form) or `relu`."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in layer norm."""
    hidden_dropout_prob: float = 0.1
    """After the embeddings and after both halves of each layer."""
    attention_probs_dropout_prob: float = 0.1
    """On the attention probabilities."""

    @property
    def head_size(self) -> int:
        """K, features of an attention head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
            "type_vocab_size",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ModelError(f"{name} is {value!r}; expected a whole number of at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise ModelError(
                f"num_attention_heads is {self.num_attention_heads}, "
                f"which does not divide hidden_size {self.hidden_size}"
            )
        if self.hidden_act not in ACTIVATIONS:
            raise ModelError(
                f"hidden_act is {self.hidden_act!r}; supported are {', '.join(ACTIVATIONS)}"
            )
        if not isinstance(self.layer_norm_eps, (int, float)) or not 0 < self.layer_norm_eps < 1:
            raise ModelError(
                f"layer_norm_eps is {self.layer_norm_eps!r}; expected a number between 0 and 1"
            )
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 <= value < 1:
                raise ModelError(f"{name} is {value!r}; expected a number of at least 0, below 1")
