"""Small networks for dense and generative tasks: they train in minutes on one core and take images of any even size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class _Residual(nn.Module):
    """Two convolutions around a shortcut, with stride 2."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, outputs, 2), nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.body(x) + self.shortcut(x))
        return out


class SegmentationNet(nn.Module):
    """A small U-Net (Ronneberger et al., 2015): N x 3 x H x W in [0, 1] to N x classes x H x W logits.

    Three strides of two down and two up again; the last doubling of the logits is bilinear. Works at any H and W.
    """

    def __init__(self, classes: int = 11, width: int = 12) -> None:
        super().__init__()
        self.one = nn.Sequential(_conv(3, width, 2), _conv(width, width))
        self.two = nn.Sequential(_conv(width, 2 * width, 2), _conv(2 * width, 2 * width))
        self.three = nn.Sequential(_conv(2 * width, 4 * width, 2), _conv(4 * width, 4 * width), _Context(4 * width))
        self.up_two = _conv(6 * width, 2 * width)
        self.up_one = _conv(3 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of every pixel."""
        one = self.one(x * 4.0 - 2.0)
        two = self.two(one)
        deep = self.three(two)
        deep = self.up_two(torch.cat([_grow(deep, two), two], 1))
        deep = self.up_one(torch.cat([_grow(deep, one), one], 1))
        return _grow(self.head(deep), x)


class _Context(nn.Module):
    """Adds what the whole image says (its mean) to every position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.linear(F.adaptive_avg_pool2d(x, 1))
        return out


def _grow(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=False)


class DetectionNet(nn.Module):
    """A small anchor-free detector in the way of CenterNet (Zhou et al., 2019) for one class of object.

    N x 3 x H x W in [0, 1] to N x 5 x H/4 x W/4: the logit that an object's centre lies here, then the distances from
    here to the left, top, right and bottom of its box, in units of `scale` pixels (a softplus makes them positive).
    """

    stride = 4
    scale = 16.0

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = _conv(3, width, 2)
        self.two = _Residual(width, 2 * width)
        self.three = _Residual(2 * width, 4 * width)
        self.four = nn.Sequential(_Residual(4 * width, 6 * width), _Context(6 * width))
        self.up_three = _conv(10 * width, 4 * width)
        self.up_two = _conv(6 * width, 2 * width)
        self.head = nn.Conv2d(2 * width, 5, 3, padding=1)
        self.prior = -3.0

    def forward(self, x: Tensor) -> Tensor:
        """Return centre logits and box distances of every cell."""
        two = self.two(self.stem(x * 4.0 - 2.0))
        three = self.three(two)
        deep = self.up_three(torch.cat([_grow(self.four(three), three), three], 1))
        out = self.head(self.up_two(torch.cat([_grow(deep, two), two], 1)))
        return torch.cat([out[:, :1] + self.prior, F.softplus(out[:, 1:])], 1)


class AutoEncoder(nn.Module):
    """A convolutional autoencoder without batch norm: N x 3 x H x W in [0, 1] to the same, through 1/8 of the size.

    `code` channels per cell of 8 x 8 pixels; the code is what has to carry the image. H and W are cropped back.
    """

    def __init__(self, width: int = 16, code: int = 12) -> None:
        super().__init__()
        wide = 2 * width
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1), nn.SiLU(), nn.Conv2d(width, wide, 4, 2, 1), nn.SiLU(),
            nn.Conv2d(wide, 2 * wide, 4, 2, 1), nn.SiLU(), nn.Conv2d(2 * wide, code, 1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(code, 2 * wide, 3, 1, 1), nn.SiLU(), nn.ConvTranspose2d(2 * wide, wide, 4, 2, 1), nn.SiLU(),
            nn.ConvTranspose2d(wide, width, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(width, 3, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return the reconstruction, a sigmoid of the decoder's output."""
        high, wide = (-x.shape[2]) % 8, (-x.shape[3]) % 8
        out = self.decoder(self.encoder(F.pad(x, (0, wide, 0, high), mode="replicate") * 2.0 - 1.0))
        image: Tensor = torch.sigmoid(out[:, :, : x.shape[2], : x.shape[3]])
        return image


class Embedding(nn.Module):
    """The representation of a classifier as a retrieval embedding: what enters its last linear layer, at length one.

    `classifier` is neither copied nor changed; its last linear layer is watched by a hook while a call lasts.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier
        linears = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
        self.last = linears[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Return N x width embeddings of length one."""
        kept: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept.append(inputs[0])

        handle = self.classifier.get_submodule(self.last).register_forward_pre_hook(keep)
        try:
            self.classifier(x)
        finally:
            handle.remove()
        return F.normalize(kept[-1].flatten(1), dim=1)


class ClassificationNet(nn.Module):
    """A small residual classifier: N x 3 x H x W in [0, 1] to N x classes logits, from the mean over positions."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(3, width), _Residual(width, 2 * width), _Residual(2 * width, 4 * width), _conv(4 * width, 4 * width)
        )
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(self.features(x * 4.0 - 2.0), 1).flatten(1))
        return logits


def initialise(model: nn.Module, seed: int) -> nn.Module:
    """Draw every weight of `model` anew, in place, from He et al.'s normal distribution as a function of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
