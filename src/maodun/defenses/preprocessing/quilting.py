"""Image quilting: every image is put together anew from patches of clean ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.preprocessing.base import Defense, DefenseSpec


class Quilting(Defense):
    """Replace every patch of an image by the nearest one of a bank of clean patches, and cut the seams where they fit.

    Patches of `side` pixels (default 5) overlap by `overlap` (default 2); seams run where the difference in the overlap
    is least (Efros and Freeman, 2001). The bank holds up to `size` patches (default 5000) drawn, always the same ones,
    from `source`: a .npz file with `x` or a .npy file, N x C x H x W in [0, 1], or a data specification such as
    "digits", whose training split the arena hands to `learn`. Deterministic; the nearest patch has no derivative, the
    BPDA partner is the identity. InputError without a bank, and for images of other channels or smaller than a patch.

    Source: Guo et al., "Countering adversarial images using input transformations", ICLR 2018, who draw among the ten
    nearest of a million patches; here the nearest is taken.
    """

    name = "quilting"
    spec = DefenseSpec(differentiable=False)
    bank: Tensor

    def __init__(self, source: str = "", side: int = 5, overlap: int = 2, size: int = 5000) -> None:
        super().__init__()
        if side < 2 or not 1 <= overlap < side:
            raise InputError(f"side {side}, overlap {overlap}", "patches overlap by less than a side", "use 5 and 2")
        if size < 1:
            raise InputError(f"size {size}", "the bank must hold a patch", "use for example 5000")
        self.source, self.side, self.overlap, self.size = source, side, overlap, size
        self.register_buffer("bank", torch.zeros(0, 0), persistent=False)
        if Path(source).suffix in (".npz", ".npy"):
            self.learn(_read(source))

    def learn(self, x: Tensor) -> None:
        """Fill the bank from clean images, N x C x H x W in [0, 1]."""
        self.need_images(x)
        if min(x.shape[2:]) < self.side:
            reason = f"a patch of {self.side} pixels does not fit into images of {x.shape[2]} x {x.shape[3]}"
            raise InputError(f"defence '{self.name}'", reason, "give a smaller side")
        each = (x.shape[2] - self.side + 1) * (x.shape[3] - self.side + 1)
        every = x.shape[0] * each
        stream = Stream(0, "quilting/bank")
        chosen = torch.unique(stream.integers(torch.arange(min(self.size, every)), (), every))
        rows, place = chosen // each, chosen % each
        wide = x.shape[3] - self.side + 1
        patches = x.unfold(2, self.side, 1).unfold(3, self.side, 1)
        self.bank = patches[rows, :, place // wide, place % wide].flatten(1).to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return the quilted images."""
        self._check(x)
        with torch.no_grad():
            tops, lefts = (_places(length, self.side, self.side - self.overlap) for length in x.shape[2:])
            found = self._nearest(x, tops, lefts)
            quilt = torch.zeros_like(x)
            for row, top in enumerate(tops):
                for column, left in enumerate(lefts):
                    patch = found[row][column]
                    # What lies under the patch already: pixels above the last row's end, left of the last column's.
                    above = 0 if row == 0 else tops[row - 1] + self.side - top
                    before = 0 if column == 0 else lefts[column - 1] + self.side - left
                    window = quilt[..., top : top + self.side, left : left + self.side]
                    keep = self._new(patch, window, above, before)
                    window.copy_(torch.where(keep, patch, window))
        return quilt

    def _check(self, x: Tensor) -> None:
        self.need_images(x)
        thing = f"defence '{self.name}'"
        if not self.bank.numel():
            reason = "it has no patches of clean images"
            raise InputError(thing, reason, "give source=FILE.npz or a data specification such as source=digits")
        if self.bank.shape[1] != x.shape[1] * self.side**2:
            reason = f"its patches do not have the {x.shape[1]} channels of these images"
            raise InputError(thing, reason, "take patches from images of the same kind")
        if min(x.shape[2:]) < self.side:
            reason = f"a patch of {self.side} pixels does not fit into {x.shape[2]} x {x.shape[3]}"
            raise InputError(thing, reason, "give a smaller side")

    def _nearest(self, x: Tensor, tops: list[int], lefts: list[int]) -> list[list[Tensor]]:
        """Return the nearest patch of the bank for every place of the grid, each N x C x side x side."""
        half = 0.5 * self.bank.pow(2).sum(1)
        rows = []
        for top in tops:
            row = []
            for left in lefts:
                own = x[..., top : top + self.side, left : left + self.side].flatten(1).to(self.bank.dtype)
                # |p - b|^2 without the term that is the same for every b.
                best = (half - own @ self.bank.T).argmin(1)
                row.append(self.bank[best].reshape(-1, x.shape[1], self.side, self.side).to(x.dtype))
            rows.append(row)
        return rows

    def _new(self, patch: Tensor, window: Tensor, above: int, before: int) -> Tensor:
        """Return booleans (N x 1 x side x side): here the new patch is laid over what is there."""
        keep = torch.ones_like(patch[:, :1], dtype=torch.bool)
        if before:
            cost = ((patch - window)[..., :before] ** 2).sum(1)
            keep[..., :before] &= _beyond(cost).unsqueeze(1)
        if above:
            cost = ((patch - window)[:, :, :above] ** 2).sum(1).transpose(1, 2)
            keep[:, :, :above] &= _beyond(cost).transpose(1, 2).unsqueeze(1)
        return keep

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"source={self.source}, side={self.side}, overlap={self.overlap}, size={self.size}"


def _beyond(cost: Tensor) -> Tensor:
    """Return booleans like `cost` (N x length x width): at or right of the cheapest connected seam from top to bottom.

    Dynamic programming over the rows; the seam moves by at most one column per row.
    """
    length, width = cost.shape[1:]
    totals, steps = [cost[:, 0]], []
    for row in range(1, length):
        wide = F.pad(totals[-1], (1, 1), value=torch.inf)
        least, step = torch.stack([wide[:, :-2], wide[:, 1:-1], wide[:, 2:]], dim=2).min(2)
        totals.append(least + cost[:, row])
        steps.append(step - 1)
    seam = totals[-1].argmin(1)
    places = [seam]
    for step in reversed(steps):
        seam = seam + step.gather(1, seam.unsqueeze(1)).squeeze(1)
        places.append(seam)
    path = torch.stack(places[::-1], dim=1)
    return torch.arange(width, device=cost.device) >= path.unsqueeze(2)


def _places(length: int, side: int, stride: int) -> list[int]:
    """Return where patches begin: every `stride` pixels, the last one flush with the border."""
    starts = list(range(0, length - side + 1, stride))
    return starts if starts[-1] == length - side else [*starts, length - side]


def _read(path: str) -> Tensor:
    thing = f"source '{path}'"
    try:
        loaded = np.load(path, allow_pickle=False)
        array = loaded if isinstance(loaded, np.ndarray) else loaded["x"]
    except (OSError, ValueError, KeyError) as error:
        reason = f"cannot be read ({str(error).splitlines()[0]})"
        raise InputError(thing, reason, "give a .npz with x, or a .npy, N x C x H x W") from error
    if array.ndim != 4:
        raise InputError(thing, f"holds an array of shape {array.shape}", "give images N x C x H x W in [0, 1]")
    return torch.from_numpy(array).to(torch.float32)
