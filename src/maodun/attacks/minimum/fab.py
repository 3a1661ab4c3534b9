"""Fast adaptive boundary attack: walk along the boundary of one class after another, always drawn back to the input."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.minimum.common import dual_length, refuse_below, stuck, succeeded
from maodun.attacks.minimum.hyperplane import reach
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.estimators import Heads
from maodun.core.geometry import norms, per_sample
from maodun.core.losses import best_other
from maodun.core.problem import Problem

_START_RADIUS = {"linf": 0.3, "l2": 1.0, "l1": 5.0}
_TINY = 1e-8


@dataclass
class FABState(State):
    """`x` (N, L, ...) holds L points per sample, one for each of its targets now under way.

    `rivals` (N, K) are the classes in the order of the sweep; `run` is the number of runs (class and restart) ended so
    far, `lanes` L how many are under way, `step` their iteration.
    """

    rivals: Tensor
    run: int
    lanes: int
    step: int


@dataclass(frozen=True, kw_only=True)
class FAB(Attack[FABState]):
    """Fast adaptive boundary attack (Croce and Hein, ICML 2020), by default its targeted form as in AutoAttack.

    Inputs N x ..., values in [0, 1]; norms linf, l2, l1. Each iteration projects the iterate and the clean input onto
    the linearised boundary within the box, blends the two with weight at most `alpha_max`, overshoots by `eta`, and
    draws a point that fools the model back by `beta`. With `sweep` the `targets` likeliest rivals by the clean logits
    are taken one after another, `steps` iterations each (one backward an iteration); without, every iteration heads for
    the nearest of the `targets` boundaries (one backward for each; None: all classes). `restarts` runs per class, the
    first from the clean input, later ones from half the threat's radius away. When at most `together` / 2 samples
    are left, several classes run at once as extra rows: same results, fuller batches.

    An untargeted goal counts any wrong class, whatever class the iterate heads for; a targeted one walks along the
    boundary of its target. Costs 2 forwards and a backward per iteration.
    """

    name: ClassVar[str] = "fab"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    kind: ClassVar[str] = "minimum"

    steps: int = 100
    targets: int | None = 9
    restarts: int = 1
    sweep: bool = True
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    together: int = 32

    def __post_init__(self) -> None:
        least = {"steps": self.steps, "targets": 1 if self.targets is None else self.targets, "restarts": self.restarts}
        refuse_below(self.name, **{name: (value, 1) for name, value in least.items()}, eta=(self.eta, 1.0))
        if self.sweep and self.targets is None:
            raise InputError("option 'targets' of fab", "is missing for a sweep", "give a number of classes, as 9")

    @property
    def total_steps(self) -> int:
        """The most iterations a sample takes; fewer when there are fewer classes or several run at once."""
        return self.steps * self.restarts * (self.targets or 1 if self.sweep else 1)

    def init(self, problem: Problem) -> FABState:
        """Order the rivals by the clean logits and start the first run."""
        if problem.targets is not None:
            rivals = problem.targets.unsqueeze(1)
        else:
            logits = problem.clean()
            others = logits.scatter(1, problem.y.unsqueeze(1), -math.inf)
            limit = logits.shape[1] - 1 if self.targets is None else min(self.targets, logits.shape[1] - 1)
            rivals = others.argsort(dim=1, descending=True, stable=True)[:, :limit]
        done = torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device)
        return self._begin(problem, FABState(x=problem.x, done=done, rivals=rivals, run=0, lanes=1, step=0))

    def step(self, problem: Problem, state: FABState) -> FABState:
        """Move every point towards its linearised boundary and the clean input, and look at where it landed."""
        wide = problem if state.lanes == 1 else problem.repeat(state.lanes)
        x, clean = state.x.flatten(0, 1), wide.x
        _, values, gradients = wide.values_and_gradients(x, self._heads(wide, state))
        value, normal = _nearest(values, gradients, problem.threat.norm)
        x = self._blend(x, clean, value, normal, problem.threat.norm)
        success = succeeded(wide, x, wide.logits(x))
        x = torch.where(per_sample(success.to(x.dtype), x) > 0, clean + (x - clean) * self.beta, x)
        state = replace(state, x=x.reshape(state.x.shape), step=state.step + 1)
        # A model without gradients gives no run a direction: each is left after one look.
        if state.step < self.steps and not bool(stuck(problem).all()):
            return state
        state = replace(state, run=state.run + state.lanes)
        if state.run >= self._runs(state):
            return replace(state, done=torch.ones_like(state.done))
        return self._begin(problem, state)

    def finish(self, problem: Problem, state: FABState) -> None:
        """Do nothing: every point has been looked at."""

    def _runs(self, state: FABState) -> int:
        return self.restarts * (state.rivals.shape[1] if self.sweep else 1)

    def _begin(self, problem: Problem, state: FABState) -> FABState:
        """Start the next run, or as many as fill a batch when few samples are left."""
        room = self.together // max(1, len(problem)) if self.sweep else 1
        lanes = max(1, min(room, self._runs(state) - state.run))
        starts = [self._start(problem, (state.run + lane) % self.restarts) for lane in range(lanes)]
        return replace(state, x=torch.stack(starts, dim=1), lanes=lanes, step=0)

    def _start(self, problem: Problem, restart: int) -> Tensor:
        if restart == 0:
            return problem.x
        norm, eps = problem.threat.norm, problem.threat.eps
        radius = _START_RADIUS[norm] if math.isinf(eps) else eps
        stream, shape = problem.stream("fab/start"), tuple(problem.x.shape[1:])
        if norm == "linf":
            noise = stream.uniform(problem.ids, shape, restart) * 2.0 - 1.0
        else:
            noise = stream.normal(problem.ids, shape, restart)
        noise = noise.to(problem.x)
        scale = 0.5 * radius / norms(noise, norm).clamp(min=_TINY)
        return (problem.x + noise * per_sample(scale, noise)).clamp_(0.0, 1.0)

    def _heads(self, wide: Problem, state: FABState) -> Heads:
        if self.sweep:
            first = state.run
            runs = torch.arange(first, first + state.lanes, device=state.x.device) // self.restarts
            rivals = state.rivals[:, runs].reshape(-1, 1)
        else:
            rivals = state.rivals

        def heads(logits: Tensor, index: Tensor) -> Tensor:
            if wide.targets is not None:
                aim = wide.targets[index]
                return logits.gather(1, aim.unsqueeze(1)) - best_other(logits, aim).unsqueeze(1)
            return logits.gather(1, rivals[index]) - logits.gather(1, wide.y[index].unsqueeze(1))

        return heads

    def _blend(self, x: Tensor, clean: Tensor, value: Tensor, normal: Tensor, norm: str) -> Tensor:
        """Return the next point: between the projections of the iterate and of the clean input, both overshot."""
        points = torch.stack([x.flatten(1), clean.flatten(1)])
        flat = normal.flatten(1)
        gap = torch.stack([value, value + (flat * (points[1] - points[0])).sum(1)])
        moves = reach(points, flat, gap, norm)
        near, far = norms(moves.flatten(0, 1), norm).clamp_(min=_TINY).reshape(2, -1, 1)
        alpha = (near / (near + far)).clamp_(max=self.alpha_max)
        points.add_(moves, alpha=self.eta)
        return torch.lerp(points[0], points[1], alpha).clamp_(0.0, 1.0).reshape(x.shape)


def _nearest(values: Tensor, gradients: list[Tensor], norm: str) -> tuple[Tensor, Tensor]:
    """Return value and gradient of the boundary nearest to each point by its linearisation."""
    if len(gradients) == 1:
        return values[:, 0], gradients[0]
    lengths = torch.stack([dual_length(gradient, norm) for gradient in gradients], dim=1)
    chosen = (values.abs() / (lengths + 1e-12)).argmin(1)
    normal = torch.empty_like(gradients[0])
    for k, gradient in enumerate(gradients):
        rows = (chosen == k).nonzero().squeeze(1)
        normal[rows] = gradient[rows]
    return values.gather(1, chosen.unsqueeze(1)).squeeze(1), normal
