"""Decoupled direction and norm: gradient steps whose length is held to a radius of each sample's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.minimum.common import corner_distance, cosine, refuse_below, stuck, succeeded
from maodun.core.engine import Attack, State
from maodun.core.geometry import norms, per_sample, unit_l2
from maodun.core.problem import Problem


@dataclass
class DDNState(State):
    """`radius` (N,) is the norm of the next perturbation, `limit` (N,) the largest the box allows, `step` counts."""

    radius: Tensor
    limit: Tensor
    step: int


def log_odds(logits: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    """Return the logarithm of the odds of success under the softmax: of any class but y, or of the target.

    Cross-entropy is a softplus of it, so their gradients point the same way; this one does not vanish in float32 when
    the model is sure of itself.
    """
    own = y if targets is None else targets
    score = logits.gather(1, own.unsqueeze(1)).squeeze(1)
    rest = torch.logsumexp(logits.scatter(1, own.unsqueeze(1), -torch.inf), dim=1)
    return rest - score if targets is None else score - rest


@dataclass(frozen=True, kw_only=True)
class DDN(Attack[DDNState]):
    """Step along the gradient of the cross-entropy, then set the length to a radius (Rony et al., CVPR 2019).

    Inputs N x ..., values in [0, 1]; norm l2; targeted or not. The radius starts at `initial_radius` (input units) and
    is multiplied by 1 - gamma after a success and by 1 + gamma otherwise, never beyond the box. The step size falls
    from 1 to 0.01 along half a cosine over `steps`. Nothing is quantised. Costs `steps` forwards and backwards and
    one query.
    """

    name: ClassVar[str] = "ddn"
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    kind: ClassVar[str] = "minimum"

    steps: int = 100
    gamma: float = 0.05
    initial_radius: float = 1.0

    def __post_init__(self) -> None:
        refuse_below(self.name, steps=(self.steps, 1), gamma=(self.gamma, 0.0))

    @property
    def total_steps(self) -> int:
        """One gradient per step."""
        return self.steps

    def init(self, problem: Problem) -> DDNState:
        """Start at the clean input."""
        limit = corner_distance(problem.x, "l2")
        return DDNState(
            x=problem.x,
            done=torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device),
            radius=torch.full_like(limit, self.initial_radius),
            limit=limit,
            step=0,
        )

    def step(self, problem: Problem, state: DDNState) -> DDNState:
        """Turn the direction by a gradient step, change the radius by what was seen, and set the length to it."""
        logits, _, gradient = problem.gradient(state.x, log_odds)
        success = succeeded(problem, state.x, logits)
        delta = unit_l2(gradient).mul_(cosine(state.step, self.steps, 1.0, 0.01)).add_(state.x - problem.x)
        radius = torch.where(success, state.radius * (1.0 - self.gamma), state.radius * (1.0 + self.gamma))
        radius = torch.minimum(radius, state.limit)
        length = norms(delta, "l2")
        scale = torch.where(length > 0, radius / length, torch.zeros_like(length))
        x = delta.mul_(per_sample(scale, delta)).add_(problem.x).clamp_(0.0, 1.0)
        return replace(state, x=x, radius=radius, done=stuck(problem), step=state.step + 1)
