"""MNIST and its relatives in the idx format of the original files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from maodun.core.errors import InputError
from maodun.zoo.data.base import Dataset, make_dataset

_PREFIX = {"test": "t10k", "train": "train"}


def read_idx(path: Path, limit: int | None = None) -> np.ndarray[Any, Any]:
    """Return the uint8 array of an idx file (two zero bytes, type 8, rank, big-endian sizes, then the values).

    `limit` reads only that many entries of the first axis. Errors: InputError for anything else, or a short file.
    """
    thing = f"idx file '{path}'"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:3] != b"\x00\x00\x08":
                raise InputError(thing, "it does not begin as an idx file of bytes", "check the file")
            sizes = np.frombuffer(file.read(4 * head[3]), ">u4").tolist()
            if limit is not None:
                sizes[0] = min(sizes[0], limit)
            values = np.frombuffer(file.read(math.prod(sizes)), np.uint8)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(thing, f"it cannot be read ({error})", "check the path and the file") from error
    if values.size != math.prod(sizes):
        raise InputError(thing, "it ends before its last value", "fetch it again")
    return values.reshape(sizes)


def load_mnist(directory: Path, spec: str, split: str, limit: int | None) -> Dataset:
    """Read {t10k,train}-{images-idx3,labels-idx1}-ubyte[.gz] of `directory`; x is N x 1 x 28 x 28."""
    if split not in _PREFIX:
        raise InputError(f"split '{split}'", "MNIST has two", "use train or test")
    parts = []
    for kind in ("images-idx3", "labels-idx1"):
        plain = directory / f"{_PREFIX[split]}-{kind}-ubyte"
        packed = plain.with_name(plain.name + ".gz")
        if not plain.exists() and not packed.exists():
            raise InputError(f"data '{spec}'", f"'{packed}' does not exist", "give the folder of the MNIST files")
        parts.append(read_idx(plain if plain.exists() else packed, limit))
    return make_dataset("mnist", spec, parts[0][:, None], parts[1], [str(digit) for digit in range(10)])
