"""The kernels as part of torch: without Triton, and in CUDA graphs."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from twostage.kernels.adamw import adamw_
from twostage.kernels.cross_entropy import fused_cross_entropy
from twostage.kernels.dropout import DropoutCounters
from twostage.kernels.embedding import embed_tokens
from twostage.kernels.gelu import bias_gelu
from twostage.kernels.residual_norm import dropout_residual_norm


@pytest.mark.slow
def test_without_triton_the_torch_path_works_and_asking_for_the_other_says_why() -> None:
    code = """
import sys
sys.modules["triton"] = None  # as if it were not installed
import torch
from twostage.kernels import triton_problem
from twostage.kernels import adamw, embedding, gelu, residual_norm
from twostage.kernels.cross_entropy import fused_cross_entropy
logits, labels = torch.zeros(2, 2), torch.tensor([0, 1])
print(round(fused_cross_entropy(logits, labels).item(), 4))
print(triton_problem(torch.device("cuda")))
try:
    fused_cross_entropy(logits, labels, impl="triton")
except RuntimeError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    sentence = "Triton is not installed here (pip install triton)"
    assert out.stdout.splitlines() == ["0.6931", sentence, sentence]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU in this machine")
def test_a_cuda_graph_of_all_of_them_replays_with_new_numbers(
    device: torch.device, counters: Callable[[int], DropoutCounters]
) -> None:
    """New inputs, another epoch's masks, another learning rate: all are read when it runs."""
    tokens, width, words = 40, 64, 30
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    where = counters(tokens)
    ids_T = torch.randint(words, (tokens,), generator=generator, device=device)
    labels_B = torch.arange(tokens, device=device) % 3
    rate = torch.full((), 1e-2, dtype=torch.float64, device=device)
    one, zero = torch.ones((), device=device), torch.zeros((), device=device)
    start_P = torch.cat([draw(n).flatten() for n in (words * width, tokens * width)])
    start_P = torch.cat([start_P, draw(6 * width), draw(3 * width)])

    def step(weights_P: Tensor, exp_avg_P: Tensor, exp_avg_sq_P: Tensor) -> Tensor:
        leaf_P = weights_P.detach().requires_grad_()
        sizes = [words * width, tokens * width, *[width] * 6, 3 * width]
        word, position, token_type, weight, bias, gelu_bias, weight2, bias2, head = leaf_P.split(
            sizes
        )
        hidden_TD = embed_tokens(
            ids_T,
            where.positions_T,
            word.view(words, width),
            position.view(tokens, width),
            token_type,
            weight,
            bias,
            1e-12,
            torch.float32,
            0.1,
            where,
            0,
            "triton",
        )
        middle_TD = bias_gelu(hidden_TD, gelu_bias, "triton")
        out_TD = dropout_residual_norm(
            middle_TD, hidden_TD, weight2, bias2, 1e-12, 0.1, where, 1, "triton"
        )
        logits_BC = out_TD @ head.view(width, 3)
        loss = fused_cross_entropy(logits_BC, labels_B, impl="triton")
        (gradient_P,) = torch.autograd.grad(loss, leaf_P)
        adamw_(weights_P, gradient_P, exp_avg_P, exp_avg_sq_P, one, rate, one, zero, impl="triton")
        return loss.detach()

    def fresh() -> list[Tensor]:
        return [start_P.clone(), torch.zeros_like(start_P), torch.zeros_like(start_P)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(*fresh())  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    buffers = fresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*buffers)

    seen: list[Any] = []
    for key, new_rate in ((1, 1e-2), (2, 1e-2), (2, 1e-3)):
        where.key.fill_(key)
        rate.fill_(new_rate)
        for buffer, value in zip(buffers, fresh(), strict=True):
            buffer.copy_(value)
        graph.replay()
        eager = fresh()
        torch.testing.assert_close(loss, step(*eager))
        torch.testing.assert_close(buffers, eager)
        seen.append((float(loss), buffers[0].clone()))
    assert seen[0][0] != seen[1][0] == seen[2][0]
    assert not torch.equal(seen[1][1], seen[2][1])
