"""BERT (Devlin et al. 2019) on packed tokens, with the head of two-stage fine-tuning.

The usual BERT takes a rectangle [B, L] and computes on its padding. This one takes the texts of a
batch end to end on a single token axis of length T, and `cu_seqlens`, the B+1 places where texts
begin and end. Every linear layer, norm and activation sees real tokens only; attention alone needs
the boundaries (`kernels/attention.py`). T may be larger than the number of real tokens: the tokens
beyond `cu_seqlens[-1]` are filler, which no output depends on; its gradient is exactly zero.

    texts   "a bad film", "good"      input_ids_T    101 1037 2919 2143 102 | 101 2204 102
                                      position_ids_T   0    1    2    3   4 |   0    1   2
                                      cu_seqlens       0 5 8

Of the last layer only the first token of each text is read, so only that is computed there
(`BertLayer.forward_first_tokens`): exact, and saves a seventh of the work of a six-layer encoder.

Dropout is on exactly when randomness is passed: there is no train or eval mode to forget. Each
place with a dropout of its own has a number, its site: 0 after the embeddings, 1 + 3·i in the
attention of layer i, 2 + 3·i and 3 + 3·i after the layer's halves.

Shapes: B sequences, T packed tokens, R rows (all tokens, or first tokens alone), D hidden,
I intermediate, C classes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kernels import use_triton
from ..kernels.attention import PackedLayout, first_token_attention, packed_attention, packed_layout
from ..kernels.dropout import DropoutCounters, Randomness
from ..kernels.embedding import embed_tokens
from ..kernels.gelu import bias_gelu
from ..kernels.residual_norm import dropout_residual_norm
from .config import ACTIVATIONS, BertConfig

HEAD_SIZE = 50
"""Width of the hidden layer of the recipe's classification head."""


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
        tables = (self.word.weight, self.position.weight, self.token_type.weight[0])
        norm = (self.norm.weight, self.norm.bias, self.norm.eps)
        return embed_tokens(
            input_ids_T,
            position_ids_T,
            *tables,
            *norm,
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
        self, hidden_TD: Tensor, layout: PackedLayout, randomness: Randomness | None
    ) -> Tensor:
        """Every token's new hidden state, [T, D]."""
        p, site = self.attention_dropout_p, self.first_site
        context_TD = packed_attention(
            self.qkv(hidden_TD), layout, self.num_heads, p, randomness, site, self.impl
        )
        return self.feed_forward(context_TD, hidden_TD, randomness)

    def forward_first_tokens(
        self, hidden_TD: Tensor, layout: PackedLayout, randomness: Randomness | None
    ) -> Tensor:
        """The new hidden state of each sequence's first token, [B, D].

        Keys and values still need every token; the query, and all that follows attention, only the
        first ones.
        """
        p, site = self.attention_dropout_p, self.first_site
        split = (hidden_TD.shape[1], 2 * hidden_TD.shape[1])
        query_weight, key_value_weight = self.qkv.weight.split(split)
        query_bias, key_value_bias = self.qkv.bias.split(split)
        key_value_T2D = F.linear(hidden_TD, key_value_weight, key_value_bias)
        first_BD = hidden_TD.index_select(0, layout.first_tokens_B)
        query_BD = F.linear(first_BD, query_weight, query_bias)
        context_BD = first_token_attention(
            query_BD, key_value_T2D, layout, self.num_heads, p, randomness, site, self.impl
        )
        if isinstance(randomness, DropoutCounters):
            randomness = randomness.take(layout.first_tokens_B)
        return self.feed_forward(context_BD, first_BD, randomness)

    def feed_forward(
        self, context_RD: Tensor, hidden_RD: Tensor, randomness: Randomness | None
    ) -> Tensor:
        """All that follows the attention product: [R, D], each row by itself."""
        p, site, impl = self.hidden_dropout_p, self.first_site, self.impl
        norm = (self.attention_norm.weight, self.attention_norm.bias, self.attention_norm.eps)
        hidden_RD = dropout_residual_norm(
            self.attention_output(context_RD), hidden_RD, *norm, p, randomness, site + 1, impl
        )
        if self.activation == "gelu" and use_triton(impl, hidden_RD):
            without_bias_RI = F.linear(hidden_RD, self.intermediate.weight)
            activated_RI = bias_gelu(without_bias_RI, self.intermediate.bias, impl)
        else:  # torch adds the bias in the matrix product
            activated_RI = ACTIVATIONS[self.activation](self.intermediate(hidden_RD))
        norm = (self.output_norm.weight, self.output_norm.bias, self.output_norm.eps)
        return dropout_residual_norm(
            self.output(activated_RI), hidden_RD, *norm, p, randomness, site + 2, impl
        )


class Bert(nn.Module):
    """Embeddings, encoder layers and pooler."""

    def __init__(self, config: BertConfig, impl: str = "auto") -> None:
        """impl: how the operations run (`kernels/__init__.py`)."""
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
        num_layers: int | None = None,
        randomness: Randomness | None = None,
    ) -> Tensor:
        """Hidden states after the first `num_layers` layers (None: all), [T, D].

        input_ids_T, position_ids_T: [T] integer. randomness: turns dropout on and feeds it.
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
        """The layers from `first_layer` on, the last one included, then tanh(W · first token).

        hidden_TD: what layer `first_layer` reads. Returns [B, D].
        """
        *middle, last = list(self.layers)[first_layer:]
        for layer in middle:
            hidden_TD = layer(hidden_TD, layout, randomness)
        assert isinstance(last, BertLayer)
        first_BD = last.forward_first_tokens(hidden_TD, layout, randomness)
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
        randomness: Randomness | None = None,
    ) -> Tensor:
        """Logits, [B, C], of the texts of a `PackedBatch`.

        input_ids_T, position_ids_T: [T] integer, on the model's device. cu_seqlens: [B+1] integer,
        from 0 to the number of real tokens, on the CPU. randomness: turns dropout on and feeds it.
        """
        # The last layer is left to `pool`, which computes it for first tokens alone.
        layout, below_last = packed_layout(cu_seqlens, self.device), len(self.bert.layers) - 1
        hidden_TD = self.bert(input_ids_T, position_ids_T, layout, below_last, randomness)
        pooled_BD = self.bert.pool(hidden_TD, layout, below_last, randomness)
        logits_BC: Tensor = self.classifier(pooled_BD)
        return logits_BC


def stays_fp32(name: str, device: torch.device, impl: str = "auto") -> bool:
    """Whether a parameter stays fp32 where the rest is rounded to bf16 or fp16.

    Embedding tables do: gathering rows gains nothing from 16 bits, and the sum of many gradients
    into the row of a frequent word would lose most of them. So do norms, except in torch on a GPU,
    which wants them in the dtype of their input.
    """
    fp32_norms = device.type == "cpu" or impl == "triton"
    return name.startswith("bert.embeddings.") or (fp32_norms and "norm." in name)
