"""Random changes of training pictures, each a pure function of (seed, sample, epoch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
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


@dataclass(frozen=True)
class CutMix:
    """Paste a box of another training picture into a share of the pictures, and mix the labels by area.

    `classes` K of the labels; each picture is mixed with probability `share` in [0, 1]; both pictures are changed by
    `pictures` first. The box covers 1 - lambda of the picture, lambda uniform in [0, 1], at a uniform centre and cut at
    the borders; the label's share is the area that is left. The partner is drawn from the whole training set, so a
    picture meets the same one whatever its batch. InputError for a share outside [0, 1].
    Source: Yun et al., "CutMix", ICCV 2019 (alpha = 1); for robustness Rebuffi et al., NeurIPS 2021.
    """

    classes: int
    share: float = 1.0
    pictures: NoAugmentation | ShiftFlip = NoAugmentation()

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InputError(f"cutmix {self.share}", "is a probability", "give a number in [0, 1]")

    def mix(self, x: Tensor, y: Tensor, rows: Tensor, epoch: int, seed: int) -> tuple[Tensor, Tensor]:
        """Return the mixed pictures of `rows` (N,) of the training set `x`, `y`, and their label shares N x classes."""
        height, width = x.shape[-2:]
        partner = Stream(seed, "train/cutmix/partner").integers(rows, (1,), x.shape[0], epoch)[:, 0]
        own, other = self.pictures(x[rows], rows, epoch, seed), self.pictures(x[partner], partner, epoch, seed)
        draws = Stream(seed, "train/cutmix").uniform(rows, (4,), epoch)
        # lambda is 1 - draws[:, 0], also uniform; the box's sides are the root of what it covers.
        sides = draws[:, 0].sqrt() * (draws[:, 3] < self.share)
        box = _within(draws[:, 1], sides, height).unsqueeze(2) & _within(draws[:, 2], sides, width).unsqueeze(1)
        kept = 1.0 - box.flatten(1).float().mean(1, keepdim=True)
        mixed = kept * F.one_hot(y[rows], self.classes) + (1.0 - kept) * F.one_hot(y[partner], self.classes)
        return torch.where(box.unsqueeze(1), other, own), mixed


def _within(centre: Tensor, side: Tensor, length: int) -> Tensor:
    """Return N x length: which pixels of a line lie in an interval; centre and side (N,) in parts of the line."""
    place = (torch.arange(length) + 0.5) / length
    return (place - centre.unsqueeze(1)).abs() < side.unsqueeze(1) / 2
