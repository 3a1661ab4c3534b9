"""The iterative transfer attack: one loop, and hooks by name that change what is climbed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.gradient.pgd import NIFGSM, PGDState
from maodun.attacks.transfer import rules
from maodun.attacks.transfer.inputs import perturb_spectrum, resize_and_pad
from maodun.attacks.transfer.smoothing import smooth
from maodun.core.errors import InputError, UnsupportedError, nearest
from maodun.core.problem import Problem
from maodun.core.threat import Threat

HOOKS = ("mi", "ni", "vmi", "di", "ti", "si", "ssm")
_MOMENTUM = {"mi", "ni", "vmi"}
_PICTURES = {"di", "ti", "ssm"}
# More gradients than any step takes: what is drawn in one step is not drawn again in the next.
_TURNS = 1 << 16


@dataclass
class TransferState(PGDState):
    """`variance` is VMI's correction for the next step, `inner` CWA's momentum among the members (None: not used)."""

    variance: Tensor | None = None
    inner: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Transfer(NIFGSM):
    """BIM with hooks for transfer, composed by name, such as di-ti-mi.

    Inputs N x ..., values in [0, 1]; di, ti and ssm need images N x C x H x W. `hooks` are names joined by dashes, in
    any order: mi momentum (Dong et al., CVPR 2018), ni its look-ahead and si the mean over `scales` copies x / 2^i
    (Lin et al., ICLR 2020), vmi momentum with the gradient's variance over `neighbours` in `beta` * eps (Wang and He,
    CVPR 2021), di resizing by up to `resize` with `probability` (Xie et al., CVPR 2019), ti smoothing by a Gaussian
    of `kernel` pixels (Dong et al., CVPR 2019), ssm the mean over `spectra` copies with noise of size `sigma` and
    frequencies changed by up to `rho` (Long et al., ECCV 2022). No hooks ("") is BIM. ni and vmi bring momentum.
    `ensemble` says what the members of an Ensemble add up to: fused (its own mean), losses, svre, adaea or cwa; `inner`
    is SVRE's number of inner steps (None: four per member). For one model all are the same. The eps ball is walked in
    `steps` of `step_size` (None: eps / steps). A step costs one forward and backward per model, times `scales` with
    si, `spectra` with ssm and `neighbours` + 1 with vmi; svre adds `inner` and one per member drawn, adaea the
    members' number squared in forwards, cwa one per member. Copies enter the model clipped to [0, 1], the derivative
    passes by the clipping. InputError for unknown hooks or rules and for options out of range.
    """

    name: ClassVar[str] = "transfer"

    hooks: str = "di-ti-mi"
    ensemble: str = "fused"
    resize: float = 1.1
    probability: float = 0.5
    kernel: int = 7
    scales: int = 5
    neighbours: int = 20
    beta: float = 1.5
    spectra: int = 20
    rho: float = 0.5
    sigma: float = 16 / 255
    inner: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for hook in self.chosen:
            if hook not in HOOKS:
                raise InputError(f"hook '{hook}'", "is not a hook known here", nearest(hook, list(HOOKS)))
        if len(self.chosen) > len(set(self.chosen)):
            raise InputError(f"hooks '{self.hooks}'", "name one hook twice", "name each once")
        if self.ensemble not in rules.RULES:
            hint = nearest(self.ensemble, list(rules.RULES))
            raise InputError(f"ensemble '{self.ensemble}'", "is not a rule known here", hint)
        if "vmi" in self.chosen and self.ensemble in ("svre", "cwa", "adaea"):
            reason = "has no variance that vmi could correct"
            raise InputError(f"ensemble '{self.ensemble}'", reason, "use it with mi, or vmi with fused or losses")
        for option in ("scales", "spectra"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} {getattr(self, option)}", "must be at least 1", "give a positive number")
        if self.neighbours < 0 or (self.inner is not None and self.inner < 1):
            raise InputError("neighbours and inner", "are counts", "give neighbours >= 0 and inner >= 1")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise InputError(f"kernel {self.kernel}", "has no middle", "give an odd number of pixels such as 7 or 15")
        if not (0.0 <= self.probability <= 1.0 and self.rho >= 0.0 and self.resize > 0.0):
            raise InputError("probability, rho or resize", "is out of range", "give shares in [0, 1] and resize > 0")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The hooks by name, in the order given."""
        return tuple(hook for hook in self.hooks.split("-") if hook)

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse what the class refuses, and hooks made for pictures where inputs are none."""
        super().check(x, threat)
        pictures = [hook for hook in self.chosen if hook in _PICTURES]
        if pictures and x.ndim != 4:
            raise UnsupportedError(
                f"hook '{pictures[0]}'", f"needs images N x C x H x W, got {tuple(x.shape)}", "use mi, ni, si or vmi"
            )

    def init(self, problem: Problem) -> TransferState:
        """Start where BIM does."""
        plain = super().init(problem)
        return TransferState(x=plain.x, done=plain.done, velocity=None, step=0)

    def look(self, problem: Problem, state: PGDState) -> Tensor:
        """Return the look-ahead point of ni, else the iterate."""
        return super().look(problem, state) if "ni" in self.chosen else state.x

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the steepest step along the gradient, accumulated where a hook brings momentum."""
        if _MOMENTUM.isdisjoint(self.chosen):
            return problem.threat.steepest(gradient, state.x), None
        return super().direction(problem, state, gradient)

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the direction to climb after all hooks but momentum, and the state to carry on."""
        if not isinstance(state, TransferState):
            raise TypeError("a transfer attack carries its own state")
        x, turns = self.look(problem, state), itertools.count(state.step * _TURNS)
        if state.velocity is None:
            state = replace(state, variance=None, inner=None)

        def slope(one: Problem, at: Tensor) -> Tensor:
            return self._hooked(one, at, turns)

        if self.ensemble == "cwa":
            gradient, inner = rules.cwa(problem, x, slope, self.decay, state.inner)
            return gradient, replace(state, inner=inner)
        if self.ensemble == "svre":
            inner_steps = 4 * len(problem.members()) if self.inner is None else self.inner
            order = problem.stream("transfer/svre").child(state.step)
            return rules.svre(problem, x, slope, self.rate(problem), self.decay, inner_steps, order), state
        if self.ensemble == "adaea":
            return rules.adaea(problem, x, slope, self.rate(problem)), state
        pooled = rules.losses if self.ensemble == "losses" else _fused
        gradient = pooled(problem, x, slope)
        if "vmi" not in self.chosen or not self.neighbours or not self.beta:
            return gradient, state
        variance = self._around(problem, x, slope, state.step) - gradient
        if state.variance is not None:
            gradient = gradient + state.variance
        return gradient, replace(state, variance=variance)

    def _around(self, problem: Problem, x: Tensor, slope: rules.Slope, step: int) -> Tensor:
        """Return the mean gradient at `neighbours` drawn uniformly from the box of beta * eps around `x`."""
        pooled = rules.losses if self.ensemble == "losses" else _fused
        noise, reach = problem.stream("transfer/vmi"), self.beta * min(problem.threat.eps, 1.0)
        total = torch.zeros_like(x)
        for place in range(self.neighbours):
            draws = noise.uniform(problem.ids, tuple(x.shape[1:]), step * self.neighbours + place).to(x)
            near = (x + reach * (2 * draws - 1)).clamp_(0.0, 1.0)
            total += pooled(problem, near, slope)
        return total / self.neighbours

    def _hooked(self, problem: Problem, x: Tensor, turns: Iterator[int]) -> Tensor:
        """Return the gradient through the input hooks, averaged over their copies, smoothed by ti."""
        scales = [0.5**power for power in range(self.scales if "si" in self.chosen else 1)]
        copies = [scale for scale in scales for _ in range(self.spectra if "ssm" in self.chosen else 1)]
        total = torch.zeros_like(x)
        for scale in copies:
            total += self._through(problem, x, scale, next(turns))
        total /= len(copies)
        return smooth(total, self.kernel) if "ti" in self.chosen else total

    def _through(self, problem: Problem, x: Tensor, scale: float, turn: int) -> Tensor:
        """Return the gradient of one changed copy with respect to `x`; the model is asked at the copy."""
        if {"di", "ssm"}.isdisjoint(self.chosen):
            return problem.gradient(x * scale, self.loss)[2] * scale
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            copy = leaf * scale
            if "ssm" in self.chosen:
                noise = problem.stream("transfer/ssm")
                copy = perturb_spectrum(copy, noise, problem.ids, turn, self.rho, self.sigma)
            if "di" in self.chosen:
                noise = problem.stream("transfer/di")
                copy = resize_and_pad(copy, noise, problem.ids, turn, self.resize, self.probability)
            gradient = problem.gradient(copy.detach().clamp(0.0, 1.0), self.loss)[2]
            (through,) = torch.autograd.grad(copy, leaf, gradient)
        return through


def _fused(problem: Problem, x: Tensor, slope: rules.Slope) -> Tensor:
    return slope(problem, x)
