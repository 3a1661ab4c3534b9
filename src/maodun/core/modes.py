"""The state a model is held in while it is attacked, and the promise to give it back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from maodun.core.errors import InputError


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and freeze every parameter; restore each flag exactly on leaving."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for module, _ in modes:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def conv_weights_channels_last(model: nn.Module) -> Iterator[None]:
    """Lay the weights of 2-D convolutions out channels-last on a CPU; give the old tensors back on leaving.

    Only strides change, never values. Convolutions then run channels-last whatever the layout of their input, which
    makes gradients about a fifth and forwards up to a third cheaper (benchmarks/README.md).
    """
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d) and m.weight.device.type == "cpu"]
    kept = [(weight, weight.data) for weight in dict.fromkeys(weights)]
    try:
        for weight, data in kept:
            weight.data = data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for weight, data in kept:
            weight.data = data


def refuse_training_batchnorm(model: nn.Module) -> None:
    """Raise InputError when a BatchNorm layer is in training mode: its output would depend on the batch."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise InputError(
                "model",
                f"is in training mode and contains BatchNorm ('{name}'), so answers depend on the batch",
                "call model.eval() first",
            )
