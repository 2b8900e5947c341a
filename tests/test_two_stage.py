"""The algorithm as a whole: against a transformers-based loop, and its promises."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from torch.nn import functional as F

from twostage import Recipe, Table, train_two_stage
from twostage.api import Result, train_one_seed
from twostage.data.samplers import random_batches
from twostage.data.token_store import StageData, TokenStore
from twostage.data.tokenization import load_tokenizer
from twostage.errors import DataError, ModelError, UsageError
from twostage.fast import trunk
from twostage.model.bert import BertClassifier
from twostage.model.checkpoint import (
    Checkpoint,
    build_model,
    load_checkpoint,
)
from twostage.preparation import Datasets
from twostage.progress import StepReport
from twostage.recipe import ENGINES
from twostage.saved_model import ModelInfo, save_model
from twostage.training import stage as stage_module
from twostage.training.losses import (
    cross_entropy,
    effective_number_weights,
    inverse_frequency_weights,
    ldam,
    ldam_margins,
)
from twostage.training.stage import StageSettings, make_plain_step, train_stage
from twostage.training.state import HEAD_STREAM, TrainingState, derive_seed
from twostage.two_stage import fine_tune, stage_1_signal

TEXTS = ["good film", "fine", "great fun", "bad film", "awful"]


@pytest.fixture(scope="module")
def without_dropout(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MiniLM with both dropout probabilities 0."""
    folder = tmp_path_factory.mktemp("model") / "minilm"
    shutil.copytree(demo_folder / "model", folder)
    return turn_dropout_off(folder)


def turn_dropout_off(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def imbalanced(snippets: Table, positives: int, negatives: int) -> tuple[list[str], list[int]]:
    labels = np.array([int(label) for label in snippets.labels])
    rows = [*np.flatnonzero(labels == 1)[:positives], *np.flatnonzero(labels == 0)[:negatives]]
    return [snippets.texts[i] for i in rows], [int(labels[i]) for i in rows]


def losses_of_a_transformers_loop(
    folder: Path, texts: list[str], labels: list[int], seed: int
) -> dict[int, list[float]]:
    """The published recipe as one writes it with transformers: padded, eager, fp32."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = transformers.BertModel.from_pretrained(folder)
    head = torch.nn.Sequential(torch.nn.Linear(384, 50), torch.nn.ReLU(), torch.nn.Linear(50, 2))
    generator = torch.Generator().manual_seed(derive_seed(HEAD_STREAM, seed))
    ours = build_model(load_checkpoint(folder), 2, generator)
    head.load_state_dict(ours.classifier.state_dict())
    model = torch.nn.ModuleDict({"encoder": encoder, "head": head}).train()

    counts = np.bincount(labels)
    shares = (1 - 0.9999) / (1 - 0.9999**counts)
    weights = torch.tensor(shares / shares.sum() * 2, dtype=torch.float32)
    margins = torch.tensor(0.5 * (counts / counts.min()) ** -0.25, dtype=torch.float32)

    def ldam(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits - F.one_hot(y, 2) * margins, y, weight=weights)

    losses: dict[int, list[float]] = {}
    for stage, rate, loss_function in ((1, 5e-4, ldam), (2, 5e-5, F.cross_entropy)):
        model.requires_grad_(stage == 2)
        for module in (encoder.encoder.layer[-1], encoder.pooler, head):
            module.requires_grad_(True)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=rate, eps=1e-8, weight_decay=0.0)
        batches = random_batches(len(texts), 16, (seed, stage), 0)
        schedule = transformers.get_linear_schedule_with_warmup(optimizer, 0, len(batches))
        losses[stage] = []
        for rows in batches:
            batch = tokenizer(
                [texts[i] for i in rows],
                padding="longest",
                truncation=True,
                max_length=128,
                return_tensors="pt",
            )
            logits = head(encoder(**batch).pooler_output)
            loss = loss_function(logits, torch.tensor([labels[i] for i in rows]))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses[stage].append(loss.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_losses_equal_those_of_a_transformers_loop_for_20_steps_of_each_stage(
    without_dropout: Path, snippets: Table, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setattr(stage_module, "REPORT_EVERY", 1)
    texts, labels = imbalanced(snippets, positives=280, negatives=40)
    recipe = Recipe(
        seeds=(7,),
        learning_rate_stage_1=5e-4,
        learning_rate_stage_2=5e-5,
        precision="fp32",
        device="cpu",
        engine=engine,
    )
    ours: dict[int, list[float]] = {1: [], 2: []}
    train_two_stage(
        without_dropout,
        (texts, labels),
        (texts[:20], labels[:20]),
        recipe,
        on_report=lambda report: ours[report.stage].append(report.loss),
    )
    theirs = losses_of_a_transformers_loop(without_dropout, texts, labels, seed=7)
    for stage in (1, 2):
        assert len(ours[stage]) == 20
        np.testing.assert_allclose(ours[stage], theirs[stage], rtol=0, atol=1e-4)


RECIPE = Recipe(seeds=(7, 42), batch_size=2, device="cpu")


def run(model: Path, recipe: Recipe = RECIPE, **kwargs: Any) -> Result:
    return train_two_stage(
        model, (TEXTS, [1, 1, 1, 0, 0]), (TEXTS, [1, 1, 1, 0, 0]), recipe, **kwargs
    )


def test_a_run_repeats_bit_for_bit_and_seeds_do_not_depend_on_each_other(tiny: Path) -> None:
    first, again = run(tiny), run(tiny)
    alone = run(tiny, replace(RECIPE, seeds=(42,)))
    for a, b in zip(first.seeds, again.seeds, strict=True):
        assert np.array_equal(a.logits_NC, b.logits_NC)
    assert np.array_equal(first.seeds[1].logits_NC, alone.seeds[0].logits_NC)
    assert not np.array_equal(first.seeds[0].logits_NC, first.seeds[1].logits_NC)


def test_process_wide_random_state_is_neither_read_nor_changed(tiny: Path) -> None:
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)
    first = run(tiny)
    assert torch.equal(torch.get_rng_state(), before[0])
    after = np.random.get_state(legacy=False)
    assert np.array_equal(after["state"]["key"], before[1]["state"]["key"])
    torch.manual_seed(2)
    assert np.array_equal(run(tiny).seeds[0].logits_NC, first.seeds[0].logits_NC)


@pytest.fixture
def tiny_without_dropout(tiny: Path) -> Path:
    return turn_dropout_off(tiny)


@pytest.mark.parametrize("method", ["reweight", "augment", "vanilla"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_plain_engine_trains_what_the_fast_one_trains(
    tiny_without_dropout: Path, method: str, precision: str
) -> None:
    recipe = replace(
        RECIPE,
        method=method,
        precision=precision,
        learning_rate_stage_1=5e-3,
        learning_rate_stage_2=5e-4,
    )
    augmented = (TEXTS * 2, [1, 1, 1, 0, 0] * 2) if method == "augment" else None
    fast, plain = (
        run(tiny_without_dropout, replace(recipe, engine=engine), augmented=augmented)
        for engine in ENGINES
    )
    untrained = run(tiny_without_dropout, replace(recipe, epochs_stage_1=0, epochs_stage_2=0))
    for ours, its, start in zip(fast.seeds, plain.seeds, untrained.seeds, strict=True):
        moved = np.abs(its.logits_NC - start.logits_NC).max()
        tolerance = 1e-3 if precision == "fp32" else 0.1
        assert np.abs(ours.logits_NC - its.logits_NC).max() < tolerance * moved


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each stage was given; the stages still run."""
    seen: list[dict[str, Any]] = []

    def spy(
        state: TrainingState, data: StageData, loss: Any, settings: StageSettings, **kw: Any
    ) -> None:
        model = state.model
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        seen.append(
            {
                "stage": state.stage,
                "rows": len(data),
                "settings": settings,
                "trained": trained,
                "all": {n for n, _ in model.named_parameters()},
                "loss": float(loss(torch.tensor([[0.0, 1.0]] * 2), torch.tensor([0, 1]))),
            }
        )
        train_stage(state, data, loss, settings, **kw)

    monkeypatch.setattr("twostage.api.train_stage", spy)
    return seen


def test_stage_1_trains_the_top_and_stage_2_everything(
    tiny: Path, stages: list[dict[str, Any]]
) -> None:
    run(tiny, replace(RECIPE, seeds=(7,)))
    first, second = stages
    prefixes = ("bert.layers.1.", "bert.pooler.", "classifier.")
    assert first["trained"] == {n for n in first["all"] if n.startswith(prefixes)}
    assert second["trained"] == second["all"]
    assert (first["stage"], second["stage"]) == (1, 2)
    assert first["settings"].learning_rate == 1e-4
    assert second["settings"].learning_rate == 1e-5
    assert first["loss"] != second["loss"]


def test_the_algorithm_stands_alone(tiny_checkpoint: Checkpoint) -> None:
    """Without precision, engine or report, it is the plain engine's fp32."""
    ids = torch.randint(1, 101, (120,), generator=torch.Generator().manual_seed(1)).int()
    data = StageData(TokenStore(ids, torch.arange(0, 121, 10)), np.arange(12) % 4 // 3)
    recipe = replace(RECIPE, precision="fp32", engine="plain", batch_size=4)
    model = fine_tune(tiny_checkpoint, data, 2, recipe, seed=7)
    same, _ = train_one_seed(tiny_checkpoint, Datasets(data, data, 2), recipe, 7, make_plain_step)
    other = fine_tune(tiny_checkpoint, data, 2, recipe, seed=8)
    assert all(map(torch.equal, model.parameters(), same.parameters()))
    assert not any(map(torch.equal, model.classifier.parameters(), other.classifier.parameters()))


def test_stage_1_balances_the_data_or_the_loss() -> None:
    train, augmented = (
        StageData(TokenStore(torch.ones(n).int(), torch.arange(n + 1)), np.arange(n) % 4 // 3)
        for n in (40, 44)
    )
    logits_BC, labels_B = torch.randn(9, 2), torch.arange(9) % 2
    weights_C, margins_C = effective_number_weights([30, 10]), ldam_margins([30, 10], 0.3)
    rarely_C = inverse_frequency_weights([33, 11], 0.5)
    for change, expected_data, expected in (
        ({"ldam_max_m": 0.3}, train, ldam(logits_BC, labels_B, margins_C, weights_C)),
        (
            {"ldam_max_m": 0.3, "ldam_s": 2.0, "class_weights": "none"},
            train,
            ldam(logits_BC, labels_B, margins_C, None, 2.0),
        ),
        ({"loss": "ce"}, train, cross_entropy(logits_BC, labels_B, weights_C)),
        ({"method": "augment"}, augmented, cross_entropy(logits_BC, labels_B)),
        (
            {"method": "augment", "class_weights": "inverse-sqrt"},
            augmented,
            cross_entropy(logits_BC, labels_B, rarely_C),
        ),
        (
            {"method": "augment", "loss": "ldam"},
            augmented,
            ldam(logits_BC, labels_B, ldam_margins([33, 11]), None),
        ),
    ):
        data, loss = stage_1_signal(train, augmented, 2, replace(RECIPE, **change))
        assert data is expected_data
        torch.testing.assert_close(loss(logits_BC, labels_B), expected)


def test_vanilla_and_no_epochs_of_stage_1_are_the_same_run(
    tiny: Path, stages: list[dict[str, Any]]
) -> None:
    vanilla = run(tiny, replace(RECIPE, method="vanilla"))
    none = run(tiny, replace(RECIPE, epochs_stage_1=0))
    assert [s["stage"] for s in stages] == [2, 2, 2, 2]
    assert np.array_equal(vanilla.seeds[0].logits_NC, none.seeds[0].logits_NC)


def test_augment_trains_stage_1_on_augmented_data_with_plain_cross_entropy(
    tiny: Path, stages: list[dict[str, Any]]
) -> None:
    recipe = replace(RECIPE, method="augment", seeds=(7,))
    augmented = (TEXTS * 4, [1, 1, 1, 0, 0] * 4)
    run(tiny, recipe, augmented=augmented)
    assert [s["rows"] for s in stages] == [20, 5]
    assert stages[0]["loss"] == stages[1]["loss"] == pytest.approx((1.3132617 + 0.3132617) / 2)
    assert stages[0]["settings"].schedule_steps is None
    run(tiny, replace(recipe, upstream_schedule=True), augmented=augmented)
    assert stages[2]["settings"].schedule_steps == 3
    with pytest.raises(DataError, match="needs augmented data"):
        run(tiny, recipe)


def test_a_class_without_augmented_row_is_named(tiny: Path) -> None:
    recipe = replace(RECIPE, method="augment")
    with pytest.raises(DataError, match="class '0' has no row in augmented data"):
        run(tiny, recipe, augmented=(["good"], [1]))


@pytest.mark.parametrize(
    ("sampler", "method", "expected"),
    [
        ("random", "reweight", ["random", "random"]),
        ("token-budget", "reweight", ["token-budget", "token-budget"]),
        ("class-balanced", "reweight", ["class-balanced", "random"]),
        ("class-balanced", "vanilla", ["class-balanced"]),
    ],
)
def test_which_stage_the_sampler_serves(
    tiny: Path, stages: list[dict[str, Any]], sampler: str, method: str, expected: list[str]
) -> None:
    run(tiny, replace(RECIPE, sampler=sampler, method=method, seeds=(7,)))
    assert [s["settings"].sampler for s in stages] == expected


def test_each_seed_starts_from_the_pretrained_weights_and_hands_over_its_model(tiny: Path) -> None:
    handed: list[tuple[int, float]] = []

    def keep(result: Result, model: BertClassifier) -> None:
        start = load_checkpoint(tiny).tensors["layers.0.qkv.weight"]
        moved = (model.state_dict()["bert.layers.0.qkv.weight"] - start).abs().max().item()
        handed.append((result.seeds[-1].seed, moved))

    run(tiny, on_seed_end=keep)
    assert [seed for seed, _ in handed] == [7, 42]
    # Three steps of stage 2 move a weight by 2e-5 at most; two seeds in a row would move it more.
    assert all(0 < moved < 2.1e-5 for _, moved in handed)


def test_tables_that_share_a_source_keep_their_own_labels(tiny: Path) -> None:
    train, test = Table(TEXTS, [1, 1, 1, 0, 0]), Table(TEXTS[:3], [0, 0, 1])
    result = train_two_stage(tiny, train, test, replace(RECIPE, seeds=(7,)))
    assert result.class_counts_C == (2, 3)
    assert result.seeds[0].metrics.confusion_CC.sum(axis=1).tolist() == [2, 1]


def test_the_trunk_is_cached_once_for_all_seeds_and_epochs_and_without_dropout(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = trunk.compute_features

    def spy(*arguments: Any, **named: Any) -> trunk.Features:
        computed.append(len(arguments[2]))
        assert (arguments[4] is None) == cached_now, "the fifth turns dropout on"
        return original(*arguments, **named)

    monkeypatch.setattr(trunk, "compute_features", spy)
    recipe = replace(RECIPE, epochs_stage_1=3, learning_rate_stage_1=1e-2)
    cached_now = True
    cached = run(tiny, replace(recipe, cache_trunk=True))
    assert computed == [5]
    cached_now = False
    recomputed = run(tiny, recipe)
    assert computed == [5] + [5] * 6  # two seeds of three epochs
    for one, other in zip(cached.seeds, recomputed.seeds, strict=True):
        assert not np.array_equal(one.logits_NC, other.logits_NC)


def test_the_trunk_is_shared_by_all_seeds_with_new_masks_in_each_epoch(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[torch.Tensor] = []
    original = trunk.compute_features

    def spy(*arguments: Any, **named: Any) -> trunk.Features:
        features = original(*arguments, **named)
        computed.append(features.hidden_ED)
        return features

    monkeypatch.setattr(trunk, "compute_features", spy)
    recipe = replace(
        RECIPE,
        epochs_stage_1=3,
        share_trunk=True,
        learning_rate_stage_1=1e-2,
        learning_rate_stage_2=1e-2,
    )
    shared = run(tiny, recipe)
    assert len(computed) == 3, "not once more for the second seed"
    assert not torch.equal(computed[0], computed[1])
    one_seed = recipe.seeds[1]
    alone = run(tiny, replace(recipe, seeds=(one_seed,)))
    np.testing.assert_array_equal(shared.seeds[1].logits_NC, alone.seeds[0].logits_NC)
    others = run(tiny, replace(recipe, share_trunk=False))
    for one, other in zip(shared.seeds, others.seeds, strict=True):
        assert not np.array_equal(one.logits_NC, other.logits_NC)


def test_graphs_are_refused_for_heads_that_their_attention_does_not_take(
    tiny_checkpoint: Checkpoint, short_heads_checkpoint: Checkpoint
) -> None:
    recipe = replace(RECIPE, max_length=16, graphs=True)
    recipe.check_fit(short_heads_checkpoint.config, "M")
    with pytest.raises(UsageError, match="heads of 32 or 64 features; those of 'M' have 6"):
        recipe.check_fit(tiny_checkpoint.config, "M")
    replace(recipe, graphs=False).check_fit(tiny_checkpoint.config, "M")


def test_columns_of_a_data_frame_serve_as_data(tiny: Path) -> None:
    frame = pd.DataFrame({"text": TEXTS, "label": [1, 1, 1, 0, 0]}).sample(frac=1, random_state=1)
    result = train_two_stage(
        tiny, (frame.text, frame.label), (frame.text, frame.label.to_numpy()), RECIPE
    )
    assert result.class_counts_C == (2, 3)


@pytest.mark.parametrize("which", ["train", "test"])
def test_no_rows_are_refused(tiny: Path, which: str) -> None:
    data = {"train": (TEXTS, [1, 1, 1, 0, 0]), "test": (TEXTS, [1, 1, 1, 0, 0]), which: ([], [])}
    with pytest.raises(DataError, match=f"{which} data has no rows"):
        train_two_stage(tiny, data["train"], data["test"], RECIPE)


@pytest.mark.parametrize("labels", [["b", "a", "c", "b", "a"], [5, -1, 30, 5, -1]])
def test_three_classes_with_names_or_numbers(tiny: Path, labels: list[str]) -> None:
    result = train_two_stage(tiny, (TEXTS, labels), (TEXTS, labels), replace(RECIPE, seeds=(1,)))
    assert result.classes.names in {("a", "b", "c"), ("-1", "5", "30")}
    assert result.seeds[0].logits_NC.shape == (5, 3)
    assert result.seeds[0].metrics.f1_C.shape == (3,)
    assert result.tail_class == 2
    assert result.class_counts_C == (2, 2, 1)


def test_empty_and_very_long_texts_train(tiny: Path) -> None:
    texts = ["", " ", "x" * 100_000, "good " * 5_000, "🙂"]
    result = train_two_stage(tiny, (texts, [1, 1, 1, 0, 0]), (texts, [1, 1, 1, 0, 0]), RECIPE)
    assert np.isfinite(result.seeds[0].logits_NC).all()


def test_reports_name_seed_and_stage(tiny: Path) -> None:
    reports: list[StepReport] = []
    run(tiny, on_report=reports.append)
    assert [(r.seed, r.stage) for r in reports] == [(7, 1), (7, 2), (42, 1), (42, 2)]
    assert all(r.step == r.total_steps == 3 for r in reports)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "both"}, "method is 'both'"),
        ({"sampler": "x"}, "sampler is 'x'"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
        ({"loss": "focal"}, "loss is 'focal'"),
        ({"class_weights": "x"}, "class_weights is 'x'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"epochs_stage_1": -1}, "epochs_stage_1 is -1"),
        ({"max_length": 1}, "max_length is 1"),
        ({"learning_rate_stage_2": 0.0}, "learning_rate_stage_2 is 0"),
        ({"learning_rate_stage_1": float("nan")}, "learning_rate_stage_1 is nan"),
        ({"ldam_max_m": -1.0}, "ldam_max_m is -1"),
        ({"seeds": ()}, "seeds are"),
        ({"seeds": (1, -2)}, "seeds are"),
        ({"seeds": 7}, "seeds are 7"),
        ({"seeds": ("7",)}, "seeds are"),
        ({"seeds": (1.5,)}, "seeds are"),
        ({"batch_size": True}, "batch_size is True"),
        ({"engine": "slow"}, "engine is 'slow'; expected one of fast, plain"),
        ({"engine": "plain", "kernels": "triton"}, "engine 'plain' has no kernels 'triton'"),
        ({"engine": "plain", "graphs": True}, "engine 'plain' has no graphs"),
        ({"engine": "plain", "share_trunk": True}, "engine 'plain' has no share_trunk"),
        ({"engine": "plain", "cache_trunk": True}, "engine 'plain' has no cache_trunk"),
        ({"learning_rate_stage_1": "x"}, "learning_rate_stage_1 is 'x'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_by_the_name_of_its_field(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        replace(RECIPE, **change)


def test_a_recipe_that_does_not_fit_the_model_is_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match=r"max_length is 600.*512 positions"):
        run(tiny, replace(RECIPE, max_length=600))
    with pytest.raises(UsageError, match=r"stage_1_layers is 3.*2 layers"):
        run(tiny, replace(RECIPE, stage_1_layers=3))
    checkpoint = load_checkpoint(tiny)
    smaller = replace(checkpoint.config, vocab_size=1_000)
    tensors = dict(checkpoint.tensors)
    tensors["embeddings.word.weight"] = tensors["embeddings.word.weight"][:1_000]
    model = build_model(Checkpoint(smaller, tensors), 2, torch.Generator())
    save_model(tiny, model, load_tokenizer(tiny), ModelInfo(("0", "1"), (1, 1), 128))
    with pytest.raises(ModelError, match=r"id 30521 to token '##～'.*vocab_size 1000.*29,522 tok"):
        run(tiny)
