"""Each Triton kernel beside torch's own operation: how exact, how fast, how near to the limit.

    python benchmarks/kernel_throughput.py                  on a CUDA GPU
    python benchmarks/kernel_throughput.py --rehearse       on a CPU, interpreted, with tiny shapes

For every operation, precision and shape:

- the error against fp64, ours and torch's at the same precision, the larger of output and gradients
  (the same masks of dropout in all three);
- the time of forward alone, and of forward and backward, of ours, of torch's operations one by one
  (with torch's own dropout), and of the same under torch.compile (in bf16 only, since each shape
  compiles for seconds);
- the bytes that must be moved, each input read once and each output written once, over that time,
  as a share of the copy rate that was measured in the same run.

A call takes microseconds, less than it takes to launch it from Python: on a GPU ten calls, each on
inputs of its own, are captured in a CUDA graph, and its replays are timed. What backward starts
from, a gradient of the output, is made before. The shapes are those of BERT-base at batch 16 and at
batch 512.

An operation is run in a process of its own, which prints a row as soon as it has it: the operation
that takes most of a step first, and in each the precision that training uses. A rival that fails
loses its own figures, a shape on which ours fails that shape's, and a time-out what was to follow.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from harness import (
    RESULTS,
    describe_environment,
    describe_place,
    markdown_table,
    measure_limits,
    run_child_rows,
    save,
    synchronize,
)
from torch import Tensor
from torch.nn import functional as F

from twostage.kernels.adamw import adamw_
from twostage.kernels.attention import packed_attention, packed_layout
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.kernels.dropout import DropoutCounters
from twostage.kernels.embedding import embed_tokens, reference_embed_tokens
from twostage.kernels.flash_attention import can_flash, flash_attention
from twostage.kernels.gelu import bias_gelu, reference_bias_gelu
from twostage.kernels.residual_norm import (
    dropout_residual_norm,
    reference_dropout_residual_norm,
)
from twostage.training import optim
from twostage.training.losses import ldam

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
P, EPS = 0.1, 1e-12
CALLS = 10
"""In a graph, each on inputs of its own: together more than a cache holds, at the larger shapes."""


@dataclass(frozen=True)
class Case:
    """One operation at one shape. Functions take the leaves and return the output."""

    shape: str
    leaves: list[Tensor]
    """What gets a gradient; in the case's precision."""
    ours: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    """torch's own operations, as one would write them."""
    reference: Callable[..., Tensor]
    """As `plain`, with the masks of `ours`; also for leaves in fp64."""
    forward_bytes: float
    backward_bytes: float
    to_compile: Callable[..., Tensor] | None = None
    """Instead of `plain`."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true", help="interpreted, with tiny shapes")
    parser.add_argument("--operations", help=f"some of: {'; '.join(OPERATIONS)} (default: all)")
    parser.add_argument("--output", type=Path, help="folder for the results (default: results/)")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        for row in run_job(json.loads(options.job)):
            print(json.dumps(row), flush=True)
        return 0
    if not options.rehearse and not torch.cuda.is_available():
        print("kernel_throughput: torch sees no CUDA GPU; --rehearse runs here", file=sys.stderr)
        return 2
    device = "cpu" if options.rehearse else "cuda"
    chosen = options.operations.split("; ") if options.operations else list(OPERATIONS)
    if unknown := set(chosen) - set(OPERATIONS):
        parser.error(f"there is no operation called {'; '.join(sorted(unknown))}")
    jobs = [job for job in make_kernel_jobs(device) if job["operation"] in chosen]
    record = describe_environment(device) | {
        "limits": measure_limits(torch.device(device), quick=options.rehearse),
        "kernels": [],
    }
    output = options.output
    if output is None:
        output = Path(tempfile.mkdtemp(prefix="kernels-")) if options.rehearse else RESULTS
    place = "rehearsal" if options.rehearse else describe_place(record)
    for job in jobs:
        for row in run_kernel_job(job):
            print(json.dumps(row), flush=True)
            record["kernels"].append(row)
            save(output, f"kernel_throughput-{place}", describe_kernels(record), record)
    print(f"{describe_kernels(record)}\n\n{json.dumps(record)}\n\nwritten to {output}")
    return int(any(not row.get("close") for row in record["kernels"]))


def make_kernel_jobs(device: str) -> list[dict[str, Any]]:
    """An operation each."""
    return [{"operation": name, "device": device} for name in OPERATIONS]


def run_kernel_job(job: dict[str, Any], timeout: float = 240.0) -> Iterator[dict[str, Any]]:
    """Rows of one operation, each as soon as a process of its own has measured it.

    A row that could not be measured has the reason as "failure" in place of figures; what ends the
    process, the time-out included, is such a row, the last.
    """
    if job["device"] == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    for row in run_child_rows(Path(__file__), job, timeout):
        yield (
            row
            if "operation" in row
            else {
                "operation": job["operation"],
                "failure": row["error"],
            }
        )


def run_job(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each precision and shape of one operation, in this process."""
    device = torch.device(job["device"])
    torch.set_float32_matmul_precision("highest")
    for name, dtype in DTYPES.items():
        if job["operation"] == "attention" and name == "fp32" and device.type == "cuda":
            continue  # its kernels take 16 bits
        for case_of in OPERATIONS[job["operation"]](device):
            row = {"operation": job["operation"], "precision": name}
            try:
                yield row | measure(partial(case_of, dtype), dtype, device)
            except Exception as error:  # whatever it is, the other shapes are worth their figures
                shape = "×".join(map(str, case_of.args))
                yield row | {"shape": shape, "failure": describe_error(error)}


def measure(
    make_case: Callable[[int], Case], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """Errors and times of one case. make_case: takes a seed, as calls differ in their inputs.

    A rival that fails has the reason among "failures". Where ours fails, so does the case.
    """
    case = make_case(0)
    has_backward = case.backward_bytes > 0
    out = run_forward(case.reference, case.leaves)
    upstream = make_upstream(out) if has_backward else None
    in_double = [leaf.double() for leaf in case.leaves]
    exact = run_through(case.reference, in_double, None if upstream is None else upstream.double())
    # Ours last: AdamW changes what it is given.
    torchs, ours = (run_through(f, case.leaves, upstream) for f in (case.reference, case.ours))
    spacings = [torch.finfo(result.dtype).eps for result in ours]
    if not has_backward:  # how far the weights have moved, which is little beside them
        exact, torchs, ours = ([r[0].double() - in_double[0]] for r in (exact, torchs, ours))
    our_errors, torch_errors = ([*map(relative_error, r, exact)] for r in (ours, torchs))
    # torch's error of a single number, such as a loss, may be 0 by luck.
    allowed = [
        max(torch_errors) if truth.numel() == 1 else error
        for truth, error in zip(exact, torch_errors, strict=True)
    ]
    close = all(
        error <= 2 * most + spacing
        for error, most, spacing in zip(our_errors, allowed, spacings, strict=True)
    )
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    cases = [make_case(seed) for seed in range(CALLS if device.type == "cuda" else 2)]
    upstreams = [make_upstream(out) if has_backward else None for _ in cases]
    for name, function in rivals_of(case, dtype, device).items():
        try:
            seconds[f"{name}_forward"] = seconds_of(
                [partial(run_forward, function, each.leaves) for each in cases], device
            )
            if has_backward:
                calls = [
                    partial(run_through, function, each.leaves, upstream)
                    for each, upstream in zip(cases, upstreams, strict=True)
                ]
                seconds[f"{name}_both"] = seconds_of(calls, device)
        except Exception as error:
            if name == "ours":
                raise
            failures[name] = describe_error(error)
    return {
        "shape": case.shape,
        "error": max(our_errors),
        "torch_error": max(torch_errors),
        "close": close,
        "bytes": {"forward": case.forward_bytes, "both": case.forward_bytes + case.backward_bytes},
        "seconds": seconds,
        "failures": failures,
    }


def rivals_of(
    case: Case, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[..., Tensor]]:
    """What is timed, ours first; none is compiled yet."""
    rivals = {"ours": case.ours, "torch": case.plain}
    if device.type == "cuda" and dtype == torch.bfloat16:
        # All cases of an operation share their code, of which torch.compile keeps eight versions:
        # without this, the ninth would run eagerly, without a word.
        torch.compiler.reset()
        rivals["compiled"] = torch.compile(case.to_compile or case.plain, dynamic=False)
    return rivals


def describe_error(error: Exception) -> str:
    """In a line, short enough for a table."""
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"[:300]


def run_forward(function: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*leaves)


def make_upstream(out: Tensor) -> Tensor:
    """A gradient of `out` that is not of ones, of its shape and precision."""
    angles = torch.arange(out.numel(), device=out.device)
    return torch.cos(angles).view(out.shape).to(out.dtype)


def run_through(
    function: Callable[..., Tensor], leaves: Sequence[Tensor], upstream: Tensor | None
) -> list[Tensor]:
    """Output and gradients, from `upstream`, the output's. None: no backward, as AdamW has none."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    if upstream is None:
        return [out.detach()]
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def relative_error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-6))


def seconds_of(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Of one call: the median over replays of a graph of all of them; on a CPU, over rounds."""

    def round_of_calls() -> None:
        for call in calls:
            call()

    if device.type == "cpu":
        round_of_calls()
        times = []
        for _ in range(3):
            began = perf_counter()
            round_of_calls()
            times.append(perf_counter() - began)
        return float(np.median(times)) / len(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, and allocates what the graph must not
        for _ in range(3):
            round_of_calls()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        round_of_calls()
    times = []
    for _ in range(33):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        synchronize(device)
        times.append(start.elapsed_time(end) / 1e3)
    return float(np.median(times[3:])) / len(calls)


def describe_kernels(record: dict[str, Any]) -> str:
    """The table, in Markdown, and below it what failed."""
    rows, failed = [], []
    for row in record["kernels"]:
        name = ", ".join(row[key] for key in ("operation", "precision", "shape") if key in row)
        if "failure" in row:
            failed.append(f"- {name}: {row['failure']}")
            cells = [row["operation"], row.get("precision", ""), row.get("shape", "")]
            rows.append([*cells, "failed", *[""] * 4])
            continue
        failed += [f"- {name}, {rival}: {reason}" for rival, reason in row["failures"].items()]
        for part in ("forward", "both"):
            if f"ours_{part}" not in row["seconds"]:
                continue
            ours = row["seconds"][f"ours_{part}"]
            share = row["bytes"][part] / ours / record["limits"]["copy_bytes"]
            rows.append(
                [
                    row["operation"],
                    row["precision"],
                    f"{row['shape']}, {'forward' if part == 'forward' else 'with backward'}",
                    f"{row['error']:.1e} / {row['torch_error']:.1e}"
                    + ("" if row["close"] else " **too large**"),
                    *(microseconds(row, rival, part) for rival in ("ours", "torch", "compiled")),
                    f"{share:.0%}",
                ]
            )
    header = ["operation", "precision", "case", "error, ours / torch's", "ours, µs", "torch, µs"]
    table = markdown_table([*header, "compiled, µs", "copy rate"], rows)
    parts = [f"The kernels (compiled in bf16 only):\n\n{table}"]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    if "--rehearse" in record["command"]:
        parts.append("Times of ours are those of Triton's interpreter, and mean nothing.")
    return "\n\n".join(parts)


def microseconds(row: dict[str, Any], rival: str, part: str) -> str:
    if f"{rival}_{part}" in row["seconds"]:
        return f"{row['seconds'][f'{rival}_{part}'] * 1e6:.1f}"
    return "failed" if rival in row["failures"] else ""


# The operations: each a function of the device, which gives functions of (dtype, seed) → Case.

CaseOf = partial[Case]
"""Lacks dtype and seed; its arguments so far are the shape."""


def shapes_on(device: torch.device, full: Sequence[Any], tiny: Any) -> Sequence[Any]:
    return full if device.type == "cuda" else [tiny]


def draw(device: torch.device, seed: int, *shape: int) -> Tensor:
    """N(0, 1), fp32."""
    generator = torch.Generator(device).manual_seed(hash((seed, shape)) % 2**31)
    return torch.randn(shape, generator=generator, device=device)


def make_counters(device: torch.device, num_rows: int, seed: int) -> DropoutCounters:
    rows = torch.arange(num_rows, dtype=torch.int32, device=device)
    key = torch.tensor([seed + 1], device=device)
    return DropoutCounters(key, rows // 20, rows % 20, torch.Generator(device))


def residual_norm_cases(device: torch.device) -> list[CaseOf]:
    def case_of(tokens: int, width: int, dtype: torch.dtype, seed: int) -> Case:
        where = make_counters(device, tokens, seed)
        x_TD, residual_TD = (draw(device, seed + i, tokens, width).to(dtype) for i in (0, 100))
        weight_D, bias_D = (draw(device, seed + i, width).to(dtype) for i in (200, 300))

        def ours(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor) -> Tensor:
            return dropout_residual_norm(
                x_TD, residual_TD, weight_D, bias_D, EPS, P, where, 1, "triton"
            )

        def plain(x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor) -> Tensor:
            return F.layer_norm(residual_TD + F.dropout(x_TD, P), (width,), weight_D, bias_D, EPS)

        def reference(
            x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, bias_D: Tensor
        ) -> Tensor:
            return reference_dropout_residual_norm(
                x_TD, residual_TD, weight_D, bias_D, EPS, P, where, 1
            )

        size = x_TD.element_size() * tokens * width
        return Case(
            f"{tokens}×{width}",
            [x_TD, residual_TD, weight_D, bias_D],
            ours,
            plain,
            reference,
            forward_bytes=3 * size,
            backward_bytes=5 * size,
        )

    shapes = shapes_on(device, [(320, 768), (13_000, 768)], (20, 40))
    return [partial(case_of, *shape) for shape in shapes]


def attention_cases(device: torch.device) -> list[CaseOf]:
    """Torch's way is flash attention, here without dropout, whose seeding no graph can hold; for
    torch.compile, padded SDPA with dropout."""

    def case_of(
        texts: int, longest: int, heads: int, width: int, dtype: torch.dtype, seed: int
    ) -> Case:
        # The same for every seed: calls differ in their inputs alone.
        lengths_B = torch.from_numpy(np.random.default_rng(0).integers(3, longest + 1, texts))
        lengths_B[0] = longest
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths_B.cumsum(0)])
        layout = packed_layout(cu_seqlens.to(device))
        tokens = int(cu_seqlens[-1])
        positions_T = torch.cat([torch.arange(n) for n in lengths_B.tolist()]).int().to(device)
        draws_T = torch.arange(texts).repeat_interleave(lengths_B).int().to(device)
        key = torch.tensor([seed + 1], device=device)
        where = DropoutCounters(key, draws_T, positions_T, torch.Generator(device))
        is_token_BL = (torch.arange(longest) < lengths_B[:, None]).to(device)
        rows_T = is_token_BL.flatten().nonzero()[:, 0]

        def ours(qkv_T3D: Tensor, impl: str = "triton") -> Tensor:
            return packed_attention(qkv_T3D, layout, heads, P, where, 1, impl)

        def padded(qkv_T3D: Tensor) -> Tensor:
            block = qkv_T3D.new_zeros(texts * longest, 3 * width).index_copy(0, rows_T, qkv_T3D)
            query, key, value = block.view(texts, longest, 3, heads, -1).permute(2, 0, 3, 1, 4)
            mask = is_token_BL[:, None, None, :]
            context = F.scaled_dot_product_attention(query, key, value, mask, P)
            return context.transpose(1, 2).reshape(texts * longest, width)[rows_T]

        def flash(qkv_T3D: Tensor) -> Tensor:
            query_TD, key_TD, value_TD = qkv_T3D.chunk(3, dim=1)
            ends, lengths = (layout.cu_seqlens, layout.cu_seqlens), (longest, longest)
            return flash_attention(query_TD, key_TD, value_TD, ends, lengths, heads, 0.0, None)

        qkv_T3D = draw(device, seed, tokens, 3 * width).to(dtype)
        size = qkv_T3D.element_size() * tokens * width
        return Case(
            f"{texts} texts up to {longest}, {tokens}×{width}",
            [qkv_T3D],
            ours,
            flash if can_flash(qkv_T3D, width // heads) else padded,
            partial(ours, impl="torch"),
            forward_bytes=4 * size,
            backward_bytes=7 * size,
            to_compile=padded,
        )

    full = [(16, 32, 12, 768), (16, 64, 12, 768), (512, 50, 12, 768), (256, 128, 12, 768)]
    return [partial(case_of, *shape) for shape in shapes_on(device, full, (3, 9, 2, 64))]


def gelu_cases(device: torch.device) -> list[CaseOf]:
    def case_of(tokens: int, width: int, dtype: torch.dtype, seed: int) -> Case:
        x_TI = draw(device, seed, tokens, width).to(dtype)
        bias_I = draw(device, seed + 100, width).to(dtype)
        size = x_TI.element_size() * tokens * width
        return Case(
            f"{tokens}×{width}",
            [x_TI, bias_I],
            lambda x_TI, bias_I: bias_gelu(x_TI, bias_I, "triton"),
            lambda x_TI, bias_I: F.gelu(x_TI + bias_I),
            reference_bias_gelu,
            forward_bytes=2 * size,
            backward_bytes=3 * size,
        )

    shapes = shapes_on(device, [(320, 3_072), (13_000, 3_072)], (20, 40))
    return [partial(case_of, *shape) for shape in shapes]


def embedding_cases(device: torch.device) -> list[CaseOf]:
    def case_of(tokens: int, words: int, width: int, dtype: torch.dtype, seed: int) -> Case:
        where = make_counters(device, tokens, seed)
        generator = torch.Generator(device).manual_seed(seed)
        ids_T = torch.randint(words, (tokens,), generator=generator, device=device)
        positions_T = where.positions_T.long()
        # Tables and norm are fp32, whatever the precision of the output.
        word_VD, position_LD = (draw(device, seed + n, n, width) for n in (words, 512))
        token_type_D, weight_D, bias_D = (draw(device, seed + i, width) for i in range(3))

        def ours(
            word_VD: Tensor,
            position_LD: Tensor,
            token_type_D: Tensor,
            weight_D: Tensor,
            bias_D: Tensor,
        ) -> Tensor:
            tables = (word_VD, position_LD, token_type_D)
            return embed_tokens(
                ids_T, positions_T, *tables, weight_D, bias_D, EPS, dtype, P, where, 0, "triton"
            )

        def plain(
            word_VD: Tensor,
            position_LD: Tensor,
            token_type_D: Tensor,
            weight_D: Tensor,
            bias_D: Tensor,
        ) -> Tensor:
            embedded_TD = F.embedding(ids_T, word_VD) + F.embedding(positions_T, position_LD)
            normed_TD = F.layer_norm(embedded_TD + token_type_D, (width,), weight_D, bias_D, EPS)
            return F.dropout(normed_TD.to(dtype), P)

        def reference(
            word_VD: Tensor,
            position_LD: Tensor,
            token_type_D: Tensor,
            weight_D: Tensor,
            bias_D: Tensor,
        ) -> Tensor:
            tables = (word_VD, position_LD, token_type_D)
            out_dtype = word_VD.dtype if word_VD.dtype == torch.float64 else dtype
            return reference_embed_tokens(
                ids_T, positions_T, *tables, weight_D, bias_D, EPS, out_dtype, P, where, 0
            )

        row = tokens * width
        size = torch.finfo(dtype).bits // 8
        return Case(
            f"{tokens}×{width} of {words}",
            [word_VD, position_LD, token_type_D, weight_D, bias_D],
            ours,
            plain,
            reference,
            forward_bytes=row * (4 + size),
            # The dense gradient of the words is written whole.
            backward_bytes=row * (4 + size) + 4 * width * words,
        )

    shapes = shapes_on(device, [(320, 10_000, 768), (13_000, 10_000, 768)], (20, 30, 40))
    return [partial(case_of, *shape) for shape in shapes]


def cross_entropy_cases(device: torch.device) -> list[CaseOf]:
    def case_of(batch: int, classes: int, dtype: torch.dtype, seed: int) -> Case:
        generator = torch.Generator(device).manual_seed(seed)
        labels_B = torch.randint(classes, (batch,), generator=generator, device=device)
        logits_BC = draw(device, seed, batch, classes).to(dtype)
        classes_C = torch.arange(classes, device=device)
        weights_C, margins_C = (draw(device, seed + i, classes).abs() / 2 + 0.1 for i in (100, 200))

        def plain(logits_BC: Tensor) -> Tensor:
            margin_BC = (labels_B[:, None] == classes_C) * margins_C
            return F.cross_entropy(logits_BC.float() - margin_BC, labels_B, weights_C)

        size = logits_BC.element_size() * batch * classes
        return Case(
            f"{batch}×{classes}",
            [logits_BC],
            lambda logits_BC: fused_cross_entropy(
                logits_BC, labels_B, weights_C, margins_C, 1.0, "triton"
            ),
            plain,
            lambda logits_BC: ldam(logits_BC, labels_B, margins_C, weights_C),
            forward_bytes=size,
            backward_bytes=size,
        )

    shapes = shapes_on(device, [(16, 2), (512, 2), (512, 1_000)], (16, 3))
    return [partial(case_of, *shape) for shape in shapes]


def update_by_formula(
    weights_P: Tensor,
    gradients_P: Tensor,
    exp_avg_P: Tensor,
    exp_avg_sq_P: Tensor,
    update: Tensor,
    learning_rate: Tensor,
    divisor: Tensor,
    rounded_P: Tensor | None,
) -> None:
    """AdamW as one would write it for torch.compile: no skipping, which would be a wait."""
    g_P = gradients_P.float() / divisor
    exp_avg_P.lerp_(g_P, 0.1)
    exp_avg_sq_P.mul_(0.999).addcmul_(g_P, g_P, value=0.001)
    denominator_P = exp_avg_sq_P.sqrt() / (1 - 0.999**update).sqrt() + 1e-8
    weights_P.sub_(learning_rate.float() / (1 - 0.9**update) * exp_avg_P / denominator_P)
    if rounded_P is not None:
        rounded_P.copy_(weights_P)


def adamw_cases(device: torch.device) -> list[CaseOf]:
    def case_of(count: int, dtype: torch.dtype, seed: int) -> Case:
        weights_P = draw(device, seed, count)
        gradients_P = draw(device, seed + 100, count).to(dtype)
        exp_avg_P = draw(device, seed + 200, count)
        exp_avg_sq_P = draw(device, seed + 300, count).abs()
        one = torch.ones((), device=device)
        update, rate, divisor, skip = 5 * one, 1e-3 * one.double(), 2 * one, 0 * one
        rounded_P = None if dtype == torch.float32 else torch.empty_like(gradients_P)

        def step(*leaves: Tensor, impl: str) -> Tensor:
            weights_P, g_P, m_P, v_P = (leaf.detach() for leaf in leaves)
            scalars = (update, rate, divisor, skip)
            adamw_(weights_P, g_P, m_P, v_P, *scalars, rounded_P=rounded_P, impl=impl)
            return weights_P

        def formula(*leaves: Tensor) -> Tensor:
            weights_P, g_P, m_P, v_P = (leaf.detach() for leaf in leaves)
            update_by_formula(weights_P, g_P, m_P, v_P, update, rate, divisor, rounded_P)
            return weights_P

        def reference(*leaves: Tensor) -> Tensor:
            dtype = leaves[0].dtype
            weights_P, g_P, m_P, v_P = (leaf.detach().to(dtype, copy=True) for leaf in leaves)
            optim.adamw_(weights_P, g_P / divisor, m_P, v_P, int(update), float(rate))
            return weights_P

        return Case(
            f"{count:,} weights",
            [weights_P, gradients_P, exp_avg_P, exp_avg_sq_P],
            partial(step, impl="triton"),
            partial(step, impl="torch"),
            reference,
            # Of the gradient and the rounded copy together, 4 bytes in every precision.
            forward_bytes=count * (24 + 4),
            backward_bytes=0,
            to_compile=formula,
        )

    shapes = shapes_on(device, [(7_100_000,), (86_000_000,)], (3_000,))
    return [partial(case_of, *shape) for shape in shapes]


OPERATIONS: dict[str, Callable[[torch.device], list[CaseOf]]] = {
    "AdamW": adamw_cases,
    "attention": attention_cases,
    "residual norm": residual_norm_cases,
    "bias + GELU": gelu_cases,
    "embedding": embedding_cases,
    "cross-entropy": cross_entropy_cases,
}
"""What takes most of a step first."""


if __name__ == "__main__":
    sys.exit(main())
