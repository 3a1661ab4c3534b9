"""A residual encoder without labels: 32 x 32 windows to codes, eight pixels apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a way around them: N x before x H x W to N x after x H/stride."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        self.around = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rectified sum of both ways."""
        return F.relu(self.body(x) + self.around(x))


def residual_encoder(width: int, channels: tuple[int, int, int, int] = (16, 24, 48, 96)) -> nn.Sequential:
    """Return a network from N x 3 x H x W to N x width x h x w codes of windows, not yet of length one."""
    stem, first, second, third = channels
    # Two halvings: a window of 32 pixels is 8 places, and one 8 pixels further on begins 2 places later.
    return nn.Sequential(
        nn.Conv2d(3, stem, 3, 1, 1), Block(stem, first, 1), Block(first, second, 2), Block(second, third, 2),
        nn.AvgPool2d(8, 2), nn.Conv2d(third, third, 1), nn.ReLU(), nn.Conv2d(third, width, 1),
    )  # fmt: skip


@torch.no_grad()
def calibrate(encoder: nn.Module, x: Tensor) -> None:
    """Let every batch norm of `encoder` hold the statistics of the images `x`, so that untrained weights are usable."""
    norms = [each for each in encoder.modules() if isinstance(each, nn.BatchNorm2d)]
    kept = [each.momentum for each in norms]
    for each in norms:
        each.reset_running_stats()
        each.momentum = None
    encoder.train()
    for part in torch.split(x, 128):
        encoder(part)
    encoder.eval()
    for each, momentum in zip(norms, kept, strict=True):
        each.momentum = momentum
