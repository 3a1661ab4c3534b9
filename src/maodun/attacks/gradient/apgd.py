"""Auto-PGD, untargeted and over many targets; a run itself is `climb.Climb`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.gradient import climb
from maodun.attacks.gradient.climb import Climb
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.losses import get_loss
from maodun.core.problem import Problem
from maodun.core.threat import Threat


@dataclass
class APGDState(State):
    """`climb` is the run under way; `phase` its place in the schedule of radii, `start` the number of the next start.

    `aims` (N x T) are the targets of the runs, best first, or None; `x` stays the clean input. `top` (N x ...) and
    `top_loss` (N,) are the best point of the runs before this one, and None in the first.
    """

    climb: Climb
    phase: int
    start: int
    aims: Tensor | None
    top: Tensor | None = None
    top_loss: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class APGD(Attack[APGDState]):
    """Auto-PGD: ascent with momentum whose step size adapts to each sample's progress (Croce and Hein, 2020, 2021).

    Inputs N x ..., values in [0, 1]. `loss` is ce, dlr, margin or probability. `steps` per run; `restarts` runs from
    random points of the ball's surface, on the samples not yet broken. `rho` is the share of rising steps below which
    the step size halves. `larger_eps` (l1 only) spends 30 % of the steps in 3 eps, 30 % in 2 eps, the rest in eps.
    Costs steps + 1 forwards and backwards per sample and run (+ 3 with `larger_eps`), less what stops early.
    """

    name: ClassVar[str] = "apgd"

    loss: str = "ce"
    steps: int = 100
    restarts: int = 1
    rho: float = 0.75
    larger_eps: bool = False

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for option in ("steps", "restarts"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} {getattr(self, option)}", "must be at least 1", "give a positive number")

    @property
    def runs(self) -> int:
        """The most runs a sample can take part in, one after another."""
        return self.restarts

    @property
    def total_steps(self) -> int:
        """All gradients of all runs, less the one that `init` takes."""
        extra = 3 if self.larger_eps else 1
        return self.runs * (self.steps + extra) - 1

    def phases(self, threat: Threat) -> list[tuple[Threat, int]]:
        """Return the balls climbed in one after another, each with its steps."""
        if not self.larger_eps or threat.norm != "l1" or self.steps < 3:
            return [(threat, self.steps)]
        part = math.ceil(0.3 * self.steps)
        steps = (part, part, self.steps - 2 * part)
        return [(threat.with_eps(k * threat.eps), n) for k, n in zip((3.0, 2.0, 1.0), steps, strict=True) if n > 0]

    def init(self, problem: Problem) -> APGDState:
        """Begin the first run at a random point of the ball's surface."""
        aims = self.aims(problem)
        done = torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device)
        run = self._begin(problem, aims, 0)
        return APGDState(problem.x, done, run, 0, run.lanes, aims)

    def step(self, problem: Problem, state: APGDState) -> APGDState:
        """Take one step of the run under way, or begin the next one."""
        run = state.climb
        phases = self.phases(climb.finite(problem.threat, problem.x))
        if not run.over:
            run.advance()
        elif state.phase + 1 < len(phases):
            threat, steps = phases[state.phase + 1]
            start = threat.project(run.best, run.view.x)
            state.climb = climb.begin(
                run.view, start, self.loss, steps, threat=threat, targets=run.targets, lanes=run.lanes, rho=self.rho,
                continued=True,
            )  # fmt: skip
            state.phase += 1
        elif state.start < self._starts(state.aims):
            state.top, state.top_loss = _top(state)
            state.climb = self._begin(problem, state.aims, state.start)
            state.start, state.phase = state.start + state.climb.lanes, 0
        last = state.start >= self._starts(state.aims) and state.phase + 1 == len(phases)
        if last and state.climb.over:
            state.done = torch.ones_like(state.done)
        return state

    def finish(self, problem: Problem, state: APGDState) -> None:
        """Nothing is left to look at: every iterate has been evaluated."""

    def answer(self, state: APGDState) -> Tensor:
        """Return the point of the highest loss of all runs."""
        return _top(state)[0]

    def aims(self, problem: Problem) -> Tensor | None:  # noqa: ARG002 - a hook
        """Return the targets (N x T) that the runs climb to; None leaves the goal to the problem."""
        return None

    def _starts(self, aims: Tensor | None) -> int:
        return self.restarts * (1 if aims is None else aims.shape[1])

    def _begin(self, problem: Problem, aims: Tensor | None, first: int) -> Climb:
        """Begin runs `first` to `first + lanes` side by side; run r climbs to target r // restarts."""
        threat, steps = self.phases(climb.finite(problem.threat, problem.x))[0]
        lanes = self.lanes(problem, self._starts(aims) - first)
        view = problem if lanes == 1 else problem.repeat(lanes)
        number = torch.arange(first, first + lanes, device=problem.x.device)
        targets = None if aims is None else aims[:, number // self.restarts].flatten()
        stream = problem.stream(f"{self.name}/{self.loss}/start")
        start = climb.surface_start(threat, view.x, stream, view.ids, number.repeat(len(problem)))
        return climb.begin(
            view, start, self.loss, steps, threat=threat, targets=targets, lanes=lanes, rho=self.rho,
            continued=threat.eps > problem.threat.eps,
        )  # fmt: skip

    def lanes(self, problem: Problem, left: int) -> int:  # noqa: ARG002 - a hook
        """Return how many of the runs `left` each sample takes side by side."""
        return 1


@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """Auto-PGD towards many targets in turn on the targeted DLR loss (Croce and Hein, 2020): untargeted in effect.

    `targets` wrong classes are tried, most likely first by the clean logits (fewer when the model has fewer classes); a
    sample leaves as soon as any class but its own is reached. With a targeted threat only the given class is tried.
    When few samples are left, several targets share one model call (`together`: how many; None chooses so that calls
    stay cheap, 1 is the published one after another). This changes no verdict, only when a success is seen.
    """

    name: ClassVar[str] = "apgd-t"

    loss: str = "dlr"
    targets: int = 9
    together: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for option, value in (("targets", self.targets), ("together", self.together)):
            if value is not None and value < 1:
                raise InputError(f"{option} {value}", "must be at least 1", "give a positive number")

    @property
    def runs(self) -> int:
        """Targets times restarts."""
        return self.targets * self.restarts

    def aims(self, problem: Problem) -> Tensor | None:
        """Return the most likely wrong classes of every sample, N x min(targets, classes - 1)."""
        if problem.targets is not None:
            return problem.targets.unsqueeze(1)
        return likely_targets(problem.clean(), problem.y, self.targets)

    def lanes(self, problem: Problem, left: int) -> int:
        """As many as fill a cheap model call, shared out evenly; one for stochastic models (draws are numbered)."""
        if problem.session.stochastic:
            return 1
        most = self.together or max(1, climb.rows_at_once(problem) // max(1, len(problem)))
        most = min(most, left)
        return math.ceil(left / math.ceil(left / most))


def likely_targets(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """Return the `count` classes other than `y` with the largest logits (N x min(count, C - 1)), largest first."""
    others = logits.scatter(1, y.unsqueeze(1), -math.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def _top(state: APGDState) -> tuple[Tensor, Tensor]:
    """Return the best point of all runs so far (N x ...), and its loss (N,)."""
    run = state.climb
    losses, lane = run.best_loss.view(-1, run.lanes).max(1)
    best = run.best[torch.arange(len(lane), device=lane.device) * run.lanes + lane]
    if state.top is None or state.top_loss is None:
        return best, losses
    higher = losses > state.top_loss
    return torch.where(higher.reshape(-1, *([1] * (best.ndim - 1))), best, state.top), torch.maximum(
        losses, state.top_loss
    )
