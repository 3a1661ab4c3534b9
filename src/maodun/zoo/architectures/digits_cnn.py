"""The small convolutional network that the bundled digits are fought over with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Three 3x3 convolutions, 2x2 mean pooling and a linear layer: 15,338 parameters, no batch norm.

    Takes N x 1 x 8 x 8 in [0, 1] (any even size of at least 4 works), returns N x classes logits. The hidden sizes are
    small on purpose: all shipped weights together stay under a megabyte.
    """

    def __init__(self, num_classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.conv3 = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.linear = nn.Linear(2 * width * 4, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x 1 x H x W images."""
        out = F.relu(self.conv1(x - 0.5))
        out = F.relu(self.conv2(out))
        out = F.relu(self.conv3(out))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 2).flatten(1))
        return logits
