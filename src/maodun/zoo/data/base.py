"""The one shape every data set takes, and the checks it passes before anything is attacked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maodun.core.errors import InputError

_ROUNDING = 1e-5


@dataclass(frozen=True)
class Dataset:
    """Labelled samples in memory.

    `x` is float32 N x ... in [0, 1], `y` int64 (N,) in [0, number of classes), `ids` int64 (N,) the position of each
    sample in its source split (random streams are keyed by it), `classes` the class names, `sha256` a hash of shape,
    values, labels and ids, `spec` the text that loads it again.
    """

    name: str
    x: Tensor
    y: Tensor
    ids: Tensor
    classes: tuple[str, ...]
    sha256: str
    spec: str

    def __len__(self) -> int:
        return self.x.shape[0]

    def take(self, n: int | None) -> Dataset:
        """Return the first `n` samples (all of them for None), with their own hash."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise InputError(f"limit {n}", "a data set of no samples cannot be evaluated", "ask for 1 or more")
        x, y, ids = self.x[:n], self.y[:n], self.ids[:n]
        return replace(self, x=x, y=y, ids=ids, sha256=content_hash(x, y, ids))


def same_samples(one: Dataset, other: Dataset) -> bool:
    """Tell whether two loaded splits begin with the very same samples, as those of a file without splits do."""
    n = min(len(one), len(other))
    return (
        one.x.shape[1:] == other.x.shape[1:]
        and torch.equal(one.ids[:n], other.ids[:n])
        and torch.equal(one.y[:n], other.y[:n])
        and torch.equal(one.x[:n], other.x[:n])
    )


@dataclass(frozen=True)
class DataInfo:
    """One line of `maodun list data`: how to spell it, what it is, and whether it can be read right now."""

    spec: str
    summary: str
    available: bool


def content_hash(x: Tensor, y: Tensor, ids: Tensor) -> str:
    """Return the SHA-256 of shape, pixels, labels and ids in hexadecimal."""
    digest = hashlib.sha256(repr(tuple(x.shape)).encode())
    for part in (x, y, ids):
        digest.update(part.contiguous().numpy().data)
    return digest.hexdigest()


def as_unit_range(values: np.ndarray[Any, Any], thing: str) -> Tensor:
    """Return `values` (N x ..., uint8, bool or float) as float32 in [0, 1], or refuse with the likely cause.

    uint8 is divided by 255. Floats must already lie in [0, 1]; rounding dust below 1e-5 is clipped.
    Errors: InputError for NaN, infinite, standardised, 0-255 or otherwise unreadable values.
    """
    if values.dtype == np.uint8:
        return torch.tensor(np.ascontiguousarray(values), dtype=torch.float32).div_(255)
    if values.dtype == np.bool_:
        return torch.from_numpy(values.astype(np.float32))
    if values.dtype.kind != "f":
        raise InputError(
            f"{thing}: pixels of type {values.dtype}",
            "only uint8 (0 to 255) and floating point (0 to 1) have an unambiguous scale",
            "store uint8, or divide by the largest possible value and store float32",
        )
    x = torch.tensor(np.ascontiguousarray(values, dtype=np.float32))
    check_range(x, thing)
    return x.clamp(0, 1)


def check_range(x: Tensor, thing: str) -> None:
    """Raise InputError unless every value of `x` is finite and in [0, 1] up to rounding; says what it looks like."""
    if x.numel() == 0:
        raise InputError(thing, "it holds no samples", "give at least one")
    if not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0, 0])
        raise InputError(thing, f"sample {bad} has NaN or infinite values", "repair or drop such samples")
    low, high = float(x.min()), float(x.max())
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:
        return
    span = f"values run from {low:.4g} to {high:.4g}"
    if low < -_ROUNDING and high <= 20:
        raise InputError(
            thing, f"{span}: they look standardised", "undo it (x * std + mean) and put the normalisation in the model"
        )
    if low >= -_ROUNDING and high <= 255 + _ROUNDING:
        raise InputError(thing, f"{span}: they look like 0-255", "divide by 255, or store them as uint8")
    raise InputError(thing, f"{span}, not 0 to 1", "scale them to [0, 1]")


def as_labels(values: np.ndarray[Any, Any] | Sequence[int], classes: int | None, thing: str) -> Tensor:
    """Return labels (N,) as int64 after checking that they are whole numbers in [0, classes).

    `classes` None skips the upper bound. Errors: InputError naming the first offending row.
    """
    array = np.asarray(values)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.dtype.kind not in "iufb":
        raise InputError(
            f"{thing}: labels of shape {array.shape} and type {array.dtype}",
            "one whole number per sample is needed",
            "give class numbers 0 .. classes-1",
        )
    bad = ~np.isfinite(array)
    whole = np.where(bad, -1, array).astype(np.int64)
    bad |= (whole != array) | (whole < 0)
    if classes is not None:
        bad |= whole >= classes
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        upper = "" if classes is None else f" .. {classes - 1}"
        raise InputError(
            f"{thing}: label {array[row]} of row {row}", f"labels must be whole numbers 0{upper}", "correct the labels"
        )
    return torch.from_numpy(whole)


def make_dataset(
    name: str,
    spec: str,
    pixels: np.ndarray[Any, Any],
    labels: np.ndarray[Any, Any] | Sequence[int],
    classes: Sequence[str] | None,
    ids: np.ndarray[Any, Any] | None = None,
) -> Dataset:
    """Check pixels and labels and return a Dataset; `classes` None means as many as the largest label asks for."""
    thing = f"data '{spec}'"
    x = as_unit_range(pixels, thing)
    y = as_labels(labels, None if classes is None else len(classes), thing)
    if x.shape[0] != y.shape[0]:
        raise InputError(thing, f"{x.shape[0]} samples but {y.shape[0]} labels", "give one label per sample")
    names = tuple(classes) if classes is not None else tuple(str(k) for k in range(int(y.max()) + 1))
    places = torch.arange(len(y)) if ids is None else torch.from_numpy(np.asarray(ids, dtype=np.int64).copy())
    return Dataset(name, x, y, places, names, content_hash(x, y, places), spec)
