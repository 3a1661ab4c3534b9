"""JPEG by the codec that everybody uses: real files, no derivative at all."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.preprocessing.jpeg import JPEG


class JPEGCodec(Defense):
    """Write each image as a baseline JPEG file at `quality` 1 to 100 (default 75) with Pillow, and read it again.

    Three channels are coded in colour, with colour differences at half resolution unless `subsample` is False; any
    other number of channels as that many grey pictures. Images pass through the host one by one. It has no derivative;
    the BPDA partner is that of `jpeg`, the same pipeline in tensor operations without rounding.
    """

    name = "jpeg_codec"
    spec = DefenseSpec(differentiable=False)

    def __init__(self, quality: int = 75, subsample: bool = True) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise InputError(f"quality {quality}", "JPEG knows 1 to 100", "use for example 75")
        self.quality, self.subsample = quality, subsample
        # In a list, so that its partner is not taken for a module of its own by those who walk the model.
        self._twin = [JPEG(quality, subsample)]

    def forward(self, x: Tensor) -> Tensor:
        """Return the images after the codec, on the grid of 8-bit values."""
        self.need_images(x)
        levels = (x.detach() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        if x.shape[1] == 3:
            done = [self._coded(image.transpose(1, 2, 0)).transpose(2, 0, 1) for image in levels]
        else:
            done = [np.stack([self._coded(plane) for plane in image]) for image in levels]
        return torch.from_numpy(np.stack(done)).to(x.device, x.dtype) / 255

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the pipeline in tensor operations, without rounding."""
        return self._twin[0].to(x.device).bpda_partner(x)

    def _coded(self, image: np.ndarray) -> np.ndarray:
        from PIL import Image

        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=self.quality, subsampling=2 if self.subsample else 0)
        with Image.open(file) as opened:
            return np.array(opened)

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"quality={self.quality}, subsample={self.subsample}"
