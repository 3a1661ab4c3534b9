"""Ascent made for purifiers: DiffHammer climbs for the draws it can turn, DiffAttack leads the purifier astray too."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from maodun.attacks.gradient.pgd import PGD, PGDState
from maodun.core.errors import InputError
from maodun.core.estimators import BPDA, EOT, Estimator, Exact, Surrogate
from maodun.core.problem import Problem
from maodun.core.selective import Deviating, Selective


@dataclass(frozen=True, kw_only=True)
class _Smooth(PGD):
    """PGD along gradients averaged over the steps, weight 1 / sqrt(k + 1) for the new one, with steps that shrink."""

    loss: str = "margin"
    steps: int = 50
    draws: int = 10

    def estimator(self, problem: Problem) -> Estimator:
        """Return where gradients come from."""
        raise NotImplementedError("a subclass has its own")

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the gradient averaged with those of the steps before, and the state that remembers it."""
        fresh = problem.gradient(state.x, self.loss, estimator=self.estimator(problem))[2]
        share = (state.step % self.steps + 1) ** -0.5
        smooth = fresh if state.velocity is None else share * fresh + (1.0 - share) * state.velocity
        return smooth, replace(state, velocity=smooth)

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the steepest step, shorter towards the end, and the gradient to carry on."""
        done = (state.step % self.steps) / self.steps
        return 0.5 * (1.0 + math.cos(math.pi * done)) * problem.threat.steepest(gradient, state.x), state.velocity


@dataclass(frozen=True, kw_only=True)
class DiffHammer(_Smooth):
    """Ascent along gradients selected among draws by expectation and maximisation (Wang et al., NeurIPS 2024).

    For defences that differ from call to call: where the draws' gradients disagree, their mean (EOT) helps against none
    of them. Each step takes `draws` draws at once, weighs them in `rounds` rounds by what a step towards them would
    give (`sharpness` is the slope of the weights in units of the margin), and climbs the selected gradient, smoothed
    over the steps with weight 1 / sqrt(k + 1) for the new one; the step size falls along half a cosine. `loss` margin,
    or what grows above 0 when the sample is fooled. Through an oracle with BPDA or surrogate gradients it selects among
    those. A reconstruction: full gradients of all draws instead of the original's grafting onto one. Costs
    `draws` times PGD.
    """

    name: ClassVar[str] = "diffhammer"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    rounds: int = 5
    sharpness: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, least in (("draws", 2), ("rounds", 1)):
            if getattr(self, option) < least:
                raise InputError(f"{option} {getattr(self, option)}", f"must be at least {least}", "use the default")
        if self.loss in ("ce", "kl", "square"):
            raise InputError(f"loss '{self.loss}'", "has no value that means success", "use margin or dlr")
        if not self.sharpness > 0:
            raise InputError(f"sharpness {self.sharpness}", "must be positive", "use 5")

    def estimator(self, problem: Problem) -> Estimator:
        """Return the selection among the draws of what the oracle differentiates."""
        inner = _inner(problem.session.oracle.gradient)
        reach = min(problem.threat.eps, 1e3)
        return Selective(partial(_steepest, problem), reach, inner, self.draws, self.rounds, self.sharpness)


@dataclass(frozen=True, kw_only=True)
class DiffAttack(_Smooth):
    """Ascent on the loss plus how far a purifier's way back strays from its way there (Kang et al., NeurIPS 2023).

    `weight` times the deviation (the mean square distance of the states, in the diffusion's units, over all levels of
    the way back) is added to `loss`, averaged over `draws` draws; gradients are averaged over the steps as DiffHammer's
    are. Against a defence that is no purifier it is PGD with EOT. A reconstruction: the original's code is not public.
    Keeps the activations of the whole chain. Costs `draws` times PGD.
    """

    name: ClassVar[str] = "diffattack"

    weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.draws < 1:
            raise InputError(f"draws {self.draws}", "there has to be at least one", "use 10")
        if not self.weight >= 0:
            raise InputError(f"weight {self.weight}", "cannot be negative", "use 1")

    def estimator(self, problem: Problem) -> Estimator:  # noqa: ARG002 - the base asks with it
        """Return the mean over the draws of loss and deviation."""
        return Deviating(self.weight, self.draws)


def _steepest(problem: Problem, gradient: Tensor) -> Tensor:
    return problem.threat.steepest(gradient, gradient)


def _inner(gradient: object) -> Exact | BPDA | Surrogate:
    """Return how the oracle takes one draw's gradient; the exact one where it takes none."""
    inner = gradient.inner if isinstance(gradient, EOT) else gradient
    return inner if isinstance(inner, Exact | BPDA | Surrogate) else Exact()
