"""Pre-activation residual networks (He et al., "Identity mappings in deep residual networks", 2016)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from maodun.zoo.architectures.normalise import CIFAR10_MEAN, CIFAR10_STD, normaliser

ShortcutFrom = Literal["input", "activated"]


class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU, added to a shortcut.

    The 1x1 shortcut exists only where the shape changes. `shortcut_from` says what it sees: the raw block input
    (the weights published through RobustBench) or the activated one (He et al.).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut_from: ShortcutFrom) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.from_activated = shortcut_from == "activated"
        self.reshapes = stride != 1 or inputs != outputs
        if self.reshapes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output: N x outputs x H / stride x W / stride."""
        active = F.relu(self.bn1(x))
        kept: Tensor = x
        if self.reshapes:
            kept = self.shortcut(active if self.from_activated else x)
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + kept


class PreActResNet(nn.Module):
    """A pre-activation residual network with one stage per entry of `widths` and of `blocks`.

    Takes N x channels x H x W in [0, 1], returns N x num_classes logits; every stage after the first halves H and W,
    and the last feature map is averaged whatever its size. `mean` and `std` normalise inside the model (default: none).
    `last_norm` adds the batch norm and ReLU that He et al. put before the linear layer. State-dict names are those of
    the networks distributed through RobustBench.
    """

    def __init__(
        self,
        blocks: tuple[int, ...] = (2, 2, 2, 2),
        widths: tuple[int, ...] = (64, 128, 256, 512),
        *,
        num_classes: int = 10,
        channels: int = 3,
        last_norm: bool = False,
        shortcut_from: ShortcutFrom = "input",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        super().__init__()
        self.normalise = normaliser(mean, std)
        self.conv1 = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        before = widths[0]
        for number, (name, count, width) in enumerate(zip(self.stages, blocks, widths, strict=True)):
            strides = [1 if number == 0 else 2] + [1] * (count - 1)
            stage = []
            for stride in strides:
                stage.append(PreActBlock(before, width, stride, shortcut_from))
                before = width
            self.add_module(name, nn.Sequential(*stage))
        self.bn = nn.BatchNorm2d(before) if last_norm else None
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x C x H x W images."""
        out: Tensor = self.conv1(self.normalise(x))
        for name in self.stages:
            out = self.get_submodule(name)(out)
        if self.bn is not None:
            out = F.relu(self.bn(out))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits


def preact_resnet18(
    num_classes: int = 10,
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    last_norm: bool = False,
    shortcut_from: ShortcutFrom = "input",
) -> PreActResNet:
    """Return PreActResNet-18 (11.2 M parameters) as RobustBench names and wires it; [0, 1] inputs, logits out."""
    return PreActResNet(num_classes=num_classes, mean=mean, std=std, last_norm=last_norm, shortcut_from=shortcut_from)


def small_preact_resnet(
    blocks: tuple[int, ...] = (1, 1, 1),
    *,
    num_classes: int = 10,
    channels: int = 3,
    widths: tuple[int, ...] = (16, 32, 64),
    mean: tuple[float, ...] | None = CIFAR10_MEAN,
    std: tuple[float, ...] | None = CIFAR10_STD,
) -> PreActResNet:
    """Return a three-stage pre-activation ResNet for 32 x 32 images, CIFAR-10 normalisation inside.

    `blocks` (1, 1, 1) is ResNet-8 with 77,850 parameters, (3, 3, 3) is ResNet-20.
    """
    return PreActResNet(
        tuple(blocks),
        tuple(widths),
        num_classes=num_classes,
        channels=channels,
        last_norm=True,
        shortcut_from="activated",
        mean=mean,
        std=std,
    )
