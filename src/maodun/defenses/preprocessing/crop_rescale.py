"""Crops enlarged to the old size, and the mean of what is said about them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec


class CropRescale(Defense):
    """Cut a random crop out of each image and enlarge it to the old size; the answer is the mean over `crops` of them.

    A crop's sides are `share` (0 to 1, default 0.875) of the old ones, in whole pixels, its place is uniform. The
    answer is the logarithm of the mean probabilities over `crops` (default 5) independent crops. Draws belong to the
    sample, not to the batch. Smooth in the input for a given draw, so exact gradients work and EOT is what it takes;
    the BPDA partner is the same map with the same draw. Source: Guo et al., "Countering adversarial images using input
    transformations", ICLR 2018 (30 crops of 90 of 224 pixels).
    """

    name = "crop_rescale"
    spec = DefenseSpec(stochastic=True)

    def __init__(self, share: float = 0.875, crops: int = 5) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise InputError(f"share {share}", "it is a share of the old side", "use for example 0.875")
        if crops < 1:
            raise InputError(f"crops {crops}", "there must be at least one", "use for example 5")
        self.share, self.crops = share, crops
        self.spec = DefenseSpec(stochastic=True, votes=crops)

    def forward(self, x: Tensor) -> Tensor:
        """Return one crop of each image, enlarged."""
        self.need_images(x)
        places = context.noise(x, self.name).uniform((2,))
        rows, columns = (self._source(x.shape[2 + axis], places[:, axis]) for axis in (0, 1))
        n, height, width = x.shape[0], x.shape[2], x.shape[3]
        grid = torch.stack(
            [columns[:, None, :].expand(n, height, width), rows[:, :, None].expand(n, height, width)], dim=-1
        )
        return F.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="border", align_corners=False)

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the log of the mean probabilities of `model` over the crops, N x classes."""
        from maodun.defenses.purification.purifier import vote

        return super().answer(model, x) if self.crops == 1 else vote(self, model, x)

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the same map; inside one call of an Oracle it meets the same draw."""
        cropped: Tensor = self.forward(x)
        return cropped

    def _source(self, side: int, place: Tensor) -> Tensor:
        """Return, for every output pixel of each sample (N x side), the source coordinate in [-1, 1]."""
        crop = max(1, round(self.share * side))
        offset = (place * (side - crop + 1)).floor().clamp(max=side - crop)
        pixel = (torch.arange(side, device=place.device, dtype=place.dtype) + 0.5) * (crop / side)
        return 2 * (offset[:, None] + pixel) / side - 1

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"share={self.share}, crops={self.crops}"
