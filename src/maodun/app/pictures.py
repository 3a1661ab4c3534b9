"""Adversarial inputs as files for people: lossless PNG pictures, or NPZ arrays that keep every bit."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from maodun.core.errors import InputError

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[Any]


def to_levels(x_adv: Array, x: Array) -> npt.NDArray[np.uint8]:
    """Return `x_adv` (N x ..., in [0, 1]) in 256 levels, rounded towards the clean `x` where it was changed.

    Rounding to the nearest level could leave the threat's ball by half a level; rounding towards the clean
    value cannot leave a linf, l2 or l1 ball. Where nothing was changed the nearest level is taken.
    """
    scaled = x_adv.astype(np.float64) * 255.0
    nearest = np.rint(scaled)
    on_level = np.abs(scaled - nearest) < 1e-4
    towards = np.where(x_adv > x, np.floor(scaled), np.ceil(scaled))
    levels = np.where((x_adv == x) | on_level, nearest, towards)
    return levels.clip(0, 255).astype(np.uint8)


def to_png(levels: npt.NDArray[np.uint8]) -> bytes:
    """Return one picture (1 x H x W grey or 3 x H x W colour, uint8) as PNG bytes."""
    from PIL import Image

    if levels.ndim != 3 or levels.shape[0] not in (1, 3):
        shape = " x ".join(str(size) for size in levels.shape)
        raise InputError("--save png", f"an input of shape {shape} is not a picture", "use --save npz")
    pixels = levels[0] if levels.shape[0] == 1 else np.moveaxis(levels, 0, -1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
