"""One run of Auto-PGD over any rows: momentum, check-points, step sizes that halve, and returns to the best point.

Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks",
ICML 2020 (linf, l2); Croce and Hein, "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", ICML
2021 (l1). Every row carries its own start, target, step size, best point and record, so rows may be dropped at any time
and one sample may climb towards several targets at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from maodun.core import geometry
from maodun.core.engine import State
from maodun.core.losses import LossFunction
from maodun.core.problem import Problem
from maodun.core.streams import Stream
from maodun.core.threat import Threat

_MOMENTUM = 0.75
_CPU_ROWS = 128


def checkpoints(steps: int) -> list[int]:
    """Return the steps after which the step size is reviewed (linf, l2): 22, 41, 57, 70, 80, 87, 93, 99 of 100.

    The first window is 22 % of the steps, each later one 3 % shorter, none below 6 % (Croce and Hein, 2020, section 3).
    """
    window, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    marks = [window]
    while marks[-1] < steps:
        window = max(window - shorter, least)
        marks.append(marks[-1] + window)
    return [mark for mark in marks if mark <= steps]


def sparse_checkpoints(steps: int) -> list[int]:
    """Return the steps after which sparsity and step size are reviewed (l1): every 4 % (Croce and Hein, 2021)."""
    every = max(int(0.04 * steps), 1)
    return list(range(every, steps + 1, every))


def finite(threat: Threat, x: Tensor) -> Threat:
    """Return `threat`, or for an infinite radius the ball that just holds the whole box: one more point of a curve."""
    if math.isfinite(threat.eps):
        return threat
    entries = x[0].numel()
    return threat.with_eps({"linf": 1.0, "l2": math.sqrt(entries)}.get(threat.norm, float(entries)))


def surface_start(threat: Threat, x: Tensor, stream: Stream, ids: Tensor, step: int | Tensor = 0) -> Tensor:
    """Return a random start on the surface of the ball around each row, clipped to [0, 1].

    linf: uniform noise, l2: normal noise, both scaled to length eps; l1: normal noise projected on ball and box.
    `step` (a number or one per row) separates restarts and targets.
    """
    shape = tuple(x.shape[1:])
    if threat.norm == "linf":
        noise = stream.uniform(ids, shape, step).to(x) * 2.0 - 1.0
    else:
        noise = stream.normal(ids, shape, step).to(x)
    if threat.norm == "l1":
        return threat.project(x + noise, x)
    length = geometry.per_sample(geometry.norms(noise, threat.norm), x).clamp(min=geometry.TINY)
    return (x + noise * (threat.eps / length)).clamp_(0.0, 1.0)


def rows_at_once(problem: Problem) -> int:
    """Return how many rows one model call should hold to be cheap per row: filling up small batches is nearly free."""
    size = max(1, problem.session.batch_size // problem.session.oracle.gradient.draws)
    return size if problem.x.device.type == "cuda" else min(size, _CPU_ROWS)


@dataclass
class Climb(State):
    """One run on the rows of `view`, in lockstep; `advance` takes a step (one forward, one backward per row).

    `view` holds each sample `lanes` times in a row (lanes = 1: simply the problem); `select` takes samples. `targets`
    (R,) or None are given to the loss. `x` is the iterate, `best` the point of the highest loss `best_loss` so far.
    `share` and `changed` (l1) are the sparsity of the next steps and the entries changed at the last review.
    """

    view: Problem
    lanes: int
    loss: str | LossFunction
    targets: Tensor | None
    threat: Threat
    marks: list[int]
    steps: int
    taken: int
    rho: float
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    last_loss: Tensor
    checked_loss: Tensor
    rises: Tensor
    halved: Tensor
    size: Tensor
    low: Tensor | None
    high: Tensor | None
    share: Tensor
    changed: Tensor

    @property
    def over(self) -> bool:
        """Whether all steps have been taken."""
        return self.taken >= self.steps

    def select(self, index: Tensor) -> Self:
        """Return the climb of the samples `index` (positions), every lane of them."""
        if self.lanes > 1:
            lane = torch.arange(self.lanes, device=index.device)
            index = (index.unsqueeze(1) * self.lanes + lane).flatten()
        view = self.view.select(index)
        chosen = super().select(index)
        chosen.view = view
        return chosen

    def advance(self) -> None:
        """Take one step, look at it, and at a check-point review the step size; changes this climb in place."""
        x = self._propose()
        _, loss, gradient = self.view.gradient(x, self.loss, self.targets)
        better = loss > self.best_loss
        wide = self.view.per_sample(better).to(torch.bool)
        self.best = torch.where(wide, x, self.best)
        self.best_gradient = torch.where(wide, gradient, self.best_gradient)
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.rises = self.rises + (loss > self.last_loss)
        self.previous, self.x, self.gradient, self.last_loss = self.x, x, gradient, loss
        self.taken += 1
        if self.taken in self.marks:
            if self.threat.norm == "l1":
                self._review_sparsity()
            else:
                self._review_size()

    def _propose(self) -> Tensor:
        x, origin = self.x, self.view.x
        if self.threat.norm == "l1":
            step = x + self.size * _sparse(self.gradient, x, self.share)
            return self.threat.project(step, origin)
        if self.threat.norm == "linf":
            aim = torch.addcmul(x, self.gradient.sign(), self.size).clamp_(self.low, self.high)
        else:
            aim = self.threat.project(x + self.size * geometry.unit_l2(self.gradient), origin)
        if self.taken == 0:
            return aim
        moved = torch.lerp(x, aim, _MOMENTUM).add_(x - self.previous, alpha=1.0 - _MOMENTUM)
        return moved.clamp_(self.low, self.high) if self.threat.norm == "linf" else self.threat.project(moved, origin)

    def _review_size(self) -> None:
        place = self.marks.index(self.taken)
        window = self.taken - (self.marks[place - 1] if place else 0)
        stalled = self.rises <= self.rho * window
        stalled |= ~self.halved & (self.checked_loss >= self.best_loss)
        wide = self.view.per_sample(stalled).to(torch.bool)
        self.size = torch.where(wide, self.size / 2.0, self.size)
        self._return(wide)
        self.halved, self.checked_loss, self.rises = stalled, self.best_loss, torch.zeros_like(self.rises)

    def _review_sparsity(self) -> None:
        changed = geometry.norms(self.best - self.view.x, "l0")
        sparser = changed < 0.95 * self.changed
        wide, eps = self.view.per_sample(sparser).to(torch.bool), self.threat.eps
        size = torch.where(wide, torch.full_like(self.size, eps), self.size / 1.5)
        self.size = size.clamp_(eps / 10.0, eps)
        self.share, self.changed = changed / (1.5 * self.x[0].numel()), changed
        self._return(wide)

    def _return(self, wide: Tensor) -> None:
        self.x = torch.where(wide, self.best, self.x)
        self.gradient = torch.where(wide, self.best_gradient, self.gradient)


def _sparse(gradient: Tensor, x: Tensor, share: Tensor) -> Tensor:
    """Return signs of the largest `share` (R,) of each gradient's entries over their number (ties all move).

    Where the box stops all of these, the largest that may move are taken instead. The published code then stands still:
    with few inputs a linear loss may stay a third below its maximum. It also rounds the number of entries up, so that a
    step never moves the best one alone.
    """
    size, flat = gradient.abs().flatten(1), gradient.flatten(1)
    free = torch.where(flat > 0, x.flatten(1) < 1.0, x.flatten(1) > 0.0) & (size > 0)
    entries = size.shape[1]
    count = (share * entries).long().clamp_(1, entries).unsqueeze(1)
    most = int(count.max())
    chosen = size >= size.topk(most, dim=1).values.gather(1, count - 1)
    walled = ~(chosen & free).any(1, keepdim=True)
    if bool(walled.any()):
        size = torch.where(free, size, 0.0)
        chosen = torch.where(walled, free & (size >= size.topk(most, dim=1).values.gather(1, count - 1)), chosen)
    signs = torch.where(chosen, flat.sign(), 0.0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_(min=1e-10)).reshape(gradient.shape)


def begin(
    view: Problem,
    start: Tensor,
    loss: str | LossFunction,
    steps: int,
    *,
    threat: Threat | None = None,
    targets: Tensor | None = None,
    lanes: int = 1,
    rho: float = 0.75,
    continued: bool = False,
) -> Climb:
    """Evaluate `start` (R x ..., inside the ball) and return the climb of `steps` steps from there.

    `threat` is the ball to climb in (default: the view's). `targets` (R,) go to the loss. `continued` tells an l1 climb
    to take its sparsity from the start instead of 20 %. Costs one forward and one backward per row.
    """
    threat = finite(threat or view.threat, view.x)
    _, value, gradient = view.gradient(start, loss, targets)
    rows = torch.zeros_like(value)
    low = high = None
    share = changed = rows
    if threat.norm == "linf":
        low, high = (view.x - threat.eps).clamp_(min=0.0), (view.x + threat.eps).clamp_(max=1.0)
    if threat.norm == "l1":
        entries = view.x[0].numel()
        changed = geometry.norms(start - view.x, "l0") if continued else rows + entries
        share = changed / (1.5 * entries) if continued else rows + 0.2
    return Climb(
        x=start,
        done=rows > 0,
        view=view,
        lanes=lanes,
        loss=loss,
        targets=targets,
        threat=threat,
        marks=sparse_checkpoints(steps) if threat.norm == "l1" else checkpoints(steps),
        steps=steps,
        taken=0,
        rho=rho,
        previous=start,
        gradient=gradient,
        best=start,
        best_gradient=gradient,
        best_loss=value,
        last_loss=value,
        checked_loss=value,
        rises=rows,
        halved=rows == 0,
        size=view.per_sample(rows + threat.eps * (1.0 if threat.norm == "l1" else 2.0)),
        low=low,
        high=high,
        share=share,
        changed=changed,
    )
