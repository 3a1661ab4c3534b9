"""The learned score: a U-Net with its preconditioning, known for a range of noise, and asked in whatever table.

Inside, everything is the ratio r = sigma / scale of y = u / scale = u_0 + r n: VP, VE and sub-VP levels of equal ratio
are one question. Networks on a discrete chain (DDPM) are asked at the chain's nearest step.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.defenses.purification.denoiser import FORMS, Denoiser, to_eps
from maodun.defenses.purification.levels import Levels, vp_discrete
from maodun.defenses.purification.upsampling import fuse_upsampling

Preconditioning = Literal["edm", "eps", "x0", "score", "velocity"]


class Core(nn.Module):
    """Predicts the noise n in y = u_0 + r n from y (N x C x H x W) and r (N,): what training trains.

    `unet` maps (images, times (N,)) to images or to something with a `sample` of that kind. `form` "edm" preconditions
    as Karras et al. (2022): D = c_skip y + c_out unet(c_in y, 250 log r), with data of standard deviation `spread`;
    any other form is what the network predicts at the steps of the chain `levels`, whose inputs and times it is
    given. `patch` folds squares of that side into channels before the network and unfolds them behind it, which buys
    its depth at a lower resolution (as FFDNet does).
    """

    def __init__(
        self, unet: nn.Module, levels: Levels, form: Preconditioning = "edm", patch: int = 1, spread: float = 0.5
    ) -> None:
        super().__init__()
        if form not in ("edm", *FORMS):
            raise InputError(f"parametrisation '{form}'", "there is none of that name", "use edm or eps")
        self.unet, self.levels, self.form, self.patch, self.spread = unet, levels, form, patch, spread

    def forward(self, y: Tensor, ratio: Tensor) -> Tensor:
        """Return the predicted noise, shaped like `y`."""
        wide = ratio.reshape(-1, 1, 1, 1)
        if self.form == "edm":
            total = wide.square() + self.spread**2
            out = self._ask(y * total.rsqrt(), 250.0 * ratio.log())
            # y - D, with the difference of the two large terms taken by hand: it stays exact where r is small.
            return y * (wide / total) - out * (self.spread * total.rsqrt())
        step = self.steps(ratio)
        scale = self.levels.scale.to(ratio)[step].reshape(-1, 1, 1, 1)
        sigma = self.levels.sigma.to(ratio)[step].reshape(-1, 1, 1, 1)
        u = y * scale
        return _noise(self.form, self._ask(u, step), u, scale, sigma)

    def at(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        """Return the predicted noise of u at index `t` of `levels`: as `forward`, for a level all rows share."""
        scale, sigma = levels.at(t)
        if self.form == "edm":
            return self(u / scale, torch.full((u.shape[0],), sigma / scale, dtype=u.dtype, device=u.device))  # type: ignore[no-any-return]
        step = t if levels == self.levels else self.levels.nearest(sigma / scale)
        own_scale, own_sigma = self.levels.at(step)
        u = u if levels == self.levels else u * (own_scale / scale)
        out = self._ask(u, torch.full((u.shape[0],), step, dtype=torch.int64, device=u.device))
        return to_eps(self.form, out, u, own_scale, own_sigma)

    def steps(self, ratio: Tensor) -> Tensor:
        """Return the steps of the chain whose ratios are nearest to `ratio` (N,), int64."""
        edges = self.levels.ratios.log()
        middles = ((edges[1:] + edges[:-1]) / 2).to(ratio.device)
        return torch.bucketize(ratio.double().log(), middles)

    def _ask(self, x: Tensor, time: Tensor) -> Tensor:
        """Return what the network makes of its own kind of input."""
        if self.patch > 1:
            x = F.pixel_unshuffle(x, self.patch)
        answer: Any = self.unet(x, time)
        out: Tensor = answer if isinstance(answer, Tensor) else answer.sample
        return F.pixel_shuffle(out, self.patch) if self.patch > 1 else out


def _noise(form: str, out: Tensor, u: Tensor, scale: Tensor, sigma: Tensor) -> Tensor:
    """`to_eps` with a level per row."""
    if form == "eps":
        return out
    if form == "x0":
        return (u - scale * out) / sigma
    if form == "score":
        return -sigma * out
    return (scale * out + sigma * u) / (scale.square() + sigma.square())


class ScoreNetwork(Denoiser):
    """A trained network as a denoiser: `core` with the image shape (C, H, W) and the range it was trained on.

    `top` is the largest ratio sigma / scale it has seen (infinite: all of them); to purify from beyond it is refused.
    `name` is what reports call it, `about` its provenance (JSON values).
    """

    def __init__(
        self, core: Core, shape: tuple[int, int, int], top: float = math.inf, name: str = "", about: Any = None
    ) -> None:
        super().__init__()
        self.core, self.shape, self.top, self.name, self.about = core, shape, top, name, dict(about or {})

    @property
    def levels(self) -> Levels:
        """The table of the chain it was trained on; the filter's default."""
        return self.core.levels

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        """Return the predicted noise, shaped like `u`."""
        return self.core.at(u, t, levels)

    def freeze(self) -> ScoreNetwork:
        """Put it in evaluation mode with frozen weights, arranged for speed: channels last, upsampling in one go."""
        super().freeze()
        self.core.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        fuse_upsampling(self.core.unet)
        return self

    def need_range(self, levels: Levels, t: int) -> None:
        """Raise InputError when index `t` holds more noise than the network was trained on."""
        if levels.ratio(t) > self.top * 1.001:
            own = (levels.nearest(self.top) + 1) / len(levels)
            reason = f"was trained on noise up to t* {own:.3g} of {levels.name}, not on {(t + 1) / len(levels):.3g}"
            raise InputError(
                f"score network '{self.name}'", reason, "use a smaller t_star, or train one for more noise"
            )


def small_unet(
    shape: tuple[int, int, int], channels: tuple[int, ...] = (32, 64), layers: int = 1, patch: int = 1, groups: int = 8
) -> dict[str, Any]:
    """Return the arguments of a small UNet2DModel without attention for images of `shape` (C, H, W).

    `channels` is the width per resolution, `layers` the residual blocks at each. InputError for sides that do not
    divide by `patch` and by two per resolution.
    """
    depth, (colours, height, width) = len(channels), shape
    if height % (patch * 2 ** (depth - 1)) or width % (patch * 2 ** (depth - 1)):
        reason = f"do not divide by {patch * 2 ** (depth - 1)}, as {depth} resolutions behind patches of {patch} need"
        raise InputError(f"image sides {height} x {width}", reason, "use fewer channels entries or a smaller patch")
    return {
        "sample_size": [height // patch, width // patch],
        "in_channels": colours * patch**2,
        "out_channels": colours * patch**2,
        "block_out_channels": list(channels),
        "layers_per_block": layers,
        "down_block_types": ["DownBlock2D"] * depth,
        "up_block_types": ["UpBlock2D"] * depth,
        "norm_num_groups": groups,
        "add_attention": False,
    }


def build_unet(config: dict[str, Any]) -> nn.Module:
    """Return diffusers' UNet2DModel of a configuration; InputError without diffusers, or for one it does not take."""
    unet2d = need_diffusers()
    try:
        net: nn.Module = unet2d(**config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            "U-Net configuration", f"it cannot be built ({error})", "see UNet2DModel of diffusers"
        ) from error
    return net


def need_diffusers() -> Any:
    """Return the class UNet2DModel; InputError when diffusers is not installed."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise InputError("score network", "diffusers is not installed", "pip install 'maodun[diffusion]'") from error
    return UNet2DModel


def new_network(
    shape: tuple[int, int, int],
    *,
    channels: tuple[int, ...] = (32, 64),
    layers: int = 1,
    patch: int = 1,
    groups: int = 8,
    form: Preconditioning = "edm",
    spread: float = 0.5,
    levels: Levels | None = None,
    top: float = 0.27,
    seed: int = 0,
) -> ScoreNetwork:
    """Return an untrained small network for images of `shape`, its weights a function of `seed`.

    `top` in (0, 1] is the share of the noise levels that it will be trained on: purification from t* needs no more.
    """
    table = levels or vp_discrete()
    config = small_unet(shape, channels, layers, patch, groups)
    with torch.random.fork_rng(devices=[]):
        torch.random.manual_seed(seed)
        unet = build_unet(config)
    core = Core(unet, table, form, patch, spread)
    highest = table.ratio(len(table) - 1 if top >= 1.0 else table.index(top))
    return ScoreNetwork(core, shape, highest, about={"config": config})
