"""The network of a public MNIST diffusion model, so that a score nobody here trained can stand as a witness.

The layout is that of BrianPulfer/PapersReimplementations, ddpm (MIT), whose published weights load into it by name;
the code is ours.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.defenses.purification.levels import vp_discrete
from maodun.defenses.purification.network import Core, ScoreNetwork


class _Block(nn.Module):
    """Layer norm over the whole map, two 3x3 convolutions with SiLU."""

    def __init__(self, side: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm((inputs, side, side))
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return N x outputs x side x side maps."""
        out: Tensor = self.act(self.conv2(self.act(self.conv1(self.ln(x)))))
        return out


def _blocks(side: int, *widths: int) -> nn.Sequential:
    return nn.Sequential(*(_Block(side, a, b) for a, b in pairwise(widths)))


def _time(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(100, width), nn.SiLU(), nn.Linear(width, width))


class MnistUNet(nn.Module):
    """A U-Net on 28 x 28 grey images with four resolutions, 0.6 million parameters, times 0..999 by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embed = nn.Embedding(1000, 100)
        self.te1, self.b1 = _time(1), _blocks(28, 1, 10, 10, 10)
        self.down1 = nn.Conv2d(10, 10, 4, 2, 1)
        self.te2, self.b2 = _time(10), _blocks(14, 10, 20, 20, 20)
        self.down2 = nn.Conv2d(20, 20, 4, 2, 1)
        self.te3, self.b3 = _time(20), _blocks(7, 20, 40, 40, 40)
        self.down3 = nn.Sequential(nn.Conv2d(40, 40, 2, 1), nn.SiLU(), nn.Conv2d(40, 40, 4, 2, 1))
        self.te_mid, self.b_mid = _time(40), _blocks(3, 40, 20, 20, 40)
        self.up1 = nn.Sequential(nn.ConvTranspose2d(40, 40, 4, 2, 1), nn.SiLU(), nn.ConvTranspose2d(40, 40, 2, 1))
        self.te4, self.b4 = _time(80), _blocks(7, 80, 40, 20, 20)
        self.up2 = nn.ConvTranspose2d(20, 20, 4, 2, 1)
        self.te5, self.b5 = _time(40), _blocks(14, 40, 20, 10, 10)
        self.up3 = nn.ConvTranspose2d(10, 10, 4, 2, 1)
        self.te_out, self.b_out = _time(20), _blocks(28, 20, 10, 10, 10)
        self.conv_out = nn.Conv2d(10, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise of N x 1 x 28 x 28 images at steps t (N,)."""
        time = self.time_embed(t)

        def told(maps: Tensor, te: nn.Module) -> Tensor:
            at: Tensor = te(time)
            return maps + at[:, :, None, None]

        first = self.b1(told(x, self.te1))
        second = self.b2(told(self.down1(first), self.te2))
        third = self.b3(told(self.down2(second), self.te3))
        middle = self.b_mid(told(self.down3(third), self.te_mid))
        up = self.b4(told(torch.cat([third, self.up1(middle)], 1), self.te4))
        up = self.b5(told(torch.cat([second, self.up2(up)], 1), self.te5))
        up = self.b_out(told(torch.cat([first, self.up3(up)], 1), self.te_out))
        out: Tensor = self.conv_out(up)
        return out


def load_witness(path: Path, where: str) -> ScoreNetwork:
    """Return the MNIST witness of a .pt file; InputError about `where` for a file that is not its state dict."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name.removeprefix("network."): value for name, value in state.items()}
        unet = MnistUNet()
        unet.load_state_dict(tensors)
    except Exception as error:  # a foreign file can fail in any way; what failed stands in the message
        reason = f"holds no MNIST witness ({str(error).splitlines()[0]})"
        raise InputError(where, reason, "give a .safetensors score network or a diffusers folder") from error
    return ScoreNetwork(Core(unet, vp_discrete(), "eps"), (1, 28, 28), name=path.stem)
