"""Decoding pictures, and data sets that are folders of them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from maodun.core.errors import InputError
from maodun.zoo.data.base import Dataset, make_dataset

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
_GREY = ("1", "L")


def decode(source: bytes | Path, thing: str) -> np.ndarray[Any, Any]:
    """Return one picture as uint8: H x W for greyscale files, H x W x 3 for all others.

    Errors: InputError when the bytes are not a readable picture, naming it.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            if picture.mode.startswith(("I", "F")):
                # Pillow's conversion would cut all above 255 off, which leaves a white picture.
                raise InputError(thing, "it holds more than 8 bits per value", "save it with 8 bits")
            return np.asarray(picture.convert("L" if picture.mode in _GREY else "RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(thing, f"it is not a readable picture ({error})", "replace or remove the file") from error


def stack(pictures: Iterable[tuple[str, np.ndarray[Any, Any]]]) -> np.ndarray[Any, Any]:
    """Return named pictures as uint8 N x C x H x W; C is 1 only when every one is greyscale.

    Errors: InputError when the sizes differ, naming the first that does.
    """
    arrays: list[np.ndarray[Any, Any]] = []
    for name, picture in pictures:
        if arrays and picture.shape[:2] != arrays[0].shape[:2]:
            raise InputError(
                name,
                f"it is {picture.shape[0]} x {picture.shape[1]}, the first picture {arrays[0].shape[0]} x "
                f"{arrays[0].shape[1]}",
                "resize all pictures to one size",
            )
        arrays.append(picture)
    if all(picture.ndim == 2 for picture in arrays):
        return np.stack(arrays)[:, None]
    coloured = [p if p.ndim == 3 else np.repeat(p[:, :, None], 3, axis=2) for p in arrays]
    return np.stack(coloured).transpose(0, 3, 1, 2)


def load_folder(directory: str, spec: str, split: str, limit: int | None) -> Dataset:
    """Read DIR/class/picture (or DIR/split/class/picture); classes are the sorted names of the sub-folders.

    Ids number the files sorted by class and name; the order of the samples is that of a hash of the path, so that the
    first `limit` are a mixture of classes. Errors: InputError for a missing or empty folder and for corrupt pictures.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise InputError(f"folder '{directory}'", "it does not exist", "give a folder with one sub-folder per class")
    if (root / split).is_dir():
        root = root / split
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    files = [
        (label, path)
        for label, name in enumerate(classes)
        for path in sorted((root / name).rglob("*"))
        if path.suffix.lower() in SUFFIXES
    ]
    if not files:
        raise InputError(
            f"folder '{root}'",
            "no pictures in sub-folders were found",
            f"put the files at {root.name}/<class>/<name>.png (also {', '.join(SUFFIXES[1:5])})",
        )
    keys = [hashlib.blake2b(path.relative_to(root).as_posix().encode()).digest() for _, path in files]
    order = sorted(range(len(files)), key=keys.__getitem__)[:limit]
    pixels = stack((str(files[k][1]), decode(files[k][1], f"picture '{files[k][1]}'")) for k in order)
    labels = [files[k][0] for k in order]
    return make_dataset(root.name, spec, pixels, labels, classes, np.asarray(order))
