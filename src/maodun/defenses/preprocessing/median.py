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

    def _padded(self, x: Tensor) -> Tensor:
        self.need_images(x)
        return F.pad(x, (self.size // 2,) * 4, mode="replicate")

    def forward(self, x: Tensor) -> Tensor:
        """Return the smoothed images."""
        padded = self._padded(x)
        if self.size == 3:
            return _median_of_nine(padded)
        return padded.unfold(2, self.size, 1).unfold(3, self.size, 1).flatten(4).median(dim=4).values

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the window means."""
        return F.avg_pool2d(self._padded(x), self.size, stride=1)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"size={self.size}"


def _median_of_nine(padded: Tensor) -> Tensor:
    """Return the medians of all 3 x 3 windows, N x C x (H - 2) x (W - 2), without sorting each window by itself.

    The columns of a window are sorted once for all windows that share them; the median of nine is then the median of
    the largest minimum, the median of the middles and the smallest maximum (Smith, 1996).
    """
    low, middle, high = _sorted(padded[:, :, :-2], padded[:, :, 1:-1], padded[:, :, 2:])
    left, centre, right = (slice(0, -2), slice(1, -1), slice(2, None))
    largest_low = low[..., left].maximum(low[..., centre]).maximum(low[..., right])
    smallest_high = high[..., left].minimum(high[..., centre]).minimum(high[..., right])
    middle = _sorted(middle[..., left], middle[..., centre], middle[..., right])[1]
    return _sorted(largest_low, middle, smallest_high)[1]


def _sorted(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three tensors as elementwise minimum, median and maximum."""
    a, b = a.minimum(b), a.maximum(b)
    b, c = b.minimum(c), b.maximum(c)
    a, b = a.minimum(b), a.maximum(b)
    return a, b, c
