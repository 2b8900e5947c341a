"""Mixed precision with fp32 master weights.

The model that a stage trains is fp32: the masters. Forward and backward run on a working copy of it
in bf16 or fp16, made once a stage. In backward, gradients go from the copy to the masters in fp32,
the optimizer steps there, and the new weights go back to the copy in one rounding. So no weight is
cast per use, and an update smaller than bf16's spacing (1/256 to 1/128 of the weight) is not
lost. The loss, softmax and the statistics of layer norm are computed in fp32; embeddings are fp32
in the copy too (`model/bert.py`), and so are norms wherever `kernels/residual_norm.py` can take
them so. fp16 needs its loss scaled besides (`loss_scale.py`).

Masters, gradients and the copy's rounded weights each lie end to end in one buffer, of which the
parameters are views: the optimizer passes over the buffers, not over two hundred parameters. Each
parameter begins at a multiple of 64 bytes, with zeros between it and the one before: on some CPUs
the last bit of a product with one row, as in a batch of one text, depends on the weight's address.

The copy may hold fewer word embeddings than the model. Without weight decay, AdamW never moves a
row that has no gradient (its moments stay 0), so a stage need only train the rows of tokens that
its data have: of BERT's 30,522 that is a third for some thousand short texts, and with it go two
thirds of the optimizer's work on the largest table.

Shapes: V' tokens in use, D hidden, P trained weights with the zeros between them.
"""

import re
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..kernels import IMPLS, triton_problem
from ..model.bert import BertClassifier, BertConfig, assemble_classifier

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORD_EMBEDDINGS = "bert.embeddings.word.weight"
ALIGN_TO = 32
"""Weights: 64 bytes in 16 bits, as torch aligns its own memory; 128 in fp32."""


def choose_device(name: str) -> torch.device:
    """`auto` (a CUDA GPU if there is one), `cpu`, `cuda` or `cuda:n`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise UsageError(f"device is '{name}'; expected auto, cpu, cuda or cuda:n")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device is '{name}', but torch sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """`fp32`, `bf16`, `fp16`, or `auto`: bf16 if the device multiplies it natively, else fp32."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    if name != "auto":
        raise UsageError(f"precision is '{name}'; expected one of auto, {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.bfloat16 if native else torch.float32


def check_kernels(impl: str, graphs: bool, precision: str, device: torch.device) -> None:
    """Raise UsageError when the operations (`kernels/__init__.py`) cannot run with this `impl`, or
    steps not as CUDA graphs where these are asked for."""
    if impl not in IMPLS:
        raise UsageError(f"kernels are '{impl}'; expected one of {', '.join(IMPLS)}")
    problem = triton_problem(device) if impl == "triton" else None
    if problem is not None:
        raise UsageError(f"kernels are 'triton', but {problem}; leave the choice to auto")
    if graphs and impl != "triton":
        raise UsageError(f"graphs need kernels 'triton'; they are '{impl}'")
    if graphs and device.type != "cuda":
        raise UsageError(f"graphs need a CUDA GPU, and the device is {device}")
    if graphs and choose_precision(precision, device) == torch.float32:
        raise UsageError("graphs need precision bf16 or fp16; it is fp32")
    if graphs and torch.cuda.get_device_capability(device) < (8, 0):
        raise UsageError(f"graphs need a GPU of compute capability 8.0 or more; {device} is older")


class WorkingCopy:
    """A model's twin in the precision of forward and backward; the model keeps the masters.

    Made after freezing: only what then requires a gradient is trained and refreshed. Use it in a
    `with` block: when that is left, for whatever reason, the model is up to date.
    """

    def __init__(
        self,
        model: BertClassifier,
        dtype: torch.dtype,
        used_tokens_V: Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        """used_tokens_V: [V'] integer, the only tokens whose embeddings the copy has, known to it
        by their places here; None: all. impl: of the copy's operations."""
        masters = dict(model.named_parameters())
        self._all_words, self._used_tokens_V = masters[WORD_EMBEDDINGS], used_tokens_V
        if used_tokens_V is not None:
            rows_VD = self._all_words.detach()[used_tokens_V]
            masters[WORD_EMBEDDINGS] = nn.Parameter(rows_VD, self._all_words.requires_grad)
        self._words = masters[WORD_EMBEDDINGS]
        trained = {name: master for name, master in masters.items() if master.requires_grad}
        self.masters = list(trained.values())
        sizes = [-(-master.numel() // ALIGN_TO) * ALIGN_TO for master in self.masters]
        self.weights_P = torch.zeros(sum(sizes), device=model.device)
        """The masters, end to end, fp32."""
        for master, weights in zip(self.masters, self.weights_P.split(sizes), strict=True):
            master.data = _view_like(master, weights).copy_(master.detach())

        self.model = cast_model(model.bert.config, masters, dtype, impl)
        # On a CPU, naming the rows that have a gradient is far cheaper than a table of zeros.
        self.model.bert.embeddings.word.sparse = model.device.type == "cpu"
        # Embeddings, which come first, are not rounded. (Norms that are not have room among the
        # rounded weights all the same, a thousandth of it, which nobody reads.)
        kept = [n for n in trained if dtype == torch.float32 or n.startswith("bert.embeddings.")]
        self.num_unrounded = sum(sizes[: len(kept)])
        """So many weights, the first, are fp32 in the copy too."""
        self.rounded_P = self.weights_P[self.num_unrounded :].to(dtype)
        """The others, end to end, in the precision of the copy."""
        twins = [self.model.get_parameter(name) for name in trained]
        rounded = self.rounded_P.split(sizes[len(kept) :])
        for twin, weights in zip(twins[len(kept) :], rounded, strict=True):
            if twin.dtype == dtype:
                twin.data = _view_like(twin, weights)

        self._gradients_P = torch.zeros_like(self.weights_P)
        for master, gradient in zip(self.masters, self._gradients_P.split(sizes), strict=True):
            master.grad = _view_like(master, gradient)
        self._hooks = [
            twin.register_post_accumulate_grad_hook(partial(self._collect, master))
            for master, twin in zip(self.masters, twins, strict=True)
        ]
        self._arrived: list[tuple[Tensor, Tensor]] = []  # (where it is to be, the gradient)
        self._num_arrived = 0
        # On a CPU a gradient is copied while it is in the cache; a GPU takes many at one launch.
        self._copies_at_once = model.device.type == "cuda"

    def __enter__(self) -> "WorkingCopy":
        return self

    def __exit__(self, *_: object) -> None:
        for hook, master in zip(self._hooks, self.masters, strict=True):
            hook.remove()  # it refers to this object, which else would live on in a circle
            master.grad = None
        if self._used_tokens_V is not None:
            with torch.no_grad():
                self._all_words[self._used_tokens_V] = self._words

    def take_gradients(self) -> Tensor:
        """The gradients of the last backward, end to end: [P] fp32, the same memory each time."""
        assert self._num_arrived == len(self.masters), "every trained parameter has a gradient"
        for dtype in dict.fromkeys(gradient.dtype for _, gradient in self._arrived):
            pairs = [pair for pair in self._arrived if pair[1].dtype == dtype]
            torch._foreach_copy_([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        self._arrived, self._num_arrived = [], 0
        return self._gradients_P

    def _collect(self, master: Tensor, twin: Tensor) -> None:
        """Called in backward as soon as the twin's gradient is there."""
        gradient, twin.grad = twin.grad, None
        assert gradient is not None
        assert master.grad is not None
        if gradient.is_sparse:
            master.grad.zero_().index_add_(0, gradient._indices()[0], gradient._values())
        elif self._copies_at_once:
            self._arrived.append((master.grad, gradient))
        else:
            master.grad.copy_(gradient)
        self._num_arrived += 1


def _view_like(parameter: Tensor, room: Tensor) -> Tensor:
    """The first of the room's numbers, in the parameter's shape."""
    return room[: parameter.numel()].view_as(parameter)


def cast_model(
    config: BertConfig, masters: Mapping[str, nn.Parameter], dtype: torch.dtype, impl: str = "auto"
) -> BertClassifier:
    """A model with these parameters in `dtype`, but embeddings, and norms where that can be, fp32.

    What needs no cast shares its memory with the master. impl: of the model's operations.
    """
    twins = {}
    for name, master in masters.items():
        fp32_norms = master.device.type == "cpu" or impl == "triton"
        kept = name.startswith("bert.embeddings.") or (fp32_norms and "norm." in name)
        tensor = master.detach() if kept else master.detach().to(dtype)
        twins[name] = nn.Parameter(tensor, master.requires_grad)
    return assemble_classifier(config, twins, impl)
