"""JPEG compression, written in tensor operations so that its derivative can be approximated piece by piece."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec

# ITU-T T.81, annex K: the quantisation tables every encoder starts from.
_LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *(((99,) * 8,) * 4),
)
# ITU-T T.871 (JFIF): full-range RGB to luma and two centred colour differences.
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))

Rounding = Callable[[Tensor], Tensor]


def quantisation_tables(quality: int) -> Tensor:
    """Return the luma and chroma tables (2 x 8 x 8) at `quality` 1 to 100, scaled as the IJG library does."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    tables = torch.tensor((_LUMA, _CHROMA)) * scale
    return ((tables + 50) // 100).clamp(1, 255).to(torch.float32)


def cosine_transform() -> Tensor:
    """Return the orthonormal 64 x 64 matrix of the cosine transform in two dimensions, for flattened 8 x 8 blocks."""
    place = torch.arange(8, dtype=torch.float64)
    matrix = torch.cos((2 * place + 1) * place.view(-1, 1) * math.pi / 16) / 2
    matrix[0] /= math.sqrt(2)
    return torch.kron(matrix, matrix).to(torch.float32)


class JPEG(Defense):
    """Compress and decompress as baseline JPEG at `quality` 1 to 100 (default 75), 8-bit values in and out.

    Takes N x C x H x W of any size (blocks are filled by repeating the border). Three channels are coded as luma and
    colour differences, these at half resolution unless `subsample` is False; any other number of channels is coded as
    that many grey pictures. Rounding makes the derivative zero; the BPDA partner is the same pipeline without
    rounding. Source: Dziugaite et al., 2016; Das et al., 2017; broken by Athalye et al., 2018.
    """

    name = "jpeg"
    spec = DefenseSpec(differentiable=False)
    tables: Tensor
    cosines: Tensor
    to_ycc: Tensor
    to_rgb: Tensor

    def __init__(self, quality: int = 75, subsample: bool = True) -> None:
        super().__init__()
        if not 1 <= quality <= 100:
            raise InputError(f"quality {quality}", "JPEG knows 1 to 100", "use for example 75")
        self.quality, self.subsample = quality, subsample
        self.register_buffer("tables", quantisation_tables(quality), persistent=False)
        self.register_buffer("cosines", cosine_transform(), persistent=False)
        self.register_buffer("to_ycc", torch.tensor(_TO_YCC), persistent=False)
        self.register_buffer("to_rgb", torch.tensor(_TO_RGB), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the images after compression, on the grid of 8-bit values."""
        return self._pipeline(x, torch.round)

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the pipeline without rounding: only the colour differences lose resolution."""
        return self._pipeline(x, _keep)

    def _pipeline(self, x: Tensor, rounding: Rounding) -> Tensor:
        self.need_images(x)
        levels = rounding(x * 255)
        if x.shape[1] != 3:
            return rounding(self._code(levels - 128, 0, rounding) + 128).clamp(0, 255) / 255
        ycc = rounding(torch.einsum("dc,nchw->ndhw", self.to_ycc, levels))
        luma = self._code(ycc[:, :1] - 128, 0, rounding) + 128
        colour = ycc[:, 1:]
        if self.subsample:
            small = F.avg_pool2d(_fill(colour, 2), 2)
            small = self._code(rounding(small), 1, rounding)
            colour = F.interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
            colour = colour[:, :, : x.shape[2], : x.shape[3]]
        else:
            colour = self._code(colour, 1, rounding)
        planes = rounding(torch.cat([luma, colour], dim=1))
        return rounding(torch.einsum("dc,nchw->ndhw", self.to_rgb, planes)).clamp(0, 255) / 255

    def _code(self, planes: Tensor, table: int, rounding: Rounding) -> Tensor:
        """Return centred planes (N x C x H x W, in levels) after the quantised transform of their 8 x 8 blocks."""
        height, width = planes.shape[-2:]
        filled = _fill(planes, 8)
        n, c, tall, wide = filled.shape
        blocks = filled.reshape(n, c, tall // 8, 8, wide // 8, 8).transpose(3, 4).reshape(-1, 64)
        steps = self.tables[table].flatten()
        coefficients = rounding(blocks @ self.cosines.T / steps) * steps
        restored = (coefficients @ self.cosines).reshape(n, c, tall // 8, wide // 8, 8, 8).transpose(3, 4)
        return restored.reshape(n, c, tall, wide)[:, :, :height, :width]

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"quality={self.quality}, subsample={self.subsample}"


def _keep(x: Tensor) -> Tensor:
    return x


def _fill(planes: Tensor, side: int) -> Tensor:
    """Repeat the last row and column until both sizes are multiples of `side`."""
    down, right = -planes.shape[2] % side, -planes.shape[3] % side
    return F.pad(planes, (0, right, 0, down), mode="replicate") if down or right else planes
