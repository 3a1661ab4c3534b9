"""Real images with the ground truth of every task, read from the folder that MAODUN_DATA points at."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maodun.core.errors import InputError

IGNORE = 11
"""The CamVid class that no metric counts."""
CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
NO_BOX = -1.0


@dataclass(frozen=True)
class Labelled:
    """Images and what is true of them.

    `x` uint8 N x 3 x H x W; `truth` int64 (N,) classes, int64 N x H x W class maps, or float32 N x K x 4 boxes
    [x0, y0, x1, y1] in pixels, absent ones filled with -1. Row order is that of the file.
    """

    name: str
    x: Tensor
    truth: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def images(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return rows as float32 in [0, 1]."""
        return self.x[rows].float() / 255.0

    def take(self, n: int | None) -> Labelled:
        """Return `n` images spread evenly over the set (all for None): neighbouring frames resemble each other."""
        if n is None or n >= len(self):
            return self
        if n < 1:
            raise InputError(f"limit {n}", "a set of no images measures nothing", "ask for 1 or more")
        rows = (torch.arange(n, dtype=torch.float64) * len(self) / n).long()
        return replace(self, x=self.x[rows], truth=self.truth[rows])


def load_camvid(split: str = "test", limit: int | None = None) -> Labelled:
    """Return CamVid street scenes, 120 x 160, with class maps (0..10, 11 unlabelled); `split` train, val or test.

    Source: Brostow et al. (2009), the split of SegNet. InputError when the files are not there.
    """
    kept = _spread(_rows(f"camvid_160x120/{split}.parquet", ["image", "mask"]), limit)
    x = [_picture(row["image"], "RGB") for row in kept]
    masks = [_picture(row["mask"], "L") for row in kept]
    return Labelled("camvid", _stack(x), torch.from_numpy(np.stack(masks)).long())


def load_penn_fudan(split: str = "test", limit: int | None = None, size: tuple[int, int] = (120, 160)) -> Labelled:
    """Return Penn-Fudan pedestrians resized to `size` (height, width) with their boxes in pixels.

    The set has no official split: every third image is test (57), the others train (113).
    Source: Wang et al. (ACCV 2007). InputError for another split or when the file is not there.
    """
    if split not in ("train", "test"):
        raise InputError(f"split '{split}'", "penn_fudan has none of that name", "use train or test")
    rows = _rows("penn_fudan_half/all.parquet", ["image", "boxes"])
    kept = _spread([row for k, row in enumerate(rows) if (k % 3 == 0) == (split == "test")], limit)
    most = max(len(row["boxes"]) for row in kept)
    boxes = np.full((len(kept), most, 4), NO_BOX, np.float32)
    pictures = []
    for k, row in enumerate(kept):
        picture = _image(row["image"], "RGB")
        factor = np.asarray([size[1] / picture.width, size[0] / picture.height] * 2, np.float32)
        boxes[k, : len(row["boxes"])] = np.asarray(row["boxes"], np.float32) * factor
        pictures.append(np.asarray(picture.resize((size[1], size[0]), 2)))
    return Labelled("penn_fudan", _stack(pictures), torch.from_numpy(boxes))


def load_cifar10(split: str = "test", limit: int | None = None) -> Labelled:
    """Return CIFAR-10, 32 x 32, with its classes; of `train` the first fifth, in the original order."""
    name = "test-00000-of-00001" if split == "test" else f"{split}-00000-of-00005"
    kept = _spread(_rows(f"cifar10/{name}.parquet", ["img", "label"]), limit)
    return Labelled(
        "cifar10", _stack([_picture(row["img"], "RGB") for row in kept]), torch.tensor([row["label"] for row in kept])
    )


DATA = {"camvid": load_camvid, "penn_fudan": load_penn_fudan, "cifar10": load_cifar10}


def _rows(name: str, columns: list[str]) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = os.environ.get("MAODUN_DATA")
    if not place:
        raise InputError("MAODUN_DATA", "is not set", "export MAODUN_DATA=/path/of/the/data")
    path = Path(place).expanduser() / name
    try:
        rows: list[dict[str, Any]] = pq.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"data '{path}'", f"it cannot be read ({error})", "put the file there") from error
    return rows


def _spread(rows: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    if limit is None or limit >= len(rows):
        return rows
    if limit < 1:
        raise InputError(f"limit {limit}", "a set of no images measures nothing", "ask for 1 or more")
    return [rows[k * len(rows) // limit] for k in range(limit)]


def _image(content: dict[str, Any], mode: str) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(content["bytes"])).convert(mode)


def _picture(content: dict[str, Any], mode: str) -> np.ndarray[Any, Any]:
    return np.asarray(_image(content, mode))


def _stack(pictures: list[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def batches(n: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows of one epoch in random order, `size` at a time; a last single row is left out."""
    for rows in torch.split(torch.randperm(n, generator=generator), size):
        if rows.shape[0] > 1:
            yield rows
