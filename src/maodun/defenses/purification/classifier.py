"""The diffusion classifier: the class whose denoiser explains the image best, by its denoising error over all noise."""

from __future__ import annotations

import math
import re
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError, nearest
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.purification.denoiser import Denoiser, clean_estimate
from maodun.defenses.purification.levels import Levels, parse_levels, vp_discrete
from maodun.defenses.purification.loading import load_score
from maodun.defenses.purification.replay import Replay, Way
from maodun.defenses.purification.samplers import State

Weight = Literal["edm", "likelihood"]
# Karras et al. (2022): where training puts its noise, and the standard deviation of images in [-1, 1].
_MEAN, _SPREAD, _DATA = -1.2, 1.2, 0.5


class DiffusionClassifier(Defense):
    """Answer in the classifier's place: log p(y | x) from the denoising error of one score network per class.

    The logit of class y is minus the integral over tau, sigma / scale of the levels, of w(tau) E |D_y(u + tau n) - u|^2
    at u = 2x - 1, by `points` tau evenly from `least` to `most`, each with one noise that all classes share (Chen et
    al., Robust Classification via a Single Diffusion Model, ICML 2024). `weight` edm: w = (tau^2 + s^2) / (tau s)^2
    times the density of tau in EDM's training, s = 0.5 (the source); likelihood: w = tau^-3, with which the logits are
    log p(x | y) + const for exact denoisers (the pointwise form of the I-MMSE relation). `scores` are the networks,
    class by class: denoisers, or names of `load_score` separated by "," or "+". Behind `likelihood` in one stack
    it is the source's Robust Diffusion Classifier; there one network knows all classes, here each has its own, so it is
    for few classes. The exact gradient keeps the memory of one point. Costs classes x points evaluations. The
    classifier behind it is not asked. InputError for fewer than two networks, no points, a range of noise that is empty
    or beyond their training, and an unknown weight.
    """

    name = "diffusion_classifier"
    spec = DefenseSpec(stochastic=True, inner_loop=True)
    innermost = True
    gradient: Way = Replay()
    denoisers: nn.ModuleList

    def __init__(
        self,
        scores: str | list[Denoiser] = "",
        points: int = 16,
        least: float = 0.02,
        most: float = 1.0,
        weight: str = "edm",
        levels: str | Levels = "",
    ) -> None:
        super().__init__()
        named = [part for part in re.split("[,+]", scores) if part] if isinstance(scores, str) else scores
        if len(named) < 2:
            reason = f"has {len(named)} score networks, and every class needs its own"
            raise InputError("diffusion classifier", reason, "give scores=a.safetensors,b.safetensors in class order")
        if points < 1:
            raise InputError(f"points {points}", "there has to be at least one", "use 16 or more")
        if not 0.0 < least < most:
            raise InputError(f"noise {least:g} to {most:g}", "is an empty range", "use for example 0.02 to 1")
        if weight not in get_args(Weight):
            raise InputError(
                f"weight '{weight}'", "there is none of that name", nearest(weight, list(get_args(Weight)))
            )
        self.denoisers = nn.ModuleList(load_score(each).freeze() for each in named)
        own = getattr(self.denoisers[0], "levels", None) or vp_discrete()
        self.levels: Levels = (parse_levels(levels) if levels else own) if isinstance(levels, str) else levels
        taus = [least + (most - least) * (k + 0.5) / points for k in range(points)]
        self.path = [(self.levels.nearest(tau), k) for k, tau in enumerate(taus)]
        self.weights = [_weight(weight, tau) * (most - least) / points for tau in taus]
        for net in self._networks:
            net.need_range(self.levels, self.levels.nearest(most))
        self.points, self.least, self.most, self.weight = points, least, most, weight
        self.spec = DefenseSpec(stochastic=True, inner_loop=True, nfe=points * len(named))

    @property
    def _networks(self) -> list[Denoiser]:
        return [net for net in self.denoisers if isinstance(net, Denoiser)]

    @property
    def replays(self) -> int:
        """How many evaluations of each network need the memory of one."""
        return self.points

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`: as a map of inputs it is the identity."""
        return x

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of the classes, N x classes, whatever `model` would say."""
        del model
        self.need_images(x)
        for net in self._networks:
            net.need_shape(x)
        start = x.new_zeros((x.shape[0], len(self.denoisers)))
        with context.ensured(x):
            errors = self.gradient.run(_Errors(self, tuple(x.shape[1:])), self.path, (start,), (2.0 * x - 1.0,))
        return -errors

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"points={self.points}, least={self.least}, most={self.most}, weight={self.weight!r}"


class _Errors:
    """The sum over the noise levels as a chain: the state is what has been summed, the image guides every move."""

    def __init__(self, owner: DiffusionClassifier, shape: tuple[int, ...]) -> None:
        self.owner, self.shape = owner, shape

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return the noise of point `i`, image-shaped, one for all classes."""
        del t
        return context.noise(x, f"{self.owner.name}-{i}").normal(self.shape)

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State) -> State:
        """Return the sums with point number `s` at level `t` added."""
        owner, u = self.owner, guide[0]
        scale, sigma = owner.levels.at(t)
        noisy = scale * u + sigma * noise
        seen = [clean_estimate(net, owner.levels, noisy, t) for net in owner._networks]
        errors = torch.stack([(each - u).flatten(1).square().sum(1) for each in seen], 1)
        return (state[0] + owner.weights[s] * errors,)


def _weight(kind: str, tau: float) -> float:
    """Return w(tau)."""
    if kind == "likelihood":
        return tau**-3
    density = math.exp(-0.5 * ((math.log(tau) - _MEAN) / _SPREAD) ** 2) / (tau * _SPREAD * math.sqrt(2 * math.pi))
    return (tau**2 + _DATA**2) / (tau * _DATA) ** 2 * density


__all__ = ["DiffusionClassifier"]
