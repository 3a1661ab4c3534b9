"""Random changes of training pictures, each a pure function of (seed, sample, epoch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.streams import Stream


@dataclass(frozen=True)
class NoAugmentation:
    """Leave the inputs as they are."""

    def __call__(self, x: Tensor, rows: Tensor, epoch: int, seed: int) -> Tensor:  # noqa: ARG002 - the others need it
        """Return `x`."""
        return x


@dataclass(frozen=True)
class ShiftFlip:
    """Move each picture by up to `pixels` in both directions (zeros come in) and, with `flip`, mirror half of them."""

    pixels: int = 4
    flip: bool = False

    def __call__(self, x: Tensor, rows: Tensor, epoch: int, seed: int) -> Tensor:
        """Return the changed pictures, N x C x H x W; `rows` (N,) and `epoch` key the draws."""
        height, width = x.shape[-2:]
        draws = Stream(seed, "train/shift").integers(rows, (2,), 2 * self.pixels + 1, epoch)
        padded = F.pad(x, (self.pixels,) * 4)
        samples = torch.arange(x.shape[0]).view(-1, 1, 1)
        tops = draws[:, 0].view(-1, 1, 1) + torch.arange(height).view(1, -1, 1)
        columns = torch.arange(width).view(1, 1, -1).expand(x.shape[0], 1, width)
        if self.flip:
            mirrored = Stream(seed, "train/flip").integers(rows, (1,), 2, epoch).view(-1, 1, 1).bool()
            columns = torch.where(mirrored, width - 1 - columns, columns)
        lefts = draws[:, 1].view(-1, 1, 1) + columns
        return padded.permute(0, 2, 3, 1)[samples, tops, lefts].permute(0, 3, 1, 2).contiguous()
