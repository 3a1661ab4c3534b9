"""Random resizing and padding (Xie et al., 2018): a defence that is different at every look."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec


class RandomResizePad(Defense):
    """Shrink each image to a random size and put it at a random place of a canvas of the old size.

    The new side is a whole number of pixels, uniform between `smallest` (0 to 1, default 0.75) times the old side and
    the old side; the place is uniform among those where it fits; the rest is `fill` (0 to 1, default 0). The canvas
    keeps the input's size, so any classifier fits behind it (the original enlarged it instead). Draws belong to the
    sample, not to the batch. Smooth in the input for a given draw, so exact gradients work and EOT is what it takes;
    the BPDA partner is the same map with the same draw. Source: Xie et al., "Mitigating adversarial effects through
    randomization", 2018.
    """

    name = "random_resize_pad"
    spec = DefenseSpec(stochastic=True)

    def __init__(self, smallest: float = 0.75, fill: float = 0.0) -> None:
        super().__init__()
        if not 0 < smallest <= 1:
            raise InputError(f"smallest {smallest}", "it is a share of the old side", "use for example 0.75")
        if not 0 <= fill <= 1:
            raise InputError(f"fill {fill}", "it is a pixel value", "use 0 to 1")
        self.smallest, self.fill = smallest, fill

    def forward(self, x: Tensor) -> Tensor:
        """Return the images, each resized and placed by its own draw."""
        self.need_images(x)
        n, _, height, width = x.shape
        draws = context.noise(x, self.name).uniform((3,))
        # One draw decides the size of both sides, so that the picture keeps its shape.
        rows, top = self._place(height, draws[:, 0], draws[:, 1])
        columns, left = self._place(width, draws[:, 0], draws[:, 2])
        y, inside_y = _source(height, rows, top)
        x_, inside_x = _source(width, columns, left)
        grid = torch.stack([x_[:, None, :].expand(n, height, width), y[:, :, None].expand(n, height, width)], dim=-1)
        moved = F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="border", align_corners=False)
        inside = (inside_y[:, :, None] & inside_x[:, None, :]).unsqueeze(1)
        return torch.where(inside, moved, torch.full_like(moved, self.fill))

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the same map; inside one call of an Oracle it meets the same draw."""
        transformed: Tensor = self.forward(x)
        return transformed

    def _place(self, side: int, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N,) new sides and offsets in whole pixels from draws in [0, 1)."""
        least = min(side, max(1, math.ceil(self.smallest * side)))
        new = least + (size * (side - least + 1)).floor().clamp(max=side - least)
        offset = (place * (side - new + 1)).floor().minimum(side - new)
        return new, offset

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"smallest={self.smallest}, fill={self.fill}"


def _source(side: int, new: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for every output pixel of each sample (N x side), the source coordinate in [-1, 1] and whether the
    pixel belongs to the resized picture.
    """
    pixel = torch.arange(side, device=new.device, dtype=new.dtype) - offset[:, None]
    inside = (pixel >= 0) & (pixel < new[:, None])
    return 2 * (pixel + 0.5) / new[:, None] - 1, inside
