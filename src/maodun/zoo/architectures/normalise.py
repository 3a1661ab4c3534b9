"""Normalisation as a part of the model, because everything outside a model lives in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError

CIFAR10_MEAN, CIFAR10_STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Subtract a mean and divide by a standard deviation per channel.

    Takes and returns N x C x H x W; `mean` and `std` hold C numbers in input units. The constants are buffers that stay
    out of the state dict, so the weights keep the names other libraries gave them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - mean) / std; InputError for another number of channels, which would be broadcast silently."""
        # While tracing, sizes are tensors and a comparison would be frozen into the program.
        if not torch.jit.is_tracing() and x.shape[1] != self.mean.shape[1]:  # type: ignore[no-untyped-call, attr-defined]
            reason = f"have {x.shape[1]} channels where the model takes {self.mean.shape[1]}"
            raise InputError("inputs", reason, "take a model made for them")
        return (x - self.mean) / self.std


def normaliser(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> nn.Module:
    """Return a Normalise layer, or the identity when no constants are given (a model that takes [0, 1] as it is)."""
    if mean is None or std is None:
        return nn.Identity()
    return Normalise(tuple(mean), tuple(std))
