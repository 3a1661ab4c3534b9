"""The networks of the generative attacks, small enough to be trained on a CPU at 28 x 28 or 32 x 32.

The generator is the residual one of style transfer (Johnson et al., ECCV 2016) that CDA (Naseer et al., NeurIPS 2019)
and its followers use, cut into an encoder and a decoder; the critic is AdvGAN's (Xiao et al., IJCAI 2018). All norms
are instance norms, so that what becomes of one image does not depend on its neighbours in the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError

_SMALLEST = 8


def _conv(inputs: int, outputs: int, stride: int = 1, *, groups: int = 0) -> nn.Sequential:
    """Return 3x3 convolution (reflecting at the edge), instance norm or, with `groups`, group norm, and ReLU."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, padding_mode="reflect")
    norm = nn.GroupNorm(groups, outputs) if groups else nn.InstanceNorm2d(outputs, affine=True)
    return nn.Sequential(conv, norm, nn.ReLU())


class Residual(nn.Module):
    """Two 3x3 convolutions with instance norm, added to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = nn.Conv2d(width, width, 3, padding=1, padding_mode="reflect")
        self.body = nn.Sequential(_conv(width, width), last, nn.InstanceNorm2d(width, affine=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return input plus body."""
        out: Tensor = x + self.body(x)
        return out


class Generator(nn.Module):
    """Encoder and decoder: an image becomes a latent code, a code becomes a direction in (-1, 1).

    Takes N x C x H x W in [0, 1], H and W at least 8; the code is N x 4 width x H/4 x W/4 (rounded up), of zero mean
    and unit variance per map, so that a distance between codes cannot be made small by making codes small. `blocks`
    residual blocks stand at the bottom, the first half of them (rounded down) in the encoder.
    """

    def __init__(self, channels: int, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        first = blocks // 2
        self.down = nn.Sequential(
            _conv(channels, width),
            _conv(width, 2 * width, 2),
            _conv(2 * width, 4 * width, 2),
            *(Residual(4 * width) for _ in range(first)),
            nn.InstanceNorm2d(4 * width),
        )
        self.bottom = nn.Sequential(*(Residual(4 * width) for _ in range(blocks - first)))
        self.up1, self.up2 = _conv(4 * width, 2 * width), _conv(2 * width, width)
        self.out = nn.Conv2d(width, channels, 3, padding=1, padding_mode="reflect")

    def encode(self, x: Tensor) -> Tensor:
        """Return the code of images in [0, 1]; sizes that four does not divide are padded at the right and bottom."""
        height, width = x.shape[2:]
        code: Tensor = self.down(F.pad(x - 0.5, (0, -width % 4, 0, -height % 4), mode="replicate"))
        return code

    def decode(self, code: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the direction in (-1, 1) of a code, cut to `size` (height, width)."""
        out = self.up1(F.interpolate(self.bottom(code), scale_factor=2.0))
        out = self.up2(F.interpolate(out, scale_factor=2.0))
        return torch.tanh(self.out(out))[:, :, : size[0], : size[1]]

    def forward(self, x: Tensor) -> Tensor:
        """Return the direction of each image, same shape."""
        height, width = x.shape[2:]
        return self.decode(self.encode(x), (height, width))


class Critic(nn.Module):
    """Three strided 4x4 convolutions and a 1x1 one: one score per image, higher for what looks real.

    The published critic has batch norm and a sigmoid; here instance norm stands for the first, and the score is left
    raw, as least squares and hinge want it. With `classes` the label is given as that many constant maps, and there is
    no norm, which would hide how bright an image is.
    """

    def __init__(self, channels: int, width: int = 8, classes: int = 0) -> None:
        super().__init__()
        self.classes = classes
        self.body = nn.Sequential(
            nn.Conv2d(channels + classes, width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.Identity() if classes else nn.InstanceNorm2d(2 * width, affine=True),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4 * width, 1, 1),
        )

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Return (N,) scores of images in [0, 1], the mean over positions."""
        out = 2.0 * x - 1.0
        if self.classes and y is not None:
            maps = F.one_hot(y, self.classes).to(out)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            out = torch.cat([out, maps], 1)
        scores: Tensor = self.body(out)
        return scores.flatten(1).mean(1)


class Sampler(nn.Module):
    """Noise (N x `noise`) and a class become an image in (0, 1): the decoder's half of a class-conditional GAN."""

    def __init__(self, shape: tuple[int, ...], classes: int, noise: int = 64, width: int = 16) -> None:
        super().__init__()
        channels, self.height, self.width = shape
        self.classes, self.noise, self.maps = classes, noise, 4 * width
        self.start = nn.Linear(noise + classes, self.maps * -(-self.height // 4) * -(-self.width // 4))
        # One group over all maps: a norm per map would forbid images that are bright or dark as a whole.
        self.norm = nn.GroupNorm(1, self.maps)
        self.up1, self.up2 = _conv(self.maps, 2 * width, groups=1), _conv(2 * width, width, groups=1)
        self.out = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, noise: Tensor, y: Tensor) -> Tensor:
        """Return N x shape images in (0, 1) of the classes `y` (N,)."""
        words = torch.cat([noise, F.one_hot(y, self.classes).to(noise)], 1)
        out = self.start(words).reshape(-1, self.maps, -(-self.height // 4), -(-self.width // 4))
        out = self.up1(F.interpolate(F.relu(self.norm(out)), scale_factor=2.0))
        out = self.up2(F.interpolate(out, scale_factor=2.0))
        return torch.sigmoid(self.out(out))[:, :, : self.height, : self.width]


def check_shape(shape: tuple[int, ...], thing: str) -> None:
    """Raise InputError unless `shape` is C x H x W with sides of at least 8 pixels."""
    if len(shape) != 3 or min(shape[1:]) < _SMALLEST:
        reason = f"needs images C x H x W with sides of at least {_SMALLEST}, got {tuple(shape)}"
        raise InputError(thing, reason, "use larger images, or another attack")


def initialise(network: nn.Module, seed: int) -> None:
    """Draw the weights of `network` anew, in place, as a function of `seed` alone: normal with deviation 0.02.

    Biases are zero and norms the identity (the custom of Radford et al., 2016, for generative networks).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            # Deviation 0.02 suits wide networks; narrow ones get Glorot's where that is larger.
            fan = module.weight[0].numel() + module.weight.shape[0]
            nn.init.normal_(module.weight, std=max(0.02, (2.0 / fan) ** 0.5), generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
