"""Square attack: random search with square windows that needs nothing but scores.

Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box adversarial attack via random
search", ECCV 2020 (linf, l2); the l1 form is that of AutoAttack (Croce and Hein, 2021). Unlike the published code every
sample draws its own windows and signs, keyed by its id and the query number, so results do not depend on the batch;
images need not be square; and a window may touch the last row and column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.query import windows
from maodun.attacks.query.windows import Windows
from maodun.core import geometry
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.losses import margin
from maodun.core.oracle import BudgetExceededError
from maodun.core.problem import Problem
from maodun.core.threat import Threat

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def window_share(query: int, first: float = 0.8) -> float:
    """Return the share of the image that a window covers at `query` (from 0): halved after 10, 50, ..., 8000."""
    return first * 0.5 ** sum(query > mark for mark in _HALVINGS)


def window_side(share: float, height: int, width: int, norm: str) -> int:
    """Return the side of a window covering `share` of a height x width image; odd and at least 3 in l2 and l1."""
    side = max(round(math.sqrt(share * height * width)), 1)
    if norm != "linf":
        side = max(side, 3)
        side += 1 - side % 2
    return min(side, height, width)


@dataclass
class SquareState(State):
    """`x` is the best point, `loss` its margin; `plan` holds the windows of the next queries; `query` counts them.

    `norm` is the distance of `x` from the clean input (l2 and l1).
    """

    loss: Tensor
    norm: Tensor
    plan: Windows
    query: int


@dataclass(frozen=True, kw_only=True)
class Square(Attack[SquareState]):
    """Random search with square windows of shrinking size; sees scores only (Andriushchenko et al., ECCV 2020).

    Images N x C x H x W, values in [0, 1]; linf, l2, l1. `queries` steps after the start; `p_init` is the first
    window's share of the image, which halves after 10, 50, 200, 500, 1000, 2000, 4000, 6000 and 8000 queries;
    `rescale` stretches these marks from 10,000 to `queries` (AutoAttack does not). Costs queries + 1 forwards per
    sample, less what stops early; no backwards.
    """

    name: ClassVar[str] = "square"
    access: ClassVar[str] = "scores"
    images_only: ClassVar[bool] = True

    queries: int = 5000
    p_init: float = 0.8
    rescale: bool = False

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise InputError(f"queries {self.queries}", "must be at least 1", "give a positive number")
        if not 0.0 < self.p_init <= 1.0:
            raise InputError(f"p_init {self.p_init}", "is a share of the image", "give a number in (0, 1]")

    @property
    def total_steps(self) -> int:
        """One step per query after the start."""
        return self.queries

    def side(self, query: int, x: Tensor, norm: str) -> int:
        """Return the window's side at `query`."""
        number = int(query / self.queries * 10000) if self.rescale else query
        return window_side(window_share(number, self.p_init), x.shape[2], x.shape[3], norm)

    def init(self, problem: Problem) -> SquareState:
        """Start from vertical stripes of +-eps (linf) or a tiling of signed kernels (l2, l1)."""
        stream, threat = problem.stream("square/start"), problem.threat
        if threat.norm == "linf":
            delta = windows.stripes(problem.x, problem.ids, stream) * threat.eps
            x = (problem.x + delta).clamp_(0.0, 1.0)
        else:
            x = _reach(threat, windows.tiling(problem.x, problem.ids, stream, threat.norm), problem.x)
        loss = self._loss(problem, x)
        norm = threat.distance(x, problem.x)
        return SquareState(x, torch.zeros_like(loss, dtype=torch.bool), loss, norm, windows.none(problem.x), 0)

    def step(self, problem: Problem, state: SquareState) -> SquareState:
        """Try one window per sample and keep it where the margin improves."""
        if state.plan.used == state.plan.ahead:
            state.plan = self._plan(problem, state.query)
        if problem.threat.norm == "linf":
            self._step_linf(problem, state)
        else:
            self._step_kernel(problem, state)
        state.plan.used += 1
        state.query += 1
        return state

    def finish(self, problem: Problem, state: SquareState) -> None:
        """Nothing is left to look at: every candidate has been scored."""

    def _plan(self, problem: Problem, query: int) -> Windows:
        norm, x = problem.threat.norm, problem.x
        side = self.side(query, x, norm)
        most = windows.block(x, side, self.queries - query)
        ahead = next((k for k in range(1, most) if self.side(query + k, x, norm) != side), most)
        stream = problem.stream("square/window")
        return windows.plan(x, problem.ids, stream, query, ahead, side, problem.threat)

    @staticmethod
    def _loss(problem: Problem, x: Tensor) -> Tensor:
        return margin(problem.logits(x), problem.y, problem.targets)

    def _step_linf(self, problem: Problem, state: SquareState) -> None:
        # Only the window is touched: written into the best point, and written back where it did not help.
        where, value = state.plan.now()
        flat = state.x.flatten(1)
        old = flat.gather(1, where)
        flat.scatter_(1, where, value)
        try:
            loss = self._loss(problem, state.x)
        except BudgetExceededError:
            flat.scatter_(1, where, old)
            raise
        better = loss > state.loss
        flat.scatter_(1, where, torch.where(better.unsqueeze(1), value, old))
        state.loss = torch.maximum(loss, state.loss)

    def _step_kernel(self, problem: Problem, state: SquareState) -> None:
        trial = _moved(state, problem.x, problem.threat)
        x = _reach(problem.threat, trial, problem.x)
        loss = self._loss(problem, x)
        better = loss > state.loss
        state.x = torch.where(problem.per_sample(better).to(torch.bool), x, state.x)
        state.norm = torch.where(better, problem.threat.distance(x, problem.x), state.norm)
        state.loss = torch.maximum(loss, state.loss)


def _reach(threat: Threat, delta: Tensor, x: Tensor) -> Tensor:
    """Return the point of the ball that `delta` leads to: stretched to the surface in l2, projected in l1."""
    if threat.norm == "l1":
        return threat.with_eps(threat.eps * (1.0 - 1e-6)).project(x + delta, x)
    length = geometry.norms(delta, "l2").clamp(min=geometry.TINY)
    return torch.addcmul(x, delta, geometry.per_sample(threat.eps / length, x)).clamp_(0.0, 1.0)


def _moved(state: SquareState, x: Tensor, threat: Threat) -> Tensor:
    """Return the perturbation after one window took over the budget of another, plus what the ball has to spare."""
    first, second, push, outside = state.plan.both()
    channels = x.shape[1]
    power = 2.0 if threat.norm == "l2" else 1.0
    delta = (state.x - x).flatten(2)
    here = delta.gather(2, first.unsqueeze(1).expand(-1, channels, -1))
    there = delta.gather(2, second.unsqueeze(1).expand(-1, channels, -1)) * outside.unsqueeze(1)
    size = torch.linalg.vector_norm(here, power, dim=2, keepdim=True)
    both = size**power + torch.linalg.vector_norm(there, power, dim=2, keepdim=True) ** power
    spare = (threat.eps**power - state.norm**power).clamp_(min=0.0).reshape(-1, 1, 1) / channels
    budget = (spare + both) ** (1.0 / power)
    if threat.norm == "l1":
        budget = budget * channels
    new = push + here / (size + 1e-12)
    new = new * (budget / (torch.linalg.vector_norm(new, power, dim=2, keepdim=True) + 1e-12))
    delta.scatter_(2, second.unsqueeze(1).expand(-1, channels, -1), 0.0)
    delta.scatter_(2, first.unsqueeze(1).expand(-1, channels, -1), new)
    return delta.reshape(x.shape)
