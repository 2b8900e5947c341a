"""Compiles every launch of the Triton kernels for GPUs that are not here; test_compilation.py's.

The operations run on CPU tensors of the shapes in training, forward and backward, in every
precision; but a launch, instead of running, is compiled with just its arguments for sm_80 and
sm_90. A process of its own, because the tests around it have Triton's interpreter on.

Prints a JSON list: of each compiled kernel its name, target, bytes of shared memory, registers a
thread, bytes of spills, and how many reads and writes of memory are 16 bytes a thread.
"""

import json
import multiprocessing
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

import twostage.kernels
from twostage.kernels.adamw import adamw_
from twostage.kernels.attention import (
    first_token_attention,
    packed_attention,
    packed_layout,
)
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.kernels.dropout import DropoutCounters
from twostage.kernels.embedding import embed_tokens
from twostage.kernels.gelu import bias_gelu
from twostage.kernels.residual_norm import dropout_residual_norm

CAPABILITIES = (80, 90)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.float64: "*fp64",
}
NUM_TOKENS = 320
"""Of a batch of 16 short texts."""


def counters(num_rows: int) -> DropoutCounters:
    rows = torch.arange(num_rows, dtype=torch.int32)
    return DropoutCounters(torch.tensor([1]), rows // 20, rows % 20, torch.Generator())


def run_residual_norm(dtype: torch.dtype) -> None:
    # MiniLM, BERT-base, BERT-large, the widest; a tiny one.
    for num_features, p in (
        (384, 0.1),
        (768, 0.1),
        (768, 0.0),
        (1_024, 0.1),
        (4_096, 0.1),
        (24, 0.1),
    ):
        x_TD, residual_TD = (leaf(NUM_TOKENS, num_features, dtype=dtype) for _ in range(2))
        weight_D, bias_D = (leaf(num_features) for _ in range(2))
        normed_TD = dropout_residual_norm(
            x_TD, residual_TD, weight_D, bias_D, 1e-12, p, counters(NUM_TOKENS), 3, "triton"
        )
        normed_TD.backward(torch.empty_like(normed_TD))


def run_embedding(dtype: torch.dtype) -> None:
    where = counters(NUM_TOKENS)
    for num_features in (24, 384, 768):
        tables = (leaf(1_000, num_features), leaf(512, num_features))
        rows = (leaf(num_features), leaf(num_features), leaf(num_features))
        ids_T = torch.zeros(NUM_TOKENS, dtype=torch.int32)
        out_TD = embed_tokens(
            ids_T, where.positions_T, *tables, *rows, 1e-12, dtype, 0.1, where, 0, "triton"
        )
        out_TD.backward(torch.empty_like(out_TD))


def run_attention(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        return  # for the interpreter alone
    # MiniLM's shape and BERT-base's; all blocks of keys.
    for width, p, longest in (
        *((384, 0.1, longest) for longest in (32, 128)),
        *((768, 0.1, longest) for longest in (16, 32, 64, 128)),
        (768, 0.0, 64),
    ):
        layout = packed_layout(torch.tensor([0, longest, longest + 5]))
        num_tokens = int(layout.cu_seqlens[-1])
        rest = (layout, 12, p, counters(num_tokens), 1, "triton")
        context_TD = packed_attention(leaf(num_tokens, 3 * width, dtype=dtype), *rest)
        context_TD.backward(torch.empty_like(context_TD))
        key_value_T2D = leaf(num_tokens, 2 * width, dtype=dtype)
        context_BD = first_token_attention(leaf(2, width, dtype=dtype), key_value_T2D, *rest)
        context_BD.backward(torch.empty_like(context_BD))


def run_gelu(dtype: torch.dtype) -> None:
    for num_features in (40, 3_072):
        bias_I = leaf(num_features, dtype=dtype)
        y_TI = bias_gelu(leaf(NUM_TOKENS, num_features, dtype=dtype), bias_I, "triton")
        y_TI.backward(torch.empty_like(y_TI))


def run_cross_entropy(dtype: torch.dtype) -> None:
    for num_classes in (2, 52, 1_000, 5_000):
        weights_C, margins_C = (torch.empty(num_classes) for _ in range(2))
        for ldam in (False, True):
            extra = (weights_C, margins_C) if ldam else (None, None)
            labels_B = torch.zeros(16, dtype=torch.int64)
            logits_BC = leaf(16, num_classes, dtype=dtype)
            fused_cross_entropy(logits_BC, labels_B, *extra, 1.0, "triton").backward()


def run_adamw(dtype: torch.dtype) -> None:
    buffers = [torch.empty(5_000, dtype=d) for d in (torch.float32, dtype, *[torch.float32] * 2)]
    scalars = [
        torch.ones((), dtype=d) for d in (torch.float32, torch.float64, *[torch.float32] * 2)
    ]
    copies = [None, torch.empty(5_000, dtype=torch.bfloat16 if dtype == torch.float32 else dtype)]
    for rounded_P in copies:
        adamw_(*buffers, *scalars, rounded_P=rounded_P, impl="triton")


RUNS: tuple[Callable[[torch.dtype], None], ...] = (
    run_residual_norm,
    run_embedding,
    run_attention,
    run_gelu,
    run_cross_entropy,
    run_adamw,
)


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype).requires_grad_()


def main() -> None:
    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> None:
        options = {name: more.pop(name) for name in ("num_warps", "enable_fp_fusion")}
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | more
        described = {
            name: TYPES[value.dtype] if isinstance(value, Tensor) else value
            for name, value in named.items()
        }
        launches[f"{kernel.fn.__module__} {kernel.__name__} {described}"] = (
            kernel,
            described,
            options,
        )

    triton.knobs.nvidia.dump_ptxas_log = True  # one call of the assembler tells all
    triton.knobs.compilation.always_compile = True  # the cache keeps no log
    JITFunction.run = record
    twostage.kernels.triton_problem = lambda device: None
    for run in RUNS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run(dtype)
    # Kernels cannot be pickled; forked processes have them already.
    with multiprocessing.get_context("fork").Pool() as pool:
        rows = pool.map(compile_launch, launches, chunksize=1)
    print(json.dumps([row for some in rows for row in some]))


launches: dict[str, tuple["JITFunction[Any]", dict[str, Any], dict[str, Any]]] = {}
"""Kernel, arguments (a type, "*fp32", for a tensor, else the value) and options of each launch."""


def compile_launch(name: str) -> list[dict[str, Any]]:
    """What comes out for each target."""
    return list(compile_for_targets(*launches[name]))


def compile_for_targets(
    kernel: "JITFunction[Any]", arguments: dict[str, Any], options: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    constants = {p.name for p in kernel.params if p.is_constexpr}
    constants |= {name for name, value in arguments.items() if value is None}
    signature, fixed, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.name in constants:
            signature[parameter.name], fixed[(i,)] = "constexpr", value
        elif isinstance(value, str):
            signature[parameter.name] = value
            attributes[(i,)] = [["tt.divisibility", 16]]  # torch aligns its memory
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    for capability in CAPABILITIES:
        with redirect_stdout(StringIO()) as log:
            compiled = triton.compile(
                ASTSource(kernel, signature, fixed, attributes),
                target=GPUTarget("cuda", capability, 32),
                options=options,
            )
        yield {
            "kernel": kernel.__name__,
            "capability": capability,
            "arguments": str(arguments),
            "warps": options["num_warps"],
            "shared": compiled.metadata.shared,
            "wide": len(re.findall(r"(?:ld|st)\.global[\w.:]*\.v4\.b32", compiled.asm["ptx"])),
            **resources(log.getvalue()),
        }


def resources(log: str) -> dict[str, int]:
    """Registers a thread and bytes of spills, as the assembler that Triton calls reports them."""
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return {"registers": int(registers), "spills": spills}


if __name__ == "__main__":
    main()
