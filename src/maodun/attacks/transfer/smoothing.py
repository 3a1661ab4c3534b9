"""The translation-invariant gradient: a convolution stands in for the mean over shifted copies (Dong et al., 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_REACH = 3.0
"""How many standard deviations the kernel spans on each side, as in the authors' code."""


def gaussian_kernel(size: int) -> Tensor:
    """Return the normalised Gaussian of `size` x `size` (odd), cut off at three standard deviations."""
    place = torch.linspace(-_REACH, _REACH, size, dtype=torch.float64)
    line = torch.exp(-0.5 * place.square())
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum()).float()


def smooth(gradient: Tensor, size: int) -> Tensor:
    """Return N x C x H x W gradients convolved per channel with the Gaussian of `size`; zeros beyond the edges."""
    channels = gradient.shape[1]
    kernel = gaussian_kernel(size).to(gradient).expand(channels, 1, size, size)
    return F.conv2d(gradient, kernel, padding=size // 2, groups=channels)
