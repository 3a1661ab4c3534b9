"""DiffHammer: ascent for stochastic defences that climbs for the draws it can turn and lets the hopeless ones go."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from torch import Tensor

from maodun.attacks.gradient.pgd import PGD, PGDState
from maodun.core.errors import InputError
from maodun.core.estimators import BPDA, EOT, Exact, Surrogate
from maodun.core.problem import Problem
from maodun.core.selective import Selective


@dataclass(frozen=True, kw_only=True)
class DiffHammer(PGD):
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

    loss: str = "margin"
    steps: int = 50
    draws: int = 10
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

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the selected gradient, averaged with those of the steps before, and the state that remembers it."""
        selective = Selective(
            partial(_steepest, problem),
            min(problem.threat.eps, 1e3),
            _inner(problem.session.oracle.gradient),
            self.draws,
            self.rounds,
            self.sharpness,
        )
        fresh = problem.gradient(state.x, self.loss, estimator=selective)[2]
        share = (state.step % self.steps + 1) ** -0.5
        smooth = fresh if state.velocity is None else share * fresh + (1.0 - share) * state.velocity
        return smooth, replace(state, velocity=smooth)

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the steepest step, shorter towards the end, and the gradient to carry on."""
        done = (state.step % self.steps) / self.steps
        return 0.5 * (1.0 + math.cos(math.pi * done)) * problem.threat.steepest(gradient, state.x), state.velocity


def _steepest(problem: Problem, gradient: Tensor) -> Tensor:
    return problem.threat.steepest(gradient, gradient)


def _inner(gradient: object) -> Exact | BPDA | Surrogate:
    """Return how the oracle takes one draw's gradient; the exact one where it takes none."""
    inner = gradient.inner if isinstance(gradient, EOT) else gradient
    return inner if isinstance(inner, Exact | BPDA | Surrogate) else Exact()
