"""Projected gradient ascent and its one-step and momentum forms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.core.engine import Attack, State
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.geometry import norms, per_sample
from maodun.core.losses import DEPARTURES, check_loss
from maodun.core.problem import Problem
from maodun.core.threat import Threat


@dataclass
class PGDState(State):
    """`velocity` is the accumulated gradient of the momentum forms (None without); `step` counts all steps taken."""

    velocity: Tensor | None
    step: int


@dataclass(frozen=True, kw_only=True)
class PGD(Attack[PGDState]):
    """Projected gradient ascent on a loss inside the threat's ball (Madry et al., ICLR 2018).

    Inputs N x ..., values in [0, 1]. `loss` is ce, margin, dlr or probability, or, whatever the labels say, kl or
    square (how far the answer moves from the clean one). `steps` per restart. `step_size` is in input units; None
    means eps / 4, or 2.5 * eps / steps where that is more. `restarts` runs from fresh starts, on the samples not yet
    broken. `random_start` draws the start uniformly from the ball. Costs `steps` forwards and backwards per sample
    and restart and one last forward, less what stops early.
    """

    name: ClassVar[str] = "pgd"

    loss: str = "ce"
    steps: int = 40
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True

    def __post_init__(self) -> None:
        check_loss(self.loss)
        for option in ("steps", "restarts"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} {getattr(self, option)}", "must be at least 1", "give a positive number")

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse a target for a loss that knows no classes, besides what every attack refuses."""
        super().check(x, threat)
        if threat.targeted and self.loss in DEPARTURES:
            raise UnsupportedError(f"loss '{self.loss}'", "moves away from the clean answer, not to a target", "use ce")

    @property
    def total_steps(self) -> int:
        """All steps over all restarts."""
        return self.steps * self.restarts

    def init(self, problem: Problem) -> PGDState:
        """Start at a random point of the ball, or at the clean input."""
        done = torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device)
        return PGDState(x=self._start(problem, 0), done=done, velocity=None, step=0)

    def step(self, problem: Problem, state: PGDState) -> PGDState:
        """Climb once along the steepest direction of the threat's norm."""
        gradient, state = self.slope(problem, state)
        direction, velocity = self.direction(problem, state, gradient)
        x = problem.threat.project(state.x + self.rate(problem) * direction, problem.x)
        state = replace(state, x=x, velocity=velocity, step=state.step + 1)
        if state.step % self.steps == 0 and state.step < self.total_steps:
            problem.logits(x)
            state = replace(state, x=self._start(problem, state.step // self.steps), velocity=None)
        return state

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the gradient to climb, and the state with what a subclass carries on."""
        return problem.gradient(self.look(problem, state), self.loss)[2], state

    def look(self, problem: Problem, state: PGDState) -> Tensor:  # noqa: ARG002 - a hook
        """Return the point at which the gradient is taken."""
        return state.x

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the unit step and the velocity to carry on."""
        return problem.threat.steepest(gradient, state.x), None

    def rate(self, problem: Problem) -> float:
        """Return the step size in input units."""
        eps = min(problem.threat.eps, 1e3)
        return max(2.5 / self.steps, 0.25) * eps if self.step_size is None else self.step_size

    def _start(self, problem: Problem, restart: int) -> Tensor:
        if not self.random_start and restart == 0:
            return problem.x.clone()
        return problem.threat.random_start(problem.x, problem.stream(f"{self.name}/start"), problem.ids, restart)


@dataclass(frozen=True, kw_only=True)
class FGSM(PGD):
    """One signed gradient step of size eps from the clean input (Goodfellow et al., ICLR 2015).

    In l2 and l1 it is the fast gradient method: one step of length eps along the steepest direction of the norm.
    """

    name: ClassVar[str] = "fgsm"

    steps: int = 1
    random_start: bool = False

    def rate(self, problem: Problem) -> float:
        """The whole radius, unless a step size is given."""
        return problem.threat.eps if self.step_size is None else self.step_size


@dataclass(frozen=True, kw_only=True)
class BIM(PGD):
    """The basic iterative method: signed steps of eps / steps from the clean input (Kurakin et al., 2017)."""

    name: ClassVar[str] = "bim"

    steps: int = 10
    random_start: bool = False

    def rate(self, problem: Problem) -> float:
        """The radius shared out over the steps, unless a step size is given."""
        return problem.threat.eps / self.steps if self.step_size is None else self.step_size


@dataclass(frozen=True, kw_only=True)
class MIFGSM(BIM):
    """BIM with momentum on l1-normalised gradients (Dong et al., CVPR 2018).

    `decay` is the momentum factor. A gradient of exactly zero adds nothing (it is not divided by its norm).
    """

    name: ClassVar[str] = "mifgsm"

    decay: float = 1.0

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the steepest step along the accumulated gradient."""
        length = norms(gradient, "l1") / gradient[0].numel()
        scaled = gradient / per_sample(torch.where(length > 0, length, torch.ones_like(length)), gradient)
        velocity = scaled if state.velocity is None else scaled + self.decay * state.velocity
        return problem.threat.steepest(velocity, state.x), velocity


@dataclass(frozen=True, kw_only=True)
class NIFGSM(MIFGSM):
    """MI-FGSM with Nesterov's look-ahead (Lin et al., ICLR 2020): the gradient is taken where the momentum leads."""

    name: ClassVar[str] = "nifgsm"

    def look(self, problem: Problem, state: PGDState) -> Tensor:
        """Return the look-ahead point, inside the box."""
        if state.velocity is None:
            return state.x
        return (state.x + self.rate(problem) * self.decay * state.velocity).clamp(0.0, 1.0)
