"""Random linear changes of the input: a gradient that holds for changed copies holds more easily for another model.

Every function maps N x C x H x W to the same shape, is differentiable, and draws per sample: equal `ids` and `number`
give equal changes whatever batch a sample stands in.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.geometry import cosine_basis
from maodun.core.streams import Stream


def resize_and_pad(x: Tensor, noise: Stream, ids: Tensor, number: int, resize: float, probability: float) -> Tensor:
    """Shrink each picture within a larger frame, at a random place, scaled back to its size (Xie et al., CVPR 2019).

    The frame measures `resize` times the picture (below 1 the picture's own size); the content gets a whole number of
    pixels between the picture's size and the frame's (between `resize` times the size and the size). A picture is
    changed with `probability`. Shrinking, placing and scaling back are one bilinear sampling, zeros outside.
    """
    draws = noise.uniform(ids, (4,), number).to(x)
    theta = torch.zeros(x.shape[0], 2, 3, device=x.device, dtype=x.dtype)
    for axis, size in ((0, x.shape[3]), (1, x.shape[2])):
        # Where rounding would leave nothing to draw, one pixel is what a picture can be moved by.
        other = size if resize == 1.0 else max(int(size * resize), size + 1) if resize > 1.0 else int(size * resize)
        low, frame = min(size, other), max(size, other)
        content = low + (draws[:, 1] * max(1, frame - low)).floor()
        offset = (draws[:, 2 + axis] * (frame - content + 1)).floor()
        theta[:, axis, axis] = frame / content
        theta[:, axis, 2] = (frame - 2 * offset) / content - 1
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return torch.where((draws[:, 0] < probability).view(-1, 1, 1, 1), moved, x)


def perturb_spectrum(x: Tensor, noise: Stream, ids: Tensor, number: int, rho: float, sigma: float) -> Tensor:
    """Add noise of size `sigma`, multiply each frequency by a factor in [1 - rho, 1 + rho] (Long et al., ECCV 2022).

    The frequencies are those of the orthonormal discrete cosine transform of the whole picture.
    """
    shape = tuple(x.shape[1:])
    shifted = x + sigma * noise.child("noise").normal(ids, shape, number).to(x)
    factor = 1 + rho * (2 * noise.child("mask").uniform(ids, shape, number).to(x) - 1)
    rows, columns = cosine_basis(x.shape[2]).to(x), cosine_basis(x.shape[3]).to(x)
    spectrum = rows @ shifted @ columns.T
    back: Tensor = rows.T @ (spectrum * factor) @ columns
    return back
