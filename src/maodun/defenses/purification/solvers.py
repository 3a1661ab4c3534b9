"""Samplers that come from a numerical method: for the reverse equation, its exact linear part, or its flow.

All of them work on the ratio r = sigma / scale and y = u / scale where that is simpler: there every forward equation is
y = u_0 + r n, the reverse one dy = -d(r^2) score + noise of variance d(r^2), and the flow dy / dr = eps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.purification.denoiser import Denoiser, clean_estimate
from maodun.defenses.purification.levels import CLEAN, Levels
from maodun.defenses.purification.samplers import Sampler, State


@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler and Maruyama's step of the reverse equation, as DiffPure takes it (Nie et al., ICML 2022).

    u_s = u - (f u - g^2 score) dt + g sqrt(dt) n with f, g^2 at level t and dt the difference of the continuous times.
    Order 1 in distribution. The last step adds its noise too, so it is for many small steps.
    """

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s`."""
        u, (drift, diffusion) = state[0], levels.coefficients(t)
        time = levels.moment(t) - levels.moment(s)
        _, sigma = levels.at(t)
        pull = diffusion * time / sigma
        return ((1.0 - drift * time) * u - pull * denoiser(u, t, levels) + math.sqrt(diffusion * time) * noise,)


@dataclass(frozen=True)
class Exponential(Sampler):
    """Exponential integrator of the reverse equation: the linear part exactly, the score held over the step.

    y_s = y - (r_t^2 - r_s^2) / r_t eps + sqrt(r_t^2 - r_s^2) n: the integral of d(r^2) is exact whatever the equation,
    so VP, VE and sub-VP give the same chain. Order 1; the step to the clean level is Tweedie's mean, without noise.
    """

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s`."""
        u = state[0]
        if s == CLEAN:
            return (clean_estimate(denoiser, levels, u, t),)
        (scale_t, _), (scale_s, _) = levels.at(t), levels.at(s)
        ratio_t, freed = levels.ratio(t), levels.ratio(t) ** 2 - levels.ratio(s) ** 2
        eps = denoiser(u, t, levels)
        return ((scale_s / scale_t) * u - (scale_s * freed / ratio_t) * eps + (scale_s * math.sqrt(freed)) * noise,)


@dataclass(frozen=True)
class DPMSolver(Sampler):
    """DPM-Solver++(2M), as a flow or as the reverse equation (`sde`), in log-SNR time (Lu et al., 2022).

    With h the gain in log(1 / r) and D = x0 + h / (2 h_before) (x0 - x0_before): the flow is
    u_s = (sigma_s / sigma_t) u + scale_s (1 - e^-h) D, the equation
    u_s = (sigma_s / sigma_t) e^-h u + scale_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) n. Order 2 as a flow, one
    evaluation a step. The first step and the one to the clean level are of first order. The state carries the x0 of
    the step before and 1 / h of it per row (zero where there was none).
    """

    sde: bool = False

    @property
    def stochastic(self) -> bool:
        """Only the equation does."""
        return self.sde

    def init(self, u: Tensor) -> State:
        """Return a state that remembers no step."""
        return (u, torch.zeros_like(u), u.new_zeros((u.shape[0], *([1] * (u.ndim - 1)))))

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s`."""
        u, before, rate = state
        clean = clean_estimate(denoiser, levels, u, t)
        if s == CLEAN:
            return clean, clean, rate
        (_, sigma_t), (scale_s, sigma_s) = levels.at(t), levels.at(s)
        gain = math.log(levels.ratio(t) / levels.ratio(s))
        ahead = clean + (0.5 * gain) * rate * (clean - before)
        if self.sde:
            moved = (sigma_s / sigma_t * math.exp(-gain)) * u - (scale_s * math.expm1(-2.0 * gain)) * ahead
            moved = moved + (sigma_s * math.sqrt(-math.expm1(-2.0 * gain))) * noise
        else:
            moved = (sigma_s / sigma_t) * u - (scale_s * math.expm1(-gain)) * ahead
        return moved, clean, rate.new_full(rate.shape, 1.0 / gain)


@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method on the flow dy / dr = eps, with churn (Karras et al., 2022, algorithm 2).

    `churn` first raises the ratio with fresh noise, by that share of the step's fall and at most by their factor
    sqrt(2), to the nearest level of the table; then an Euler step to s and, unless s is clean, the mean of both ends'
    slopes. (In the paper the rise is a total over the number of steps; tied to the step it falls as fast with more of
    them.) Order 2; two evaluations a step, one for the last. InputError for a negative churn.
    """

    spacing: float = 2.0
    churn: float = 0.0

    def __post_init__(self) -> None:
        if self.churn < 0.0:
            raise InputError(f"churn {self.churn}", "it is a share of the step", "use 0 or more, for example 0.5")

    @property
    def stochastic(self) -> bool:
        """Only churn does."""
        return self.churn > 0.0

    def step(self, denoiser: Denoiser, levels: Levels, state: State, t: int, s: int, noise: Tensor) -> State:
        """Return the state at level `s`."""
        y = state[0] / levels.at(t)[0]
        if self.churn:
            up = self._up(levels, t, s)
            y = y + math.sqrt(max(0.0, levels.ratio(up) ** 2 - levels.ratio(t) ** 2)) * noise
            t = up
        fall = levels.ratio(s) - levels.ratio(t)
        first = denoiser(y * levels.at(t)[0], t, levels)
        scale = levels.at(s)[0]
        out = (y + fall * first) * scale
        if s != CLEAN:
            out = (y + (0.5 * fall) * (first + denoiser(out, s, levels))) * scale
        return (out,)

    def _up(self, levels: Levels, t: int, s: int) -> int:
        """Return the level that churn raises `t` to, before the step to `s`."""
        here = levels.ratio(t)
        aim = min(here + self.churn * (here - levels.ratio(s)), math.sqrt(2.0) * here)
        return max(t, levels.nearest(aim))

    def highest(self, levels: Levels, path: tuple[int, ...]) -> int:
        """Return the level that the first step's churn raises the start to."""
        return self._up(levels, path[0], path[1]) if self.churn else path[0]

    def nfe(self, steps: int) -> int:
        """Return the evaluations of `steps` steps: the last one takes one."""
        return 2 * steps - 1
