"""Transforms whose reference is somebody else's library: their value, our derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maodun.core.errors import InputError

LIBRARIES = ("torch", "opencv")


def opencv(thing: str) -> Any:
    """Return OpenCV's module; InputError, naming `thing`, when it is not installed."""
    try:
        import cv2
    except ImportError as error:
        remedy = "install maodun[vision], or use library=torch"
        raise InputError(thing, "needs OpenCV, which is not installed", remedy) from error
    return cv2


def check_library(name: str, library: str) -> None:
    """Raise InputError unless `library` is known and here, before anything else is done."""
    if library not in LIBRARIES:
        raise InputError(f"library '{library}'", f"'{name}' does not come from there", "use torch or opencv")
    if library == "opencv":
        opencv(f"defence '{name}'")


def image_by_image(x: Tensor, transform: Callable[[NDArray[Any]], NDArray[Any]]) -> Tensor:
    """Return `transform` (H x W x C float32 arrays to the same) of every image of `x` (N x C x H x W), on the host.

    Other people's libraries take one image at a time; there is no gradient.
    """
    images = x.detach().cpu().permute(0, 2, 3, 1).to(torch.float32).numpy()
    done = [np.asarray(transform(np.ascontiguousarray(image))).reshape(image.shape) for image in images]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).to(x)


def valued(smooth: Tensor, value: Tensor) -> Tensor:
    """Return `value` with the derivative of `smooth`."""
    return smooth + (value - smooth).detach()
