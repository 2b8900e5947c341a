"""Mixed precision with fp32 master weights.

The model that a stage trains is fp32: the masters. Forward and backward run on a working copy of it
in bf16, made once a stage. After backward, gradients go from the copy to the masters in fp32, the
optimizer steps there, and the new weights go back to the copy in one rounding. So no weight is
cast per use, and an update smaller than bf16's spacing (1/256 to 1/128 of the weight) is not
lost. The loss, softmax and the statistics of layer norm are computed in fp32.

The embeddings are shared, not copied (`model/bert.py` says why). With fp32 the working copy is the
model itself.
"""

import re

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.bert import BertClassifier, assemble_classifier

PRECISIONS = ("auto", "fp32", "bf16")


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
    """`fp32`, `bf16`, or `auto`: bf16 where the device multiplies it natively, else fp32."""
    if name == "fp32":
        return torch.float32
    if name == "bf16":
        return torch.bfloat16
    if name != "auto":
        raise UsageError(f"precision is '{name}'; expected one of {', '.join(PRECISIONS)}")
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        native = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    return torch.bfloat16 if native else torch.float32


class WorkingCopy:
    """A model's twin in the precision of forward and backward; the model keeps the masters.

    Made after freezing: only what then requires a gradient is trained and refreshed.
    """

    def __init__(self, model: BertClassifier, dtype: torch.dtype) -> None:
        self.model = model if dtype == torch.float32 else _cast(model, dtype)
        pairs = zip(model.parameters(), self.model.parameters(), strict=True)
        trained = [(master, work) for master, work in pairs if master.requires_grad]
        self.masters: list[Tensor] = [master for master, _ in trained]
        """The fp32 parameters to optimize."""
        self._copied = [(master, work) for master, work in trained if master is not work]

    def pull_gradients(self) -> list[Tensor]:
        """Gradients of the last backward, as fp32 `.grad` of the masters; returns them."""
        for master, work in self._copied:
            assert work.grad is not None
            master.grad = work.grad.float()
            work.grad = None
        gradients: list[Tensor] = []
        for parameter in self.masters:
            assert parameter.grad is not None, "every trained parameter takes part in the loss"
            gradients.append(parameter.grad)
        return gradients

    def drop_gradients(self) -> None:
        """Free the gradients: the next backward starts from nothing, not from zeros."""
        for master in self.masters:
            master.grad = None

    def push_weights(self) -> None:
        """Round the masters into the copy."""
        if self._copied:
            with torch.no_grad():
                torch._foreach_copy_([w for _, w in self._copied], [m for m, _ in self._copied])


def _cast(model: BertClassifier, dtype: torch.dtype) -> BertClassifier:
    """A copy of the model in `dtype` that shares its embeddings."""
    parameters = {
        name: master
        if name.startswith("bert.embeddings.")
        else nn.Parameter(master.detach().to(dtype), master.requires_grad)
        for name, master in model.named_parameters()
    }
    return assemble_classifier(model.bert.config, parameters)
