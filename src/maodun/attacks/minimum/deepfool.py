"""DeepFool: step to the nearest boundary of the linearised classifier until the class changes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.minimum.common import dual_length, found, refuse_below
from maodun.core.engine import Attack, State
from maodun.core.geometry import per_sample
from maodun.core.problem import Problem

_PLAIN_STEPS = 2
"""Steps taken as published before entries at a wall are left out."""

_LEAST_STEP = 1e-3
"""The shortest step, as a share of the way so far."""

_BEYOND = 0.1
"""How far past an interpolated crossing to look, as a share of the way to the point that is known to fool."""


@dataclass
class DeepFoolState(State):
    """`own` (N, 1) and `rivals` (N, K) are classes, `step` counts the steps."""

    own: Tensor
    rivals: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack[DeepFoolState]):
    """Step to the nearest class boundary of the linearised model (Moosavi-Dezfooli et al., CVPR 2016).

    Inputs N x ..., values in [0, 1]; norms l2 and linf; binary and multi-class. `steps` is the most steps a sample
    takes. `overshoot` lengthens the sum of all steps, so a linear model is crossed in one step at (1 + overshoot)
    times the exact distance. `refine` spends one query on a shorter last step, just past where the margins at its ends
    say that it crosses. `classes` counts the likely classes by the clean logits among which the nearest boundary is
    sought, the own class included (None: all). From the third step on, entries at a wall of the box that a step would
    cross are left out, so that the step still reaches the boundary. Untargeted only.

    A step costs one forward, classes - 1 backwards and one query per sample that is still not fooled: the query
    comes before the next gradients, so the last point of a sample is never differentiated.
    """

    name: ClassVar[str] = "deepfool"
    norms: ClassVar[tuple[str, ...]] = ("l2", "linf")
    kind: ClassVar[str] = "minimum"
    can_target: ClassVar[bool] = False

    steps: int = 50
    overshoot: float = 0.02
    refine: bool = True
    classes: int | None = 10

    def __post_init__(self) -> None:
        refuse_below(
            self.name,
            steps=(self.steps, 1),
            overshoot=(self.overshoot, 0.0),
            classes=(2 if self.classes is None else self.classes, 2),
        )

    @property
    def total_steps(self) -> int:
        """The most steps a sample takes."""
        return self.steps

    def init(self, problem: Problem) -> DeepFoolState:
        """Order the classes by the clean logits."""
        logits = problem.clean()
        limit = logits.shape[1] if self.classes is None else min(self.classes, logits.shape[1])
        first = logits.scatter(1, problem.y.unsqueeze(1), torch.inf)
        order = first.argsort(dim=1, descending=True, stable=True)[:, :limit]
        return DeepFoolState(x=problem.x, done=found(problem), own=order[:, :1], rivals=order[:, 1:], step=0)

    def step(self, problem: Problem, state: DeepFoolState) -> DeepFoolState:
        """Cross the nearest linearised boundary and look where that leads."""

        def heads(logits: Tensor, index: Tensor) -> Tensor:
            return logits.gather(1, state.rivals[index]) - logits.gather(1, state.own[index])

        before, values, gradients = problem.values_and_gradients(state.x, heads)
        move, lost = self._move(problem, state, values, gradients)
        x = torch.add(state.x, move, alpha=1.0 + self.overshoot).clamp_(0.0, 1.0)
        after = problem.logits(x)
        if self.refine:
            self._shorten(problem, (state.x, x), (before, after))
        return replace(state, x=x, done=lost | found(problem), step=state.step + 1)

    def finish(self, problem: Problem, state: DeepFoolState) -> None:
        """Do nothing: every point has been looked at."""

    def _move(
        self, problem: Problem, state: DeepFoolState, values: Tensor, gradients: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the shortest move onto a linearised boundary, and the rows that have none."""
        norm = problem.threat.norm
        if state.step >= _PLAIN_STEPS:
            gradients = [_free(gradient, state.x) for gradient in gradients]
        lengths = torch.stack([dual_length(gradient, norm) for gradient in gradients], dim=1)
        ratios = torch.where(lengths > 0, values.abs() / lengths, torch.inf)
        ratio, nearest = ratios.min(1)
        lost = ~torch.isfinite(ratio)
        # Where the model bends away from every step, the steps would shrink below what float32 can add.
        ratio = torch.maximum(ratio, _LEAST_STEP * problem.threat.distance(state.x, problem.x)).masked_fill_(lost, 0.0)
        normal = _pick(gradients, nearest)
        if norm == "linf":
            return normal.sign() * per_sample(ratio, normal), lost
        length = lengths.gather(1, nearest.unsqueeze(1)).squeeze(1).masked_fill(lost, 1.0)
        return normal * per_sample(ratio / length, normal), lost

    def _shorten(self, problem: Problem, ends: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor]) -> None:
        """Query the last step of the rows it fooled, just past where the margins at its ends say it crosses."""
        rows = problem.is_adversarial(logits[1]).nonzero().squeeze(1)
        if not rows.numel():
            return
        problem, (start, end) = problem.select(rows), (ends[0][rows], ends[1][rows])
        own = problem.y.unsqueeze(1)
        below, above = (each[rows] - each[rows].gather(1, own) for each in logits)
        # Of the classes that overtake the own one on the way, the first to do so.
        crossing = torch.where(above > 0, below / (below - above), 1.0).nan_to_num(1.0).clamp_(0.0, 1.0).amin(1)
        here = crossing + _BEYOND * (1.0 - crossing)
        problem.logits(torch.lerp(start, end, per_sample(here, start)))


def _free(gradient: Tensor, x: Tensor) -> Tensor:
    """Return the gradient without the entries along which the box lets nothing move."""
    return gradient.masked_fill(((x <= 0.0) & (gradient < 0)) | ((x >= 1.0) & (gradient > 0)), 0.0)


def _pick(gradients: list[Tensor], chosen: Tensor) -> Tensor:
    """Return row i of gradient number chosen[i], without stacking them all."""
    if len(gradients) == 1:
        return gradients[0]
    out = torch.empty_like(gradients[0])
    for k, gradient in enumerate(gradients):
        rows = (chosen == k).nonzero().squeeze(1)
        if rows.numel():
            out[rows] = gradient[rows]
    return out
