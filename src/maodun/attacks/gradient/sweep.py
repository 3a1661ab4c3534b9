"""Short steep runs, several per sample side by side: large signed steps that shrink along a cosine, with momentum.

An adaptive step size (Auto-PGD) needs tens of steps to find its scale. A run that is told to be over after twenty
steps does better with a fixed schedule: steps of 2 eps that fall to zero along a half cosine. The ball starts a little
wider than allowed and has shrunk to the allowed one half-way: behind a plateau there is often a slope just outside.
Compare Liu et al. (CVPR 2022), whose runs are short too, and the larger balls of Croce and Hein (ICML 2021) in l1. For
l1 itself this is too blunt (steps must be sparse, and how sparse must adapt), so linf and l2 only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from maodun.core import geometry
from maodun.core.engine import State
from maodun.core.losses import cross_entropy, dlr, margin
from maodun.core.problem import Problem
from maodun.core.threat import Threat

_MOMENTUM = 0.75
_FIRST_STEP = 2.0
_SATURATION = 8.0
_ALONG_SPHERE = 0.4


@dataclass
class Sweep(State):
    """One run on the rows of `view`, in which each sample stands `lanes` times in a row.

    `aims` (R,) are the classes to climb to by targeted DLR; -1 climbs the cross-entropy instead. `heat` (R,) divides
    the logits in the cross-entropy. `x` is the iterate; `best`, `best_margin` and `best_logits` belong to the point
    inside the ball whose margin was highest. `widen` is the share of eps by which the first ball is larger.
    """

    view: Problem
    lanes: int
    aims: Tensor
    heat: Tensor
    steps: int
    widen: float
    taken: int
    previous: Tensor
    best: Tensor
    best_margin: Tensor
    best_logits: Tensor

    @property
    def over(self) -> bool:
        """Whether the last point has been looked at."""
        return self.taken > self.steps

    def select(self, index: Tensor) -> Self:
        """Return the run of the samples `index` (positions), every lane of them."""
        if self.lanes > 1:
            lane = torch.arange(self.lanes, device=index.device)
            index = (index.unsqueeze(1) * self.lanes + lane).flatten()
        chosen = super().select(index)
        chosen.view = self.view.select(index)
        return chosen

    def advance(self) -> None:
        """Look at the iterate and move on; one forward and backward per row, at the last point a forward alone."""
        if self.taken == self.steps:
            self._look(self.view.logits(self.x))
        else:
            logits, _, grads = self.view.values_and_gradients(self.x, self._heads)
            self._look(logits)
            self.previous, self.x = self.x, self._propose(grads[0])
        self.taken += 1

    def top(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return point, margin (N,) and logits of each sample's best lane."""
        count = self.best_margin.shape[0] // self.lanes
        margins, lane = self.best_margin.reshape(count, self.lanes).max(1)
        rows = torch.arange(count, device=lane.device) * self.lanes + lane
        return self.best[rows], margins, self.best_logits[rows]

    def _heads(self, logits: Tensor, index: Tensor) -> Tensor:
        view, aims = self.view, self.aims[index]
        y, goal = view.y[index], None if view.targets is None else view.targets[index]
        climb = cross_entropy(logits / self.heat[index].unsqueeze(1), y, goal)
        # Rows without an aim need a class all the same; what they are given is not used.
        toward = dlr(logits, y, torch.where(aims < 0, (y + 1) % logits.shape[1], aims))
        return torch.where(aims < 0, climb, toward).unsqueeze(1)

    def _look(self, logits: Tensor) -> None:
        value = margin(logits, self.view.y, self.view.targets)
        better = value > self.best_margin
        if self._excess(self.taken - 1) > 0.0:
            # The iterate was projected on the ball of the step before.
            better &= self.view.threat.contains(self.x, self.view.x)
        wide = self.view.per_sample(better).to(torch.bool)
        self.best = torch.where(wide, self.x, self.best)
        self.best_margin = torch.where(better, value, self.best_margin)
        self.best_logits = torch.where(better.unsqueeze(1), logits, self.best_logits)

    def _excess(self, step: int) -> float:
        return self.widen * max(0.0, 1.0 - 2.0 * step / self.steps)

    def _propose(self, gradient: Tensor) -> Tensor:
        origin, threat = self.view.x, self.view.threat
        ball = threat.with_eps(threat.eps * (1.0 + self._excess(self.taken)))
        pace = 0.5 * (1.0 + math.cos(math.pi * self.taken / self.steps))
        size = _FIRST_STEP * threat.eps * pace
        aim = ball.project(self.x + size * threat.steepest(gradient, self.x), origin)
        if self.taken == 0:
            return aim
        moved = torch.lerp(self.x, aim, _MOMENTUM).add_(self.x - self.previous, alpha=1.0 - _MOMENTUM)
        return ball.project(moved, origin)


def sweep(
    view: Problem,
    start: Tensor,
    aims: Tensor,
    clean_margin: Tensor,
    steps: int,
    *,
    lanes: int,
    widen: float,
    classes: int,
) -> Sweep:
    """Return a run of `steps` steps from `start` (R x ...); nothing is evaluated yet.

    `clean_margin` (R,) are the (negative) margins of the unperturbed rows: where they are beyond 8 the cross-entropy is
    taken of logits shrunk to 8, because it would saturate in float32 (a defence called masking).
    """
    rows = torch.full_like(clean_margin, -math.inf)
    return Sweep(
        x=start, done=torch.zeros_like(rows, dtype=torch.bool), view=view, lanes=lanes, aims=aims,
        heat=(clean_margin.abs() / _SATURATION).clamp(min=1.0), steps=steps, widen=widen, taken=0, previous=start,
        best=view.x, best_margin=rows, best_logits=rows.new_zeros(rows.shape[0], classes),
    )  # fmt: skip


def promise(threat: Threat, gradient: Tensor, x_adv: Tensor, x: Tensor) -> Tensor:
    """Return (N,) what a function with `gradient` at `x_adv` may still gain inside the ball, if it is nearly linear.

    linf: the Frank-Wolfe gap in the ball cut by the box, the most it could gain if it were linear; no ascent gains more
    if it is concave. l2: the gap is quadratic in the angle between gradient and perturbation, too small to tell an
    unfinished run from a finished one, so a share of the gradient along the sphere counts instead where that is more.
    """
    if threat.norm == "linf":
        low, high = (x - threat.eps).clamp_(min=0.0), (x + threat.eps).clamp_(max=1.0)
        return (torch.where(gradient > 0, high - x_adv, low - x_adv) * gradient).flatten(1).sum(1)
    stuck = ((gradient > 0) & (x_adv >= 1.0)) | ((gradient < 0) & (x_adv <= 0.0))
    free = torch.where(stuck, torch.zeros_like(gradient), gradient)
    already = (free * (x_adv - x)).flatten(1).sum(1)
    most = threat.eps * geometry.norms(free, "l2")
    cosine = (already / most.clamp(min=geometry.TINY)).clamp(-1.0, 1.0)
    return most * torch.maximum(1.0 - cosine, _ALONG_SPHERE * (1.0 - cosine * cosine).sqrt())
