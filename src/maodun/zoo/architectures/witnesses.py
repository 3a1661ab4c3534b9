"""Networks that other people trained and published, rebuilt so that their weights can be read as they are."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from maodun.zoo.architectures.normalise import CIFAR10_MEAN, CIFAR10_STD, IMAGENET_MEAN, IMAGENET_STD, Normalise


class TradesMnistCNN(nn.Module):
    """The MNIST network of TRADES (Zhang et al., 2019): four unpadded convolutions, three linear layers.

    Takes N x 1 x 28 x 28 in [0, 1] without further normalisation, returns N x 10 logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(1024, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, 10),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x 1 x 28 x 28 images."""
        logits: Tensor = self.classifier(self.feature_extractor(x).flatten(1))
        return logits


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with biases and no batch norm, added to a 1x1 shortcut where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        reshapes = stride != 1 or inputs != outputs
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride)) if reshapes else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.conv2(F.relu(self.conv1(x)))
        return F.relu(out + self.shortcut(x))


class ResNet4b(nn.Module):
    """The batch-norm-free CIFAR-10 residual network "resnet4b" of the verification benchmarks, 0.12 M parameters.

    Takes N x 3 x 32 x 32 in [0, 1] and normalises inside, returns N x 10 logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise(CIFAR10_MEAN, CIFAR10_STD)
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.layer1 = nn.Sequential(PlainBlock(16, 32, 2), PlainBlock(32, 32, 1))
        self.layer2 = nn.Sequential(PlainBlock(32, 32, 2), PlainBlock(32, 32, 1))
        self.linear1 = nn.Linear(512, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x 3 x 32 x 32 images."""
        out = F.relu(self.conv1(self.normalise(x)))
        out = self.layer2(self.layer1(out)).flatten(1)
        logits: Tensor = self.linear2(F.relu(self.linear1(out)))
        return logits


class OptionABlock(nn.Module):
    """A post-activation block whose shortcut has no weights: every second pixel, new channels filled with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.extra = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(out + x)


class ResNetOptionA(nn.Module):
    """The CIFAR-10 ResNet of 6 n + 2 layers with parameter-free shortcuts (He et al., 2015, option A).

    `blocks` is n (9 gives ResNet-56, 0.86 M parameters). Takes N x 3 x 32 x 32 in [0, 1] and normalises inside with the
    ImageNet constants its published weights expect; returns N x 10 logits.
    """

    def __init__(self, blocks: int = 9, num_classes: int = 10) -> None:
        super().__init__()
        self.normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(blocks, 16, 16, 1)
        self.layer2 = self._stage(blocks, 16, 32, 2)
        self.layer3 = self._stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(count: int, inputs: int, outputs: int, stride: int) -> nn.Sequential:
        first = OptionABlock(inputs, outputs, stride)
        return nn.Sequential(first, *(OptionABlock(outputs, outputs, 1) for _ in range(count - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x 3 x 32 x 32 images."""
        out = F.relu(self.bn1(self.conv1(self.normalise(x))))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))
        return logits
