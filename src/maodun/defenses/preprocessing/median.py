"""Median smoothing (feature squeezing; Xu, Evans and Qi, 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec


class Median(Defense):
    """Replace every pixel by the median of its size x size neighbourhood, channel by channel; borders are repeated.

    `size` is odd (default 3). The exact derivative exists but leads to one pixel of each window only; the BPDA partner
    is the mean over the same window, which spreads it over all of them.
    """

    name = "median"
    spec = DefenseSpec(differentiable=True)

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        if size < 1 or size % 2 == 0:
            raise InputError(f"size {size}", "a window with a centre has an odd side", "use 3 or 5")
        self.size = size

    def _windows(self, x: Tensor) -> Tensor:
        self.need_images(x)
        padded = F.pad(x, (self.size // 2,) * 4, mode="replicate")
        return padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the smoothed images."""
        return self._windows(x).median(dim=4).values

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the window means."""
        return self._windows(x).mean(dim=4)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"size={self.size}"
