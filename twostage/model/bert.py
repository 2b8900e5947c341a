"""BERT (Devlin et al. 2019) on packed tokens, with the head of two-stage fine-tuning.

The usual BERT takes a rectangle [B, L] and computes on its padding. This one takes the texts of a
batch end to end on a single token axis of length T, and `cu_seqlens`, the B+1 places where texts
begin and end. Every linear layer, norm and activation sees real tokens only; attention alone needs
the boundaries (`kernels/attention.py`). T may be larger than the number of real tokens: the tokens
beyond `cu_seqlens[-1]` are filler that nobody reads, whose gradient is exactly zero.

    texts   "a bad film", "good"      input_ids_T    101 1037 2919 2143 102 | 101 2204 102
                                      position_ids_T   0    1    2    3   4 |   0    1   2
                                      cu_seqlens       0 5 8

Of the last layer only the first token of each text is read, so only that is computed there
(`BertLayer.forward`): exact, and saves a seventh of the work of a six-layer encoder.

Dropout is on exactly when randomness is passed: there is no train or eval mode to forget. Each
place with a dropout of its own has a number, its site: 0 after the embeddings, 1 + 3·i in the
attention of layer i, 2 + 3·i and 3 + 3·i after the layer's halves.
Embedding tables and norms stay in fp32 when the rest is cast to bf16: gathering rows gains nothing
from bf16, and the sum of many gradients into the row of a frequent word would lose most of them.

Shapes: B sequences, T packed tokens, D hidden, I intermediate, C classes, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import ModelError
from ..kernels import use_triton
from ..kernels.attention import PackedLayout, first_token_attention, packed_attention, packed_layout
from ..kernels.dropout import DropoutCounters, Randomness
from ..kernels.embedding import embed_tokens
from ..kernels.gelu import bias_gelu
from ..kernels.residual_norm import dropout_residual_norm

HEAD_SIZE = 50
"""Width of the hidden layer of the recipe's classification head."""

ACTIVATIONS = ("gelu", "gelu_new", "relu")


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


class BertEmbeddings(nn.Module):
    """LayerNorm(word + position + token type), then dropout. Token types are all zero."""

    def __init__(self, config: BertConfig, impl: str) -> None:
        super().__init__()
        self.word = _make_table(config.vocab_size, config.hidden_size)
        self.position = _make_table(config.max_position_embeddings, config.hidden_size)
        self.token_type = _make_table(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout_p = config.hidden_dropout_prob
        self.impl = impl

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        dtype: torch.dtype,
        randomness: Randomness | None,
    ) -> Tensor:
        """[T, D] in `dtype`."""
        return embed_tokens(
            input_ids_T,
            position_ids_T,
            self.word.weight,
            self.position.weight,
            self.token_type.weight[0],
            self.norm.weight,
            self.norm.bias,
            self.norm.eps,
            dtype,
            self.dropout_p,
            randomness,
            impl=self.impl,
            sparse=self.word.sparse,
        )


def _make_table(rows: int, width: int) -> nn.Embedding:
    """N(0, 0.02²) as BERT starts; nothing on the meta device, where models are assembled.

    nn.Embedding would draw there too, and that loads torch's compiler: most of a second and 80 MiB.
    """
    table: nn.Embedding = nn.Embedding.from_pretrained(torch.zeros(rows, width), freeze=False)
    if not table.weight.is_meta:
        nn.init.normal_(table.weight, std=0.02)
    return table


class BertLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    def __init__(self, config: BertConfig, index: int, impl: str) -> None:
        """index: number of the layer, from 0."""
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.attention_output = nn.Linear(hidden, hidden)
        self.attention_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.intermediate = nn.Linear(hidden, intermediate)
        self.output = nn.Linear(intermediate, hidden)
        self.output_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
        self.num_heads = config.num_attention_heads
        self.activation = config.hidden_act
        self.hidden_dropout_p = config.hidden_dropout_prob
        self.attention_dropout_p = config.attention_probs_dropout_prob
        self.first_site = 1 + 3 * index
        self.impl = impl

    def forward(
        self,
        hidden_TD: Tensor,
        layout: PackedLayout,
        randomness: Randomness | None,
        *,
        first_tokens_only: bool = False,
    ) -> Tensor:
        """Every token's new hidden state, [T, D], or that of each sequence's first token, [B, D].

        For first tokens alone, keys and values still need every token; the query, and all that
        follows attention, only the first ones.
        """
        dropout_p = self.attention_dropout_p
        attention = (layout, self.num_heads, dropout_p, randomness, self.first_site, self.impl)
        if first_tokens_only:
            split = (hidden_TD.shape[1], 2 * hidden_TD.shape[1])
            query_weight, key_value_weight = self.qkv.weight.split(split)
            query_bias, key_value_bias = self.qkv.bias.split(split)
            key_value_T2D = F.linear(hidden_TD, key_value_weight, key_value_bias)
            hidden_TD = hidden_TD.index_select(0, layout.first_tokens_B)  # from here on [B, D]
            query_BD = F.linear(hidden_TD, query_weight, query_bias)
            context_TD = first_token_attention(query_BD, key_value_T2D, *attention)
            if isinstance(randomness, DropoutCounters):
                randomness = randomness.take(layout.first_tokens_B)
        else:
            context_TD = packed_attention(self.qkv(hidden_TD), *attention)

        def add_and_norm(
            x_TD: Tensor, residual_TD: Tensor, norm: nn.LayerNorm, site: int
        ) -> Tensor:
            p, impl = self.hidden_dropout_p, self.impl
            return dropout_residual_norm(
                x_TD, residual_TD, norm.weight, norm.bias, norm.eps, p, randomness, site, impl
            )

        hidden_TD = add_and_norm(
            self.attention_output(context_TD), hidden_TD, self.attention_norm, self.first_site + 1
        )
        if self.activation == "gelu" and use_triton(self.impl, hidden_TD):
            without_bias_TI = F.linear(hidden_TD, self.intermediate.weight)
            activated_TI = bias_gelu(without_bias_TI, self.intermediate.bias, self.impl)
        else:  # torch adds the bias in the matrix product
            activated_TI = activate(self.intermediate(hidden_TD), self.activation)
        return add_and_norm(
            self.output(activated_TI), hidden_TD, self.output_norm, self.first_site + 2
        )


class Bert(nn.Module):
    """Embeddings, encoder layers and pooler."""

    def __init__(self, config: BertConfig, impl: str = "auto") -> None:
        """impl: of the operations (`kernels/__init__.py`)."""
        super().__init__()
        self.config = config
        self.embeddings = BertEmbeddings(config, impl)
        self.layers = nn.ModuleList(
            BertLayer(config, i, impl) for i in range(config.num_hidden_layers)
        )
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        layout: PackedLayout,
        *,
        num_layers: int | None = None,
        randomness: Randomness | None = None,
    ) -> Tensor:
        """Hidden states after the first `num_layers` layers (None: all), [T, D].

        input_ids_T, position_ids_T: [T] integer. layout: `packed_layout` of the batch. randomness:
        turns dropout on and feeds it.
        """
        dtype = self.pooler.weight.dtype
        hidden_TD: Tensor = self.embeddings(input_ids_T, position_ids_T, dtype, randomness)
        for layer in list(self.layers)[:num_layers]:
            hidden_TD = layer(hidden_TD, layout, randomness)
        return hidden_TD

    def pool(
        self,
        hidden_TD: Tensor,
        layout: PackedLayout,
        first_layer: int,
        randomness: Randomness | None = None,
    ) -> Tensor:
        """The layers from `first_layer` on, then tanh(W · first token), [B, D].

        hidden_TD: from `forward` with as many `num_layers`, which leaves at least the last layer.
        Of that only the first token of each sequence is read, so only that is computed.
        """
        *middle, last = list(self.layers)[first_layer:]
        for layer in middle:
            hidden_TD = layer(hidden_TD, layout, randomness)
        first_BD = last(hidden_TD, layout, randomness, first_tokens_only=True)
        return torch.tanh(self.pooler(first_BD))


class BertClassifier(nn.Module):
    """BERT, pooler, and the recipe's head: Linear(D, 50) → ReLU → Linear(50, C)."""

    def __init__(self, config: BertConfig, num_classes: int, impl: str = "auto") -> None:
        super().__init__()
        self.bert = Bert(config, impl)
        self.classifier = nn.Sequential(
            nn.Linear(config.hidden_size, HEAD_SIZE), nn.ReLU(), nn.Linear(HEAD_SIZE, num_classes)
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.get_parameter("classifier.2.bias"))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.bert.pooler.weight.device

    def forward(
        self,
        input_ids_T: Tensor,
        position_ids_T: Tensor,
        cu_seqlens: Tensor,
        *,
        layout: PackedLayout | None = None,
        randomness: Randomness | None = None,
    ) -> Tensor:
        """Logits, [B, C].

        input_ids_T, position_ids_T: [T] integer. cu_seqlens: [B+1] integer, from 0 to the number
        of real tokens. layout: `packed_layout(cu_seqlens)`, where it has been computed before; on
        a GPU computing it here waits for the device. randomness: turns dropout on and feeds it.
        """
        if layout is None:
            layout = packed_layout(cu_seqlens)
        below_last = len(self.bert.layers) - 1
        hidden_TD = self.bert(
            input_ids_T, position_ids_T, layout, num_layers=below_last, randomness=randomness
        )
        return self.classify(hidden_TD, layout, below_last, randomness)

    def classify(
        self,
        hidden_TD: Tensor,
        layout: PackedLayout,
        first_layer: int,
        randomness: Randomness | None = None,
    ) -> Tensor:
        """Logits, [B, C], from the hidden states that layer `first_layer` reads, [T, D]."""
        pooled_BD = self.bert.pool(hidden_TD, layout, first_layer, randomness)
        logits_BC: Tensor = self.classifier(pooled_BD)
        return logits_BC


def assemble_classifier(
    config: BertConfig, parameters: Mapping[str, nn.Parameter], impl: str = "auto"
) -> BertClassifier:
    """A classifier made of these parameters themselves (not copies), named as in the model."""
    # On the meta device, modules neither allocate nor draw from the process-wide generator.
    with torch.device("meta"):
        model = BertClassifier(config, len(parameters["classifier.2.bias"]), impl)
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameters[name])
    return model


def activate(x: Tensor, name: str) -> Tensor:
    """The feed-forward activation; `name` is one of ACTIVATIONS."""
    if name == "gelu":
        return F.gelu(x)
    if name == "gelu_new":
        return F.gelu(x, approximate="tanh")
    return F.relu(x)


def initialize_linear(
    out_features: int, in_features: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Weight and bias as torch.nn.Linear draws them: from U(-1/√in, 1/√in), by `generator`.

    (Its Kaiming-uniform initialisation with a = √5 comes to the same bound.)
    """
    bound = in_features**-0.5
    weight = torch.empty(out_features, in_features).uniform_(-bound, bound, generator=generator)
    bias = torch.empty(out_features).uniform_(-bound, bound, generator=generator)
    return weight, bias
