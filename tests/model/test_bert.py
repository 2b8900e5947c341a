"""Our packed encoder against transformers' padded one."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from twostage.data.packing import PackedBatch, pack
from twostage.data.tables import Table
from twostage.data.token_store import TokenStore
from twostage.data.tokenization import load_tokenizer
from twostage.errors import ModelError
from twostage.kernels.attention import packed_layout
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
    tensor_names,
    to_stored,
)
from twostage.model.config import BertConfig

# Relative; twice fp32's rounding unit. Below this, two fp32 results differ by luck only.
FLOOR = 1.2e-7


def text_of_tokens(snippets: Table, demo_folder: Path, lengths: list[int]) -> TokenStore:
    """Real text cut to exactly these numbers of tokens, with [CLS] and [SEP] where they fit."""
    tokenizer = load_tokenizer(demo_folder / "model")
    long_text = " ".join(snippets.texts[:400])
    ids = tokenizer.encode(long_text).ids
    flat: list[int] = []
    start = 1
    for length in lengths:
        body = ids[start : start + max(0, length - 2)]
        start += len(body)
        flat += [101, *body, 102][:length]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return TokenStore(torch.tensor(flat, dtype=torch.int32), offsets)


def transformers_bert(folder: Path, dtype: torch.dtype) -> transformers.BertModel:
    model: Any = transformers.BertModel.from_pretrained(folder, attn_implementation="eager")
    return model.to(dtype).eval()


def padded(store: TokenStore) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask, [B, L]."""
    rows = [store.ids[a:b] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    ids_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).long()
    mask_BL = (torch.arange(ids_BL.shape[1]) < store.lengths[:, None]).long()
    return ids_BL, mask_BL


def relative_error(ours: Tensor, reference: Tensor) -> float:
    ours, reference = ours.detach().double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.slow
def test_hidden_states_pooler_and_gradients_agree_with_transformers_on_1_to_512_tokens(
    demo_folder: Path, snippets: Table
) -> None:
    folder = demo_folder / "model"
    store = text_of_tokens(snippets, demo_folder, [1, 2, 3, 17, 64, 65, 128, 300, 511, 512, 30])
    batch = pack(store, torch.arange(len(store)))
    ids_BL, mask_BL = padded(store)
    # An arbitrary smooth function of hidden states and pooler output, to compare gradients by. Of
    # numbers about 1: the sine of larger ones would enlarge the forward pass's rounding, by luck.
    weights_D = torch.randn(384, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights_D /= 384**0.5

    def run_theirs(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        model = transformers_bert(folder, dtype)
        out = model(input_ids=ids_BL, attention_mask=mask_BL)
        hidden_TD = out.last_hidden_state[mask_BL.bool()]
        score = (hidden_TD * weights_D.to(dtype)).sum(1).sin().sum() + out.pooler_output.sum()
        score.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        return hidden_TD, out.pooler_output, gradients

    reference, theirs = run_theirs(torch.float64), run_theirs(torch.float32)
    model = build_model(load_checkpoint(folder), 2, torch.Generator()).bert
    layout = packed_layout(batch.cu_seqlens)
    below_last_TD = model(batch.input_ids_T, batch.position_ids_T, layout, num_layers=5)
    hidden_TD = model.layers[5](below_last_TD, layout, None)
    pooled_BD = model.pool(below_last_TD, layout, 5)
    real_TD = hidden_TD[: batch.num_tokens]
    score = (real_TD * weights_D.float()).sum(1).sin().sum() + pooled_BD.sum()
    score.backward()

    assert (
        relative_error(real_TD, reference[0]) <= 2 * relative_error(theirs[0], reference[0]) + FLOOR
    )
    assert relative_error(pooled_BD, reference[1]) <= (
        2 * relative_error(theirs[1], reference[1]) + FLOOR
    )
    ours = to_stored({name: p.grad for name, p in model.named_parameters()}, 6)
    for name, expected in reference[2].items():
        if name.endswith("key.bias"):
            continue  # exactly 0: softmax does not change when all scores of a row shift alike
        error = relative_error(ours[f"bert.{name}"], expected)
        assert error <= 2 * relative_error(theirs[2][name], expected) + FLOOR, name


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_each_activation_agrees_with_transformers(
    tiny_checkpoint: Checkpoint, activation: str
) -> None:
    config = replace(tiny_checkpoint.config, hidden_act=activation)
    theirs = transformers.BertModel(
        transformers.BertConfig(**{f: getattr(config, f) for f in config.__dataclass_fields__})
    ).eval()
    stored = to_stored(tiny_checkpoint.tensors, config.num_hidden_layers)
    theirs.load_state_dict({k.removeprefix("bert."): v for k, v in stored.items()})
    model = build_model(replace(tiny_checkpoint, config=config), 2, torch.Generator()).bert
    ids = torch.randint(0, 101, (1, 9), generator=torch.Generator().manual_seed(3))
    out = model(ids[0], torch.arange(9), packed_layout(torch.tensor([0, 9])))
    torch.testing.assert_close(out, theirs(input_ids=ids).last_hidden_state[0])


def random_batch(lengths: list[int], round_to: int) -> PackedBatch:
    total = sum(lengths)
    ids = torch.randint(1, 101, (total,), generator=torch.Generator().manual_seed(5))
    store = TokenStore(ids.int(), torch.tensor([0, *lengths]).cumsum(0))
    return pack(store, torch.arange(len(lengths)), round_to=round_to)


def classifier(checkpoint: Checkpoint, num_classes: int = 3) -> BertClassifier:
    return build_model(checkpoint, num_classes, torch.Generator().manual_seed(2))


def test_a_text_has_the_same_logits_alone_and_packed_with_others(
    tiny_checkpoint: Checkpoint,
) -> None:
    model = classifier(tiny_checkpoint)
    lengths = [5, 1, 32, 7]
    together = random_batch(lengths, round_to=64)
    logits_BC = model(*together)
    for b, (start, end) in enumerate(
        zip(together.cu_seqlens, together.cu_seqlens[1:], strict=False)
    ):
        ids = together.input_ids_T[start:end]
        alone = model(ids, torch.arange(len(ids)), torch.tensor([0, len(ids)]))
        torch.testing.assert_close(logits_BC[b : b + 1], alone, rtol=1e-5, atol=1e-6)


def test_filler_tokens_change_nothing_and_receive_no_gradient(tiny_checkpoint: Checkpoint) -> None:
    gradients = []
    for round_to in (1, 64):
        model = classifier(tiny_checkpoint)
        batch = random_batch([5, 1, 12], round_to)
        logits_BC = model(*batch)
        logits_BC.square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(batch.input_ids_T) == 64
    for name, without in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], without, rtol=1e-5, atol=1e-6)
    # Token 0 occurs as filler only.
    assert gradients[1]["bert.embeddings.word.weight"][0].abs().max() == 0


def test_without_randomness_nothing_is_dropped_and_with_one_the_draws_repeat(
    tiny_checkpoint: Checkpoint,
) -> None:
    model, batch = classifier(tiny_checkpoint), random_batch([5, 9], 64)
    plain = [model(*batch) for _ in range(2)]
    drawn = [model(*batch, randomness=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], plain[0])


def test_dropout_acts_at_every_site_with_its_own_probability(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(
        tiny_checkpoint.config, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2
    )
    seen: list[tuple[float, tuple[int, ...]]] = []

    def spy(
        shape: torch.Size, p: float, generator: torch.Generator, dtype: torch.dtype, site: int = 0
    ) -> tuple[Tensor, float]:
        seen.append((p, tuple(shape)))
        return torch.ones(shape, dtype=dtype), 1.0

    for kernel in ("dropout", "padded_attention", "residual_norm"):
        monkeypatch.setattr(f"twostage.kernels.{kernel}.dropout_mask", spy)
    model = classifier(replace(tiny_checkpoint, config=config))
    model(*random_batch([5, 9], 64), randomness=torch.Generator())
    hidden, probabilities = (0.1, (64, 24)), (0.2, (1, 4, 16, 16))
    first_tokens = [(0.2, (1, 4, 2, 16)), (0.1, (2, 24)), (0.1, (2, 24))]
    assert seen == [hidden, *[probabilities, hidden, hidden] * 2, *first_tokens]


@pytest.mark.parametrize("lengths", [[5], [7, 1, 30, 12], [9] * 6])
@pytest.mark.parametrize("num_layers", [0, 1, 2])
def test_computing_the_last_layer_for_first_tokens_alone_changes_no_logit_and_no_gradient(
    tiny_checkpoint: Checkpoint, lengths: list[int], num_layers: int
) -> None:
    """num_layers: how many layers are computed before the rest is asked for."""
    batch = random_batch(lengths, 64)

    def run(full: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = classifier(tiny_checkpoint).double()
        # The model takes the dtype of its embeddings' output from the pooler's weight: fp64.
        layout = packed_layout(batch.cu_seqlens)
        inputs = (batch.input_ids_T, batch.position_ids_T, layout)
        if full:
            first_BD = model.bert(*inputs)[layout.first_tokens_B]
            logits_BC = model.classifier(torch.tanh(model.bert.pooler(first_BD)))
        else:
            hidden_TD = model.bert(*inputs, num_layers=num_layers)
            logits_BC = model.classifier(model.bert.pool(hidden_TD, layout, num_layers))
        (logits_BC * torch.linspace(-1, 2, logits_BC.numel()).view_as(logits_BC)).sum().backward()
        return logits_BC.detach(), {name: p.grad for name, p in model.named_parameters()}

    (logits_BC, gradients), (expected_BC, expected) = run(full=False), run(full=True)
    torch.testing.assert_close(logits_BC, expected_BC, rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_building_and_running_a_model_leaves_the_global_generator_alone(
    tiny_checkpoint: Checkpoint,
) -> None:
    before = torch.get_rng_state()
    model, batch = classifier(tiny_checkpoint), random_batch([5, 9], 64)
    model(*batch, randomness=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_new_head_is_drawn_as_torch_linear_draws_it(tiny_checkpoint: Checkpoint) -> None:
    head: Any = classifier(tiny_checkpoint, num_classes=400).classifier[2]
    bound = 50**-0.5
    assert head.weight.shape == (400, 50)
    assert bound * 0.99 < head.weight.abs().max() <= bound
    assert abs(head.weight.std().item() - bound / 3**0.5) < 0.01 * bound
    assert head.bias.abs().max() <= bound


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "swish"),
        ("num_attention_heads", 5),
        ("hidden_size", 0),
        ("vocab_size", "many"),
        ("layer_norm_eps", -1.0),
        ("hidden_dropout_prob", 1.0),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_the_name_of_its_field(
    tiny_checkpoint: Checkpoint, field: str, value: Any
) -> None:
    with pytest.raises(ModelError, match=field):
        replace(tiny_checkpoint.config, **{field: value})


def test_the_name_table_covers_every_parameter_once(tiny_checkpoint: Checkpoint) -> None:
    model = classifier(tiny_checkpoint).bert
    ours = [name for name, _ in tensor_names(3)]
    assert sorted(ours) == sorted(name for name, _ in model.named_parameters())
    assert isinstance(model.config, BertConfig)


@pytest.mark.slow
def test_building_a_model_does_not_load_torchs_compiler(tiny: Path) -> None:
    code = (
        "import sys, torch\n"
        "from twostage.model.checkpoint import build_model, load_checkpoint\n"
        f"build_model(load_checkpoint({str(tiny)!r}), 2, torch.Generator())\n"
        "print('torch._dynamo' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert out.stdout.strip() == b"False"
