"""Bilateral filter: a blur that stops at edges."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense
from maodun.defenses.preprocessing.library import check_library, image_by_image, opencv, valued


class Bilateral(Defense):
    """Mean over the disc of `radius` pixels (default 2), weighted by nearness in place and in colour; borders repeat.

    The weight of a neighbour is exp(-d^2 / 2 space^2 - c^2 / 2 colour^2) with d its distance in pixels and c the sum of
    absolute differences over the channels, as OpenCV has it. `library` opencv takes the values from
    cv2.bilateralFilter (extra `vision`; 1 or 3 channels) and the derivative from here. The exact derivative goes
    through the weights; the BPDA partner holds them fixed. Source: Tomasi and Manduchi, ICCV 1998; as a defence Xie et
    al., CVPR 2019.
    """

    name = "bilateral"

    def __init__(self, radius: int = 2, colour: float = 0.2, space: float = 1.5, library: str = "torch") -> None:
        super().__init__()
        if radius < 1:
            raise InputError(f"radius {radius}", "a neighbourhood has at least one pixel around", "use 2")
        if colour <= 0 or space <= 0:
            raise InputError(f"widths {colour}, {space}", "they must be positive", "use colour=0.2, space=1.5")
        check_library(self.name, library)
        self.radius, self.colour, self.space, self.library = radius, colour, space, library

    def forward(self, x: Tensor) -> Tensor:
        """Return the filtered images."""
        self.need_images(x)
        if self.library == "torch":
            return self._mean(x, x)
        value = self._opencv(x)
        return valued(self._mean(x, x), value) if x.requires_grad else value

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the mean with the weights held fixed: a linear filter for each image."""
        return self._mean(x, x.detach())

    def _mean(self, x: Tensor, guide: Tensor) -> Tensor:
        """Return the mean of `x` under the weights that `guide` gives."""
        r, height, width = self.radius, x.shape[2], x.shape[3]
        around, guides = F.pad(x, (r,) * 4, mode="replicate"), F.pad(guide, (r,) * 4, mode="replicate")
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for down in range(-r, r + 1):
            for right in range(-r, r + 1):
                if math.hypot(down, right) > r:
                    continue
                window = (..., slice(r + down, r + down + height), slice(r + right, r + right + width))
                apart = (guides[window] - guide).abs().sum(1, keepdim=True)
                place = (down * down + right * right) / (2 * self.space**2)
                weight = torch.exp(-(apart**2) / (2 * self.colour**2) - place)
                total, weights = total + weight * around[window], weights + weight
        return total / weights

    def _opencv(self, x: Tensor) -> Tensor:
        if x.shape[1] not in (1, 3):
            reason = f"OpenCV filters 1 or 3 channels, not {x.shape[1]}"
            raise InputError(f"defence '{self.name}'", reason, "use library=torch")
        cv2, side = opencv(self.name), 2 * self.radius + 1
        return image_by_image(
            x, lambda image: cv2.bilateralFilter(image, side, self.colour, self.space, borderType=cv2.BORDER_REPLICATE)
        ).clamp(0.0, 1.0)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"radius={self.radius}, colour={self.colour}, space={self.space}, library={self.library}"
