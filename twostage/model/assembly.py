"""Classifiers made of given parameters, without copying or drawing any."""

from collections.abc import Mapping

import torch
from torch import nn

from .bert import BertClassifier, stays_fp32
from .config import BertConfig


def assemble_classifier(
    config: BertConfig, parameters: Mapping[str, nn.Parameter], impl: str = "auto"
) -> BertClassifier:
    """A classifier made of these parameters themselves (not copies), named as in the model."""
    # On the meta device, modules neither allocate nor draw from the process-wide generator.
    with torch.device("meta"):
        model = BertClassifier(config, len(parameters["classifier.2.bias"]), impl)
    for name, _ in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, parameters[name])
    return model


def round_classifier(
    config: BertConfig,
    parameters: Mapping[str, nn.Parameter],
    dtype: torch.dtype,
    impl: str = "auto",
) -> BertClassifier:
    """A classifier with these parameters in `dtype`, but for those that `stays_fp32` names.

    What needs no rounding shares its memory with the given parameter. impl: how the operations run.
    """
    rounded = {}
    for name, parameter in parameters.items():
        kept = stays_fp32(name, parameter.device, impl)
        tensor = parameter.detach() if kept else parameter.detach().to(dtype)
        rounded[name] = nn.Parameter(tensor, parameter.requires_grad)
    return assemble_classifier(config, rounded, impl)
