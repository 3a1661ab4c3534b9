"""Noise levels as one table: every stochastic differential equation becomes two columns of numbers.

Everything that purifies or trains looks its times up here by an integer index. A time that is recomputed as a float
is evaluated somewhere slightly else, and gradients taken there are wrong by up to their own size (DiffBreak, NeurIPS
2025); an index cannot drift.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from maodun.core.errors import InputError

CLEAN = -1


@dataclass(frozen=True, eq=False)
class Levels:
    """The levels of u_t = scale[t] u_0 + sigma[t] n, n standard normal, for images u_0 in [-1, 1].

    `scale`, `sigma` (T,) float64, index 0 the least noise and T-1 the most; the index -1 means clean (scale 1, sigma 0,
    time 0). `time` (T,) is the continuous time of each index in (0, 1]; `drift` f and `diffusion` g^2 (T,) are the
    coefficients of du = f u dt + g dw there. Equal tables have equal `name`, which is also how artifacts write them.
    """

    name: str
    time: Tensor
    scale: Tensor
    sigma: Tensor
    drift: Tensor
    diffusion: Tensor

    def __len__(self) -> int:
        return int(self.scale.shape[0])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Levels) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    @cached_property
    def _rows(self) -> tuple[tuple[float, float, float], ...]:
        """(scale, sigma, time) of every index as Python floats, the clean level last so that -1 finds it."""
        rows = zip(self.scale.tolist(), self.sigma.tolist(), self.time.tolist(), strict=True)
        return (*rows, (1.0, 0.0, 0.0))

    def at(self, t: int) -> tuple[float, float]:
        """Return (scale, sigma) of index `t`, (1, 0) for -1."""
        scale, sigma, _ = self._rows[t]
        return scale, sigma

    def ratio(self, t: int) -> float:
        """Return sigma / scale of index `t`: the noise an EDM network would be told."""
        scale, sigma, _ = self._rows[t]
        return sigma / scale

    def moment(self, t: int) -> float:
        """Return the continuous time of index `t`, 0 for -1."""
        return self._rows[t][2]

    def coefficients(self, t: int) -> tuple[float, float]:
        """Return (f, g^2) of the forward equation at index `t` >= 0."""
        return float(self.drift[t]), float(self.diffusion[t])

    @cached_property
    def ratios(self) -> Tensor:
        """The ratio sigma / scale of every index, (T,) float64, increasing."""
        return self.sigma / self.scale

    def index(self, t_star: float) -> int:
        """Return the index of the level at share `t_star` of the table: round(t_star T) - 1, at least 0.

        InputError unless 0 < t_star < 1.
        """
        if not 0.0 < t_star < 1.0:
            raise InputError(f"t_star {t_star}", "it is a share of the noise levels, in (0, 1)", "use for example 0.1")
        return max(0, round(t_star * len(self)) - 1)

    def nearest(self, ratio: float) -> int:
        """Return the index whose sigma / scale is nearest to `ratio` on a logarithmic axis; -1 for a ratio of 0."""
        if ratio <= 0.0:
            return CLEAN
        return int((self.ratios.log() - math.log(ratio)).abs().argmin())


def _integral(beta_min: float, beta_max: float, t: Tensor) -> Tensor:
    """The integral of the linear beta from 0 to t."""
    return beta_min * t + 0.5 * (beta_max - beta_min) * t.square()


def _times(count: int) -> Tensor:
    if count < 1:
        raise InputError(f"levels {count}", "a table needs at least one", "use for example 1000")
    return torch.arange(1, count + 1, dtype=torch.float64) / count


def vp_discrete(beta_first: float = 1e-4, beta_last: float = 2e-2, count: int = 1000) -> Levels:
    """Return the variance-preserving chain with `count` linear betas (DDPM, Ho et al., 2020).

    scale^2 is the running product of 1 - beta, sigma^2 = 1 - scale^2. Its equation is the VP one with
    beta(t) = count beta_i at time (i + 1) / count.
    """
    name = f"vp_discrete({beta_first:g},{beta_last:g},{count})"
    return _chain(name, torch.linspace(beta_first, beta_last, len(_times(count)), dtype=torch.float64))


def vp_scaled(beta_first: float = 8.5e-4, beta_last: float = 1.2e-2, count: int = 1000) -> Levels:
    """Return the chain whose betas have linear square roots ("scaled_linear" in diffusers)."""
    name = f"vp_scaled({beta_first:g},{beta_last:g},{count})"
    roots = torch.linspace(beta_first**0.5, beta_last**0.5, len(_times(count)), dtype=torch.float64)
    return _chain(name, roots.square())


def vp_cosine(offset: float = 0.008, largest: float = 0.999, count: int = 1000) -> Levels:
    """Return the chain with scale^2 along a squared cosine, betas at most `largest` (Nichol and Dhariwal, 2021)."""
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), _times(count)])
    kept = torch.cos((edges + offset) / (1.0 + offset) * math.pi / 2.0).square()
    name = f"vp_cosine({offset:g},{largest:g},{count})"
    return _chain(name, (1.0 - kept[1:] / kept[:-1]).clamp(max=largest))


def _chain(name: str, betas: Tensor) -> Levels:
    """The variance-preserving chain of the betas (T,)."""
    kept, rate = (1.0 - betas).cumprod(0), betas * len(betas)
    return Levels(name, _times(len(betas)), kept.sqrt(), (1.0 - kept).sqrt(), -0.5 * rate, rate)


def vp(beta_min: float = 0.1, beta_max: float = 20.0, count: int = 1000) -> Levels:
    """Return the variance-preserving equation in closed form: du = -beta/2 u dt + sqrt(beta) dw (Song et al., 2021).

    beta(t) is linear from `beta_min` to `beta_max`; scale = exp(-1/2 int beta), sigma^2 = 1 - scale^2; times k / count.
    """
    time = _times(count)
    integral, rate = _integral(beta_min, beta_max, time), beta_min + (beta_max - beta_min) * time
    scale, sigma = torch.exp(-0.5 * integral), (-torch.expm1(-integral)).sqrt()
    return Levels(f"vp({beta_min:g},{beta_max:g},{count})", time, scale, sigma, -0.5 * rate, rate)


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0, count: int = 1000) -> Levels:
    """Return the variance-exploding equation: du = sqrt(d sigma^2 / dt) dw (Song et al., 2021).

    scale 1, sigma(t) = sigma_min (sigma_max / sigma_min)^t, times k / count.
    """
    time = _times(count)
    growth = math.log(sigma_max / sigma_min)
    sigma = sigma_min * torch.exp(growth * time)
    one = torch.ones_like(time)
    return Levels(f"ve({sigma_min:g},{sigma_max:g},{count})", time, one, sigma, 0 * one, 2 * growth * sigma.square())


def sub_vp(beta_min: float = 0.1, beta_max: float = 20.0, count: int = 1000) -> Levels:
    """Return the sub-VP equation: the VP drift with g^2 = beta (1 - exp(-2 int beta)) (Song et al., 2021).

    scale = exp(-1/2 int beta), sigma = 1 - exp(-int beta): never more noise than VP at the same time.
    """
    time = _times(count)
    integral, rate = _integral(beta_min, beta_max, time), beta_min + (beta_max - beta_min) * time
    scale, sigma = torch.exp(-0.5 * integral), -torch.expm1(-integral)
    diffusion = rate * -torch.expm1(-2.0 * integral)
    return Levels(f"sub_vp({beta_min:g},{beta_max:g},{count})", time, scale, sigma, -0.5 * rate, diffusion)


TABLES: dict[str, Callable[..., Levels]] = {
    "vp_discrete": vp_discrete,
    "vp_scaled": vp_scaled,
    "vp_cosine": vp_cosine,
    "vp": vp,
    "ve": ve,
    "sub_vp": sub_vp,
}


def parse_levels(text: str) -> Levels:
    """Return the table that `text` names: "vp", or as `Levels.name` writes it, "vp_discrete(0.0001,0.02,1000)".

    InputError for an unknown name or arguments that are not numbers.
    """
    kind, _, rest = text.partition("(")
    arguments = [part for part in rest.rstrip(")").split(",") if part.strip()]
    if kind not in TABLES or len(arguments) > 3:
        raise InputError(f"levels '{text}'", "there is no such table", "known: " + ", ".join(TABLES))
    try:
        numbers = [float(part) for part in arguments]
    except ValueError as error:
        raise InputError(
            f"levels '{text}'", "its arguments are numbers", "write for example vp(0.1,20,1000)"
        ) from error
    return TABLES[kind](*numbers[:2], *(int(count) for count in numbers[2:]))
