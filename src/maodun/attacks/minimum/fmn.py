"""Fast minimum-norm attack: projected ascent on the margin in a ball that shrinks and grows per sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.minimum.common import corner_distance, cosine, dual_length, refuse_below, stuck, succeeded
from maodun.core.engine import Attack, State
from maodun.core.geometry import PROJECTIONS, unit_l2
from maodun.core.problem import Problem


@dataclass
class FMNState(State):
    """`radius` (N,), the least norm at which the row was fooled (`best`, `limit` before), and the step count."""

    radius: Tensor
    best: Tensor
    limit: Tensor
    broke: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class FMN(Attack[FMNState]):
    """Ascend the margin inside a ball whose radius is found on the way (Pintor et al., NeurIPS 2021).

    Inputs N x ..., values in [0, 1]; norms linf, l2, l1, l0; targeted or not. Until a sample is first fooled its
    radius is the distance to the linearised boundary; then it is multiplied by 1 - gamma after a success and by
    1 + gamma after a failure (l0: by at least one entry). Steps follow the l2-normalised gradient; their size falls
    from `alpha` to a hundredth of it, and gamma from `gamma` to `last_gamma`, along half a cosine over `steps`.
    `alpha` None means 1 (linf: 10, where most of a step is cut off by the ball). Costs `steps` forwards and backwards
    and one query.
    """

    name: ClassVar[str] = "fmn"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    kind: ClassVar[str] = "minimum"

    steps: int = 100
    alpha: float | None = None
    gamma: float = 0.05
    last_gamma: float = 0.001

    def __post_init__(self) -> None:
        refuse_below(self.name, steps=(self.steps, 1), gamma=(self.gamma, 0.0), last_gamma=(self.last_gamma, 0.0))

    @property
    def total_steps(self) -> int:
        """One gradient per step."""
        return self.steps

    def init(self, problem: Problem) -> FMNState:
        """Start at the clean input; only l0 needs a first radius, one entry."""
        limit = corner_distance(problem.x, problem.threat.norm)
        none = torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device)
        return FMNState(
            x=problem.x, done=none, radius=torch.ones_like(limit), best=limit, limit=limit, broke=none, step=0
        )

    def step(self, problem: Problem, state: FMNState) -> FMNState:
        """Adapt the radius to what is seen here, step along the gradient and come back into the ball and the box."""
        norm = problem.threat.norm
        logits, value, gradient = problem.gradient(state.x, "margin")
        success = succeeded(problem, state.x, logits)
        length = problem.threat.distance(state.x, problem.x)
        best = torch.where(success, torch.minimum(state.best, length), state.best)
        broke = state.broke | success
        gamma = cosine(state.step, self.steps, self.gamma, self.last_gamma)
        radius = _radius(state, success, best, gamma, norm)
        if norm != "l0":
            # A point that rounding left just short of the boundary would stay there: ask for some growth at least.
            rest = value.abs() / dual_length(gradient, norm).clamp(min=torch.finfo(value.dtype).tiny)
            edge = length + torch.maximum(rest, gamma * length)
            radius = torch.where(broke, radius, edge)
        radius = torch.minimum(radius, state.limit)
        alpha = (10.0 if norm == "linf" else 1.0) if self.alpha is None else self.alpha
        alpha = cosine(state.step, self.steps, alpha, alpha / 100.0)
        x = torch.add(state.x, unit_l2(gradient), alpha=alpha)
        x = PROJECTIONS[norm](x, problem.x, radius)
        return replace(state, x=x, radius=radius, best=best, broke=broke, done=stuck(problem), step=state.step + 1)


def _radius(state: FMNState, success: Tensor, best: Tensor, gamma: float, norm: str) -> Tensor:
    """Return the radius shrunk after a success, never above the best norm, and grown after a failure."""
    shrunk, grown = state.radius * (1.0 - gamma), state.radius * (1.0 + gamma)
    if norm == "l0":
        shrunk = torch.minimum(state.radius - 1.0, shrunk.floor())
        grown = torch.maximum(state.radius + 1.0, grown.floor())
    return torch.where(success, torch.minimum(shrunk, best), grown).clamp_(min=0.0)
