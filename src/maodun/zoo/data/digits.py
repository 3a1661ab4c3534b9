"""The handwritten digits that scikit-learn carries: 1,797 real 8 x 8 pictures, no download."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from maodun.core.errors import InputError
from maodun.zoo.data.base import Dataset, make_dataset

TEST_SIZE = 1000


def load_digits(spec: str, split: str, limit: int | None) -> Dataset:
    """Return one side of the fixed stratified split, 797 train and 1,000 test pictures (N x 1 x 8 x 8).

    Within each class the pictures are ordered by a hash of their pixels and index, and the test side takes the same
    share of every class (largest remainders), so the split depends on no random generator and no library version.
    Ids are positions in scikit-learn's own order.
    """
    if split not in ("train", "test"):
        raise InputError(f"split '{split}'", "digits has two", "use train or test")
    try:
        from sklearn.datasets import load_digits as bundled
    except ImportError as error:
        raise InputError("data 'digits'", "scikit-learn is not installed", "pip install 'maodun[data]'") from error
    source = bundled()
    images = source.images.astype(np.uint8)
    keys = [
        hashlib.sha256(index.to_bytes(4, "little") + image.tobytes()).digest() for index, image in enumerate(images)
    ]
    order = sorted(range(len(images)), key=keys.__getitem__)
    quota = _quota(np.bincount(source.target))
    chosen = []
    for index in order:
        label = int(source.target[index])
        if (quota[label] > 0) == (split == "test"):
            chosen.append(index)
        quota[label] -= 1
    chosen = chosen[:limit]
    pixels = (images[chosen][:, None] / 16.0).astype(np.float32)
    labels = source.target[chosen]
    return make_dataset("digits", spec, pixels, labels, [str(k) for k in range(10)], np.asarray(chosen))


def _quota(counts: np.ndarray[Any, Any]) -> list[int]:
    """Return how many of each class go to the test side: TEST_SIZE in proportion, by largest remainders."""
    share = counts * TEST_SIZE / counts.sum()
    quota = np.floor(share).astype(int)
    for label in np.argsort(quota - share, kind="stable")[: TEST_SIZE - quota.sum()]:
        quota[label] += 1
    return [int(value) for value in quota]
