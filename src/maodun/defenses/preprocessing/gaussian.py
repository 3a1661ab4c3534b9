"""Gaussian blur: a linear filter, so its derivative is the filter itself, mirrored."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense


class Gaussian(Defense):
    """Blur every channel with a normal kernel of `sigma` pixels (default 1), cut at three sigmas; borders repeat.

    Linear and smooth, so the exact gradient is the one to use; the BPDA partner is the filter itself.
    """

    name = "gaussian"
    kernel: Tensor

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        if not 0 < sigma <= 100:
            raise InputError(f"sigma {sigma}", "it is a width in pixels", "use for example 1.0")
        self.sigma = sigma
        place = torch.arange(-int(3 * sigma + 0.5), int(3 * sigma + 0.5) + 1, dtype=torch.float64)
        kernel = torch.exp(-0.5 * (place / sigma) ** 2)
        self.register_buffer("kernel", (kernel / kernel.sum()).to(torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the blurred images."""
        self.need_images(x)
        # Two products with small matrices: on images of the size attacked here faster than convolving single channels.
        blurred = self.line(x.shape[2]).to(x.dtype) @ x @ self.line(x.shape[3]).to(x.dtype).T
        return blurred.clamp(0.0, 1.0)

    def line(self, length: int) -> Tensor:
        """Return the matrix (length x length) that blurs a line of pixels."""
        radius = self.kernel.shape[0] // 2
        place = torch.arange(length, device=self.kernel.device)
        matrix = self.kernel.new_zeros(length, length)
        for offset, weight in zip(range(-radius, radius + 1), self.kernel, strict=True):
            matrix[place, (place + offset).clamp(0, length - 1)] += weight
        return matrix

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the blurred images."""
        blurred: Tensor = self.forward(x)
        return blurred

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"sigma={self.sigma}"
