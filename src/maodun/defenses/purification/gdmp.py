"""GDMP: a reverse process that is pulled towards the noisy input, in several rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import DefenseSpec
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.guided import Told
from maodun.defenses.purification.levels import CLEAN, Levels
from maodun.defenses.purification.purifier import DiffusionFilter
from maodun.defenses.purification.samplers import Sampler, State

# The published strength goes with a mean over this many: three colours of 32 x 32.
_PIXELS = 3072


class GDMP(DiffusionFilter):
    """Guided diffusion model for purification (Wang et al., arXiv 2205.14969), with the mean squared error as guide.

    Each reverse step takes the posterior mean of the clipped clean estimate and adds strength_t variance_t G, where G
    is the gradient at u_t of minus the mean squared error to the input diffused to the same level with fresh noise;
    strength_t = (sigma_t / scale_t) 3 `guide_scale` / (2 `radius`), `radius` the perturbation expected in [0, 1] units
    (the paper's 8/255 on CIFAR-10). The error is a sample's own sum over pixels, divided by CIFAR-10's number of them:
    the authors' code takes the mean over pixels and batch, so that its strength depends on the image's and the batch's
    size. Coarse steps would carry an image past its target: the pull ends there. `guide_scale` 0 leaves the clipping
    only. The other options are DiffusionFilter's, with the paper's CIFAR-10 values: level 0.036 in 36 steps, 4 rounds.
    The input is a guide that the exact gradient passes through as well. InputError as for DiffusionFilter, for a
    negative guide_scale and a radius that is not positive.
    """

    name = "gdmp"
    spec = DefenseSpec(stochastic=True, inner_loop=True)

    def __init__(
        self,
        score: str | Denoiser = "",
        guide_scale: float = 60000.0,
        radius: float = 8 / 255,
        t_star: float = 0.036,
        steps: int = 36,
        sampler: str | Sampler = "ddim_eta1",
        rounds: int = 4,
        votes: int = 1,
        levels: str | Levels = "",
    ) -> None:
        super().__init__(score, t_star, steps, sampler, rounds, votes, levels)
        if guide_scale < 0:
            raise InputError(f"guide_scale {guide_scale}", "pushes away from the input", "use 0 (none) or more")
        if radius <= 0:
            raise InputError(f"radius {radius}", "no perturbation is expected", "use for example 8/255")
        self.guide_scale, self.radius = guide_scale, radius

    def guide(self, x: Tensor) -> State:
        """Return the input in [-1, 1]."""
        return (2.0 * x - 1.0,)

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return two Gaussian noises, 2 x N x C x H x W: the step's and the guide's."""
        own = context.noise(x, f"{self.name}-{i}").normal()
        return (
            own.unsqueeze(0) if t == CLEAN else torch.stack([own, context.noise(x, f"{self.name}-{i}-guide").normal()])
        )

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State = ()) -> State:
        """Return the state after one move, pulled towards the diffused input on the way down."""
        if t == CLEAN:
            return super().advance(state, t, s, noise[0])
        u, (scale, sigma), (_, sigma_s) = state[0], self.levels.at(t), self.levels.at(s)
        eps: Tensor = self.denoiser(u, t, self.levels)
        clipped = ((u - sigma * eps) / scale).clamp(-1.0, 1.0)
        told = Told(self.denoiser, u, t, (u - scale * clipped) / sigma)
        after = self.sampler.step(told, self.levels, state, t, s, noise[0])
        ratio, ratio_s = self.levels.ratio(t), self.levels.ratio(s)
        variance = sigma_s**2 * (1.0 - (ratio_s / ratio) ** 2)
        strength = ratio * 3.0 * self.guide_scale / (2.0 * self.radius)
        # G = -2 (u - target) / _PIXELS, in closed form: nothing to differentiate.
        target = scale * guide[0] + sigma * noise[1]
        pull = min(1.0, 2.0 * strength * variance / _PIXELS)
        return (after[0] - pull * (u - target), *after[1:])

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"guide_scale={self.guide_scale}, radius={self.radius:g}, " + super().extra_repr()


__all__ = ["GDMP"]
