"""Torch's flash attention over packed sequences: the one private operation that we call.

Flash attention (Dao et al. 2022, arXiv 2205.14135; Dao 2023, arXiv 2307.08691) walks over the keys
in pieces and never writes the scores to memory. Torch's public ways to it have no dropout for
packed sequences (`torch.nn.attention.varlen.varlen_attn`, FlexAttention), or no packed sequences
(`scaled_dot_product_attention`). The operation beneath them has both, and torch differentiates it.
Being private, it may change: a test holds the signature that is called here against the torch that
is installed.

It draws its masks by itself, from the GPU's process-wide generator. For the call that one takes the
state of the generator it is given here, and is put back after it: so a training step still depends
on its own seed alone. But which element gets which random number is the operation's own affair,
unlike everywhere else.

Shapes: Q query tokens, T key tokens, D hidden, H heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

MAX_FLASH_LENGTH = 512
"""Tokens of a text: BERT's positions."""

FLASH_DTYPES = (torch.bfloat16, torch.float16)
MAX_HEAD_SIZE = 128
"""Larger ones it takes on some GPUs only."""


def can_flash(x: Tensor, head_size: int) -> bool:
    """Whether torch has it here, for inputs like `x`."""
    return (
        x.is_cuda
        and x.dtype in FLASH_DTYPES
        and head_size % 8 == 0
        and head_size <= MAX_HEAD_SIZE
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def flash_attention(
    query_QD: Tensor,
    key_TD: Tensor,
    value_TD: Tensor,
    cu_seqlens: tuple[Tensor, Tensor],
    max_lengths: tuple[int, int],
    num_heads: int,
    dropout_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Context, [Q, D]. Rows of the inputs may lie apart.

    cu_seqlens: [B+1] int32 of the queries and of the keys; together their sequences cover all rows.
    max_lengths: their longest. generator: where the masks are drawn from; None: no dropout.
    """
    shape = (-1, num_heads, query_QD.shape[1] // num_heads)
    dropout_p = 0.0 if generator is None else dropout_p
    process_wide = torch.cuda.default_generators[query_QD.device.index]
    with drawing_from(generator, process_wide):
        context_QHK: Tensor = torch.ops.aten._flash_attention_forward(
            query_QD.unflatten(1, shape[1:]),
            key_TD.unflatten(1, shape[1:]),
            value_TD.unflatten(1, shape[1:]),
            *cu_seqlens,
            *max_lengths,
            dropout_p,
            False,  # causal
            False,  # return the mask
        )[0]
    return context_QHK.flatten(1)


@contextmanager
def drawing_from(
    generator: torch.Generator | None, process_wide: torch.Generator
) -> Iterator[None]:
    """What draws from the process-wide generator in here draws from `generator`; nobody waits."""
    if generator is None:
        yield
        return
    before = process_wide.get_state()
    process_wide.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(process_wide.get_state())
        process_wide.set_state(before)
