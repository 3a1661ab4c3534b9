"""Wide residual networks (Zagoruyko and Komodakis, 2016), with the state-dict names RobustBench uses."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.zoo.architectures.normalise import normaliser


class WideBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; where the width changes the shortcut is a 1x1 convolution
    of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        active = F.relu(self.bn1(x))
        kept: Tensor = x if self.convShortcut is None else self.convShortcut(active)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + kept


class WideStage(nn.Module):
    """A run of wide blocks, kept under the name `layer` because published weights spell it that way."""

    def __init__(self, count: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(
            *(WideBlock(inputs if k == 0 else outputs, outputs, stride if k == 0 else 1) for k in range(count))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the stage's output."""
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """A wide residual network of `depth` = 6 n + 4 layers and widening factor `widen`.

    Takes N x 3 x H x W in [0, 1], returns N x num_classes logits. `mean` and `std` normalise inside the model (default
    none). `duplicate_first_stage` adds the unused second copy of the first stage that some published checkpoints hold.
    """

    def __init__(
        self,
        depth: int = 28,
        widen: int = 10,
        *,
        num_classes: int = 10,
        duplicate_first_stage: bool = False,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise InputError(f"depth {depth}", "a wide ResNet has 6 n + 4 layers", "use 10, 16, 22, 28, 34 or 70")
        count = (depth - 4) // 6
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.normalise = normaliser(mean, std)
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.block1 = WideStage(count, widths[0], widths[1], 1)
        if duplicate_first_stage:
            self.sub_block1 = WideStage(count, widths[0], widths[1], 1)
        self.block2 = WideStage(count, widths[1], widths[2], 2)
        self.block3 = WideStage(count, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x 3 x H x W images."""
        out = self.block3(self.block2(self.block1(self.conv1(self.normalise(x)))))
        out = F.relu(self.bn1(out))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
