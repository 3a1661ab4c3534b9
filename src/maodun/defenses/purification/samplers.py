"""Ways to walk from a noisy image back to a clean one; all of them pure functions of state, indices and noise.

A sampler is a frozen object. `grid` names the levels it visits, `init` makes a state of an image, `step` goes from
level t to the less noisy level s (-1 is clean) with noise that it is handed, and nothing else is remembered. Whoever
replays a chain for gradients calls the same `step` with the same arguments and gets the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.purification.denoiser import Denoiser, clean_estimate
from maodun.defenses.purification.levels import CLEAN, Levels

State = tuple[Tensor, ...]


@dataclass(frozen=True)
class Sampler:
    """The common part: `spacing` is the power of the time grid (1 uniform; above 1 denser near the clean end).

    A state is a tuple of tensors whose first is u (N x C x H x W); every tensor has the rows of u, so states may be
    cut, repeated and stored by rows.
    """

    spacing: float = 1.0

    @property
    def stochastic(self) -> bool:
        """Whether `step` looks at its noise; a deterministic sampler may be handed anything."""
        return True

    def grid(self, start: int, steps: int) -> tuple[int, ...]:
        """Return steps + 1 decreasing indices from `start` to -1.

        At spacing 1 these are (start + 1) k / steps - 1, as Lee and Kim (ICCV 2023) space them. InputError when steps
        is below 1 or above the number of levels up to `start`.
        """
        if steps < 1:
            raise InputError(f"steps {steps}", "purification takes at least one step", "use 1 or more")
        if steps > start + 1:
            reason = f"only {start + 1} noise levels lie below t*"
            raise InputError(f"steps {steps}", reason, f"use at most {start + 1}, or a larger t*")
        if self.spacing <= 0:
            raise InputError(f"spacing {self.spacing}", "it is a positive power", "use 1 for a uniform grid")
        levels = [(start + 1) * (k / steps) ** self.spacing for k in range(steps + 1)]
        places, least = [], CLEAN - 1
        for k, level in enumerate(levels):
            # Small spacings round to the same index: each step then takes the next free level, and the last fits.
            least = min(max(round(level) - 1, least + 1), start - (steps - k))
            places.append(least)
        return tuple(reversed(places))

    def init(self, u: Tensor) -> State:
        """Return the state of a chain that stands at `u`."""
        return (u,)

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s` < `t`; `noise` is standard normal, shaped like u."""
        raise NotImplementedError("a subclass takes the step")

    def nfe(self, steps: int) -> int:
        """Return how often the network is asked in a chain of `steps` steps."""
        return steps

    def highest(self, levels: Levels, path: tuple[int, ...]) -> int:
        """Return the noisiest level at which the network is asked along the `path` of `grid`: where it starts."""
        del levels
        return path[0]


@dataclass(frozen=True)
class DDIM(Sampler):
    """Denoising diffusion implicit models with stochasticity `eta` in [0, 1] (Song et al., 2021).

    x0 = (u - sigma_t eps) / scale_t; u_s = scale_s x0 + c1 n + c2 eps, with c1 = eta (sigma_s / ratio_t)
    sqrt(ratio_t^2 - ratio_s^2) and c2 = sqrt(sigma_s^2 - c1^2). 0 is the deterministic chain, 1 the ancestral one.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise InputError(f"eta {self.eta}", "it is a share of the ancestral noise, in [0, 1]", "use 0 or 1")

    @property
    def stochastic(self) -> bool:
        """Unless eta is 0."""
        return self.eta > 0.0

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s`."""
        u = state[0]
        (scale_t, sigma_t), (scale_s, sigma_s) = levels.at(t), levels.at(s)
        ratio_t, ratio_s = levels.ratio(t), levels.ratio(s)
        eps = denoiser(u, t, levels)
        fresh = self.eta * sigma_s * math.sqrt(max(0.0, 1.0 - (ratio_s / ratio_t) ** 2))
        kept = math.sqrt(max(0.0, sigma_s**2 - fresh**2))
        out = (scale_s / scale_t) * u + (kept - scale_s * sigma_t / scale_t) * eps
        return (out + fresh * noise if fresh else out,)


@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling of the denoising diffusion chain (Ho et al., 2020).

    The mean of the posterior q(u_s | u_t, x0) plus noise of its variance, `variance` "posterior" (the lower bound of
    the reverse variance; then it is DDIM with eta 1) or "beta" (the upper one, the forward variance between the levels;
    no noise in the last step). `clip` clamps x0 to [-1, 1] first, as the original and GDMP do.
    """

    variance: Literal["posterior", "beta"] = "posterior"
    clip: bool = True

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s`."""
        u = state[0]
        (scale_t, sigma_t), (scale_s, sigma_s) = levels.at(t), levels.at(s)
        clean = clean_estimate(denoiser, levels, u, t)
        if self.clip:
            clean = clean.clamp(-1.0, 1.0)
        step = scale_t / scale_s
        forward = sigma_t**2 - (step * sigma_s) ** 2
        mean = (scale_s * forward / sigma_t**2) * clean + (step * sigma_s**2 / sigma_t**2) * u
        if s == CLEAN:
            return (mean,)
        variance = forward if self.variance == "beta" else forward * sigma_s**2 / sigma_t**2
        return (mean + math.sqrt(max(0.0, variance)) * noise,)


@dataclass(frozen=True)
class Tweedie(Sampler):
    """One step from t* to the posterior mean by Tweedie's formula: one evaluation, as denoised smoothing uses it."""

    @property
    def stochastic(self) -> bool:
        """It does not."""
        return False

    def grid(self, start: int, steps: int) -> tuple[int, ...]:
        """Return (start, -1); InputError unless `steps` is 1."""
        if steps != 1:
            raise InputError(f"steps {steps}", "the tweedie sampler takes one step", "use steps 1 or another sampler")
        return (start, CLEAN)

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at the clean level."""
        del s, noise
        return (clean_estimate(denoiser, levels, state[0], t),)
