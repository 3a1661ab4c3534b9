"""Six small CIFAR-10 networks of six families, made to be unlike each other: what transfers must cross a family.

Every one takes N x channels x H x W in [0, 1] (32 x 32 unless said otherwise), normalises inside and returns
N x num_classes logits. They are reductions of the published designs to about a minute of one core per epoch, not
copies of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.zoo.architectures.normalise import CIFAR10_MEAN, CIFAR10_STD, normaliser

Constants = tuple[float, ...] | None


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Return convolution, batch norm and ReLU; the size is kept, or divided by `stride`."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class _Pooled(nn.Module):
    """Normalisation, features, the mean over positions, a linear layer."""

    def __init__(self, features: nn.Module, width: int, num_classes: int, mean: Constants, std: Constants) -> None:
        super().__init__()
        self.normalise = normaliser(mean, std)
        self.features = features
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x C x H x W images."""
        maps = self.features(self.normalise(x))
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(maps, 1).flatten(1))
        return logits


class VGG(_Pooled):
    """Plain 3x3 convolutions with max pooling between (Simonyan and Zisserman, 2015), batch norm added."""

    def __init__(
        self,
        widths: tuple[int, ...] = (24, 48, 64, 96),
        *,
        num_classes: int = 10,
        channels: int = 3,
        mean: Constants = CIFAR10_MEAN,
        std: Constants = CIFAR10_STD,
    ) -> None:
        first, second, third, last = widths
        features = nn.Sequential(
            _conv(channels, first, 3),
            nn.MaxPool2d(2),
            _conv(first, second, 3),
            nn.MaxPool2d(2),
            _conv(second, third, 3),
            _conv(third, last, 3),
            nn.MaxPool2d(2),
        )
        super().__init__(features, last, num_classes, mean, std)


class InvertedResidual(nn.Module):
    """Widen by 1x1, filter each channel by 3x3, narrow by 1x1 without activation; a shortcut where shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = inputs * expand
        self.body = nn.Sequential(
            _conv(inputs, wide, 1),
            _conv(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output."""
        out: Tensor = self.body(x)
        return x + out if self.residual else out


class MobileNet(_Pooled):
    """Inverted residuals with linear bottlenecks (MobileNetV2, Sandler et al., 2018); the stem halves the picture."""

    def __init__(
        self,
        widths: tuple[int, ...] = (16, 24, 40),
        *,
        expand: int = 4,
        num_classes: int = 10,
        channels: int = 3,
        mean: Constants = CIFAR10_MEAN,
        std: Constants = CIFAR10_STD,
    ) -> None:
        first, second, third = widths
        features = nn.Sequential(
            _conv(channels, first, 3, 2),
            InvertedResidual(first, first, 1, expand),
            InvertedResidual(first, second, 2, expand),
            InvertedResidual(second, second, 1, expand),
            InvertedResidual(second, third, 1, expand),
            InvertedResidual(third, third, 1, expand),
            _conv(third, 4 * third, 1),
        )
        super().__init__(features, 4 * third, num_classes, mean, std)


class DenseLayer(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution whose `growth` new maps are appended to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return N x (inputs + growth) x H x W."""
        return torch.cat((x, self.conv(F.relu(self.norm(x)))), 1)


class DenseNet(_Pooled):
    """Every layer sees all before it (Huang et al., 2017); three blocks, the stem halves the picture."""

    def __init__(
        self,
        layers: int = 3,
        growth: int = 16,
        *,
        num_classes: int = 10,
        channels: int = 3,
        mean: Constants = CIFAR10_MEAN,
        std: Constants = CIFAR10_STD,
    ) -> None:
        width = 2 * growth
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)]
        for block in range(3):
            for _ in range(layers):
                parts.append(DenseLayer(width, growth))
                width += growth
            parts += [nn.BatchNorm2d(width), nn.ReLU()]
            if block < 2:
                parts += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
        super().__init__(nn.Sequential(*parts), width, num_classes, mean, std)


class Residual(nn.Module):
    """A module added to its input."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """Return x + body(x)."""
        out: Tensor = self.body(x)
        return x + out


class ConvMixer(_Pooled):
    """Patches, then wide depthwise filters that mix places and 1x1 ones that mix channels (Trockman and Kolter, 2022).

    One resolution throughout: H / patch x W / patch. ReLU stands where the paper has GELU: it is far cheaper on a CPU.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 3,
        *,
        kernel: int = 5,
        patch: int = 2,
        num_classes: int = 10,
        channels: int = 3,
        mean: Constants = CIFAR10_MEAN,
        std: Constants = CIFAR10_STD,
    ) -> None:
        def mixed(inputs: int, size: int, stride: int, groups: int) -> nn.Sequential:
            padding = 0 if stride > 1 else size // 2
            layer = nn.Conv2d(inputs, width, size, stride=stride, padding=padding, groups=groups)
            return nn.Sequential(layer, nn.ReLU(), nn.BatchNorm2d(width))

        parts: list[nn.Module] = [mixed(channels, patch, patch, 1)]
        for _ in range(depth):
            parts += [Residual(mixed(width, kernel, 1, width)), mixed(width, 1, 1, 1)]
        super().__init__(nn.Sequential(*parts), width, num_classes, mean, std)


class Branches(nn.Module):
    """Parallel 1x1, 3x3, double 3x3 and pooled paths, `width` maps each, side by side in the output."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        narrow = width // 2
        self.paths = nn.ModuleList(
            [
                _conv(inputs, width, 1),
                nn.Sequential(_conv(inputs, narrow, 1), _conv(narrow, width, 3)),
                nn.Sequential(_conv(inputs, narrow, 1), _conv(narrow, width, 3), _conv(width, width, 3)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(inputs, width, 1)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return N x 4 width x H x W."""
        return torch.cat([path(x) for path in self.paths], 1)


class Inception(_Pooled):
    """Modules of parallel paths of several filter sizes (Szegedy et al., 2015 and 2016); the stem is a 5x5 filter."""

    def __init__(
        self,
        widths: tuple[int, ...] = (12, 20, 28),
        *,
        num_classes: int = 10,
        channels: int = 3,
        mean: Constants = CIFAR10_MEAN,
        std: Constants = CIFAR10_STD,
    ) -> None:
        first, second, third = widths
        features = nn.Sequential(
            _conv(channels, 32, 5, 2),
            Branches(32, first),
            nn.MaxPool2d(3, 2, 1),
            Branches(4 * first, second),
            Branches(4 * second, third),
        )
        super().__init__(features, 4 * third, num_classes, mean, std)


class SelfAttention(nn.Module):
    """Multi-head self-attention over N x tokens x width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return N x tokens x width."""
        count, tokens, width = x.shape
        parts = self.inner(x).view(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        out: Tensor = self.outer(mixed.transpose(1, 2).reshape(count, tokens, width))
        return out


class CCT(nn.Module):
    """A compact convolutional transformer (Hassani et al., 2021): conv tokens, encoder layers, pooled by attention.

    Takes pictures of `size` x `size` only: the position embedding is learned. `heads` must divide `width`.
    """

    def __init__(
        self,
        width: int = 64,
        depth: int = 3,
        *,
        heads: int = 2,
        size: int = 32,
        num_classes: int = 10,
        channels: int = 3,
        mean: Constants = CIFAR10_MEAN,
        std: Constants = CIFAR10_STD,
    ) -> None:
        super().__init__()
        self.normalise = normaliser(mean, std)
        self.tokens = nn.Sequential(_conv(channels, width // 2, 3, 2), _conv(width // 2, width, 3), nn.MaxPool2d(2))
        self.place = nn.Parameter(torch.zeros(1, (size // 4) ** 2, width))
        layers: list[nn.Module] = []
        for _ in range(depth):
            mlp = (nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            attention = (nn.LayerNorm(width), SelfAttention(width, heads))
            layers += [Residual(nn.Sequential(*attention)), Residual(nn.Sequential(*mlp))]
        self.encoder = nn.Sequential(*layers, nn.LayerNorm(width))
        self.weigh = nn.Linear(width, 1)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of N x C x size x size images."""
        tokens = self.tokens(self.normalise(x)).flatten(2).transpose(1, 2)
        out = self.encoder(tokens + self.place)
        pooled = (self.weigh(out).softmax(1) * out).sum(1)
        logits: Tensor = self.linear(pooled)
        return logits
