"""The fast step computes the plain step's numbers, with all of its savings and without any one.

And both compute torch's: the plain step is checked against every layer run for every token, torch's
own AdamW and clipping.
"""

import ast
import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import twostage
import twostage.kernels
from twostage.data.packing import pack
from twostage.data.samplers import random_batches
from twostage.data.token_store import StageData
from twostage.fast.step import fuse, make_step
from twostage.kernels.attention import packed_layout
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.model.checkpoint import Checkpoint
from twostage.recipe import Recipe
from twostage.training.losses import cross_entropy, ldam
from twostage.training.optim import linear_decay
from twostage.training.stage import MakeStep, StageSettings, make_plain_step, train_stage
from twostage.two_stage import stage_1_signal

BOTH = pytest.mark.parametrize("make", [make_plain_step, make_step], ids=["plain", "fast"])


@pytest.mark.parametrize("sampler", ["random", "class-balanced", "token-budget"])
@pytest.mark.parametrize("stage", [1, 2])
def test_30_steps_have_the_plain_losses(
    tiny_checkpoint: Checkpoint, train: Any, stage: int, sampler: str
) -> None:
    plain, fast = (
        train(tiny_checkpoint, stage, make, sampler=sampler, epochs=5)
        for make in (make_plain_step, make_step)
    )
    assert len(plain.losses) == len(fast.losses) >= 30
    assert max(plain.losses) - min(plain.losses) > 0.1, "a rate at which the steps differ"
    assert fast.losses == pytest.approx(plain.losses, rel=1e-5, abs=1e-5)
    norms = [[r.grad_norm for r in trained.reports] for trained in (plain, fast)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_stage_2_draws_the_plain_masks(tiny_checkpoint: Checkpoint, train: Any) -> None:
    plain, fast = (
        train(tiny_checkpoint, 2, make, dropout=0.3).losses for make in (make_plain_step, make_step)
    )
    assert fast == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert plain != pytest.approx(train(tiny_checkpoint, 2, make_plain_step).losses, rel=1e-2)


def train_by_torch(
    start: Any, checkpoint: Checkpoint, stage: int, data: StageData, *, autocast: bool = False
) -> list[float]:
    """The loss of each of 14 steps."""
    model = start(checkpoint, stage).model
    loss_function = stage_1_signal(data, None, 2, Recipe())[1] if stage == 1 else cross_entropy
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=False, foreach=False)
    batches = [b for epoch in range(2) for b in random_batches(50, 8, (7, stage), epoch)]
    losses = []
    for step, rows_B in enumerate(batches):
        batch = pack(data.store, torch.from_numpy(rows_B), round_to=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            layout = packed_layout(batch.cu_seqlens)
            hidden_TD = model.bert(batch.input_ids_T, batch.position_ids_T, layout)
            first_BD = hidden_TD[layout.first_tokens_B]
            logits_BC = model.classifier(torch.tanh(model.bert.pooler(first_BD)))
        loss = loss_function(logits_BC.float(), torch.from_numpy(data.labels_N[rows_B]))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.param_groups[0]["lr"] = 1e-3 * linear_decay(step, len(batches))
        optimizer.step()
    return losses


@BOTH
@pytest.mark.parametrize("stage", [1, 2])
def test_in_fp32_each_step_has_torchs_loss(
    tiny_checkpoint: Checkpoint, data: StageData, train: Any, start: Any, stage: int, make: MakeStep
) -> None:
    ours = train(tiny_checkpoint, stage, make).losses
    expected = train_by_torch(start, tiny_checkpoint, stage, data)
    assert max(expected) - min(expected) > 0.1, "a rate at which the steps differ"
    assert ours == pytest.approx(expected, rel=1e-5, abs=1e-5)


@BOTH
@pytest.mark.parametrize("stage", [1, 2])
def test_in_bf16_each_step_is_as_near_fp32_as_autocast_is(
    tiny_checkpoint: Checkpoint, data: StageData, train: Any, start: Any, stage: int, make: MakeStep
) -> None:
    """The rule: over the steps, the losses' root mean square distance from torch's fp32 is at most
    twice that of torch's bf16 autocast, plus 1e-3."""
    exact = np.array(train_by_torch(start, tiny_checkpoint, stage, data))
    theirs = train_by_torch(start, tiny_checkpoint, stage, data, autocast=True)
    ours = train(tiny_checkpoint, stage, make, dtype=torch.bfloat16).losses
    error, allowed = (np.sqrt(np.mean((np.array(x) - exact) ** 2)) for x in (ours, theirs))
    assert 0 < error <= 2 * allowed + 1e-3


def test_our_losses_are_fused_and_others_left_alone() -> None:
    weights_C, margins_C = torch.tensor([0.5, 1.5]), torch.tensor([0.1, 0.5])
    logits_BC, labels_B = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 1, 0])
    for loss in (
        cross_entropy,
        partial(cross_entropy, class_weights_C=weights_C),
        partial(ldam, margins_C=margins_C, class_weights_C=weights_C, scale=2.0),
    ):
        fused: Any = fuse(loss, "torch")
        assert fused.func is fused_cross_entropy
        torch.testing.assert_close(fused(logits_BC, labels_B), loss(logits_BC, labels_B))
    assert fuse(torch.nn.functional.cross_entropy, "torch") is torch.nn.functional.cross_entropy


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_that_has_ended_holds_no_memory(
    tiny_checkpoint: Checkpoint, data: StageData, start: Any, stage: int
) -> None:
    """Not even until the garbage collector runs: the next stage needs as much."""
    gone: list[Any] = []

    @contextmanager
    def make(*arguments: Any) -> Iterator[Any]:
        with make_step(*arguments) as step:
            gone.extend(map(weakref.ref, (step, step.weights, step.model)))
            yield step

    gc.disable()
    try:
        state = start(tiny_checkpoint, stage)
        train_stage(state, data, cross_entropy, StageSettings(1, 1e-3, 8), make_step=make)
        assert [reference() for reference in gone] == [None] * 3
    finally:
        gc.enable()


# Without one of its files.

TRAINS = """
import torch
from twostage.data.token_store import StageData, TokenStore
from twostage.fast.step import make_step
from twostage.model.bert import BertClassifier
from twostage.model.config import BertConfig
from twostage.training import stage
from twostage.training.losses import cross_entropy
from twostage.training.state import TrainingState
from twostage.two_stage import freeze_below_top

stage.REPORT_EVERY = 1
import numpy as np
generator = torch.Generator().manual_seed(1)
ids = torch.randint(1, 50, (120,), generator=generator).int()
data = StageData(TokenStore(ids, torch.arange(0, 121, 10)), np.arange(12) % 2)
config = BertConfig(50, 16, 2, 2, 32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
for number in (1, 2):
    losses = []
    for make in (make_step, stage.make_plain_step):
        torch.manual_seed(0)
        model = BertClassifier(config, 2)
        if number == 1:
            freeze_below_top(model, 1)
        reports = []
        stage.train_stage(
            TrainingState(7, model, number), data, cross_entropy, stage.StageSettings(3, 1e-3, 4),
            make_step=make, on_report=reports.append,
        )
        losses.append([report.loss for report in reports])
    assert len(losses[0]) == 9
    np.testing.assert_allclose(*losses, rtol=1e-5)
print("trained")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp16", "graphs", "monitor", "randomness", "trunk"])
def test_training_goes_on_without_any_one_file(tmp_path: Path, name: str) -> None:
    """The file and its line in `make_step` are deleted in a copy."""
    package = tmp_path / "twostage"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(twostage.__file__).parent, package, ignore=ignored)
    shutil.copytree(Path(twostage.kernels.__file__).parent, package / "kernels", ignore=ignored)
    (package / "fast" / f"{name}.py").unlink()
    step = package / "fast" / "step.py"
    text = step.read_text(encoding="utf-8")
    removed = lines_of_saving(text, name)
    lines = text.splitlines()
    step.write_text("\n".join(s for i, s in enumerate(lines, 1) if i not in removed) + "\n")
    finished = subprocess.run(
        [sys.executable, "-c", TRAINS],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.stdout == "trained\n", finished.stderr


def lines_of_saving(text: str, module: str) -> set[int]:
    """Numbers of the two lines of `make_step` that import a saving and call it."""
    (function,) = (
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef) and node.name == "make_step"
    )
    (imported,) = (
        n for n in ast.walk(function) if isinstance(n, ast.ImportFrom) and n.module == module
    )
    names = {alias.name for alias in imported.names}
    (call,) = (
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Name)
        and node.value.func.id in names
    )
    assert imported.lineno == imported.end_lineno
    assert call.lineno == call.end_lineno
    return {imported.lineno, call.lineno}


def test_a_saving_imports_no_other_saving() -> None:
    """But for features that several seeds share, which are counted by what counts the others."""
    savings = {"fp16", "graphs", "monitor", "randomness", "trunk"}
    folder = Path(twostage.__file__).parent / "fast"
    assert {path.stem for path in folder.glob("*.py")} == savings | {"__init__", "step", "weights"}
    for name in savings:
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        imported = {n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.level == 1}
        assert not imported & savings, name
