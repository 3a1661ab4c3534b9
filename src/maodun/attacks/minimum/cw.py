"""Carlini and Wagner's l2 attack: distance against margin, weighed by a constant found by binary search."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.minimum.common import refuse_below, stuck, succeeded
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.geometry import norms, per_sample
from maodun.core.losses import margin
from maodun.core.problem import Problem

_ADAM = (0.9, 0.999, 1e-8)
_UNBOUNDED = 1e10


@dataclass
class CWState(State):
    """Every row is at its own iteration `count` of its own search number `search`.

    `point` are the coordinates in tanh space, `curve` their tanh, `mean` and `square` Adam's moments, `const` the
    weight of the margin with its bracket `low` and `high`, `broke` whether this search has succeeded, `before` the
    objective at the last look.
    """

    point: Tensor
    curve: Tensor
    mean: Tensor
    square: Tensor
    const: Tensor
    low: Tensor
    high: Tensor
    broke: Tensor
    before: Tensor
    count: Tensor
    search: Tensor


@dataclass(frozen=True)
class _Confident(Problem):
    """A problem in which only a margin of at least `kappa` counts as success."""

    kappa: float = 0.0

    def is_adversarial(self, logits: Tensor) -> Tensor:
        """Return (N,) booleans: fooled, and by the margin asked for."""
        return super().is_adversarial(logits) & (margin(logits, self.y, self.targets) >= self.kappa)


@dataclass(frozen=True, kw_only=True)
class CW(Attack[CWState]):
    """Minimise ||x' - x||^2 + c * max(kappa - margin, 0) in tanh space (Carlini and Wagner, S&P 2017, l2, f6).

    Inputs N x ..., values in [0, 1]; norm l2; targeted or not. `searches` values of c are tried per sample, from
    `initial_const` up by tens until one succeeds and by bisection from then on, each for `steps` iterations of Adam
    with step size `lr`. `kappa` is the margin in logits that counts as success. `abort_early` ends a sample's search
    when its objective has not fallen by 0.01 % over a tenth of the steps; the sample goes on to its next search at
    once. `slack` is how far, in units of the half box, the tanh reaches beyond the walls before it is clipped: with
    none, values at exactly 0 or 1 could never move.

    Costs a forward and a backward per iteration, searches * steps at most. The gradient of the distance and
    of the tanh are taken by hand; only the margin's passes through the model.
    """

    name: ClassVar[str] = "cw"
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    kind: ClassVar[str] = "minimum"

    steps: int = 100
    searches: int = 9
    lr: float = 0.01
    initial_const: float = 0.01
    kappa: float = 0.0
    abort_early: bool = True
    slack: float = 0.1

    def __post_init__(self) -> None:
        refuse_below(self.name, steps=(self.steps, 1), searches=(self.searches, 1), kappa=(self.kappa, 0.0))
        for option in ("lr", "initial_const", "slack"):
            if not getattr(self, option) > 0.0:
                raise InputError(f"option '{option}' of cw", f"is {getattr(self, option)}", "give a positive number")

    @property
    def total_steps(self) -> int:
        """All iterations of all searches."""
        return self.steps * self.searches

    def init(self, problem: Problem) -> CWState:
        """Start every sample at its clean input with the first constant."""
        n, x = len(problem), problem.x
        zeros = torch.zeros(n, device=x.device)
        point = self._enter(x)
        return CWState(
            x=x.clone(),
            done=torch.zeros(n, dtype=torch.bool, device=x.device),
            point=point,
            curve=torch.tanh(point),
            mean=torch.zeros_like(x),
            square=torch.zeros_like(x),
            const=torch.full_like(zeros, self.initial_const),
            low=zeros.clone(),
            high=torch.full_like(zeros, _UNBOUNDED),
            broke=torch.zeros(n, dtype=torch.bool, device=x.device),
            before=torch.full_like(zeros, math.inf),
            count=torch.zeros(n, dtype=torch.int64, device=x.device),
            search=torch.zeros(n, dtype=torch.int64, device=x.device),
        )

    def step(self, problem: Problem, state: CWState) -> CWState:
        """Make one iteration of every row's search and begin the next search where one ends."""
        if self.kappa > 0.0:
            problem = _Confident(
                **{entry.name: getattr(problem, entry.name) for entry in fields(Problem)}, kappa=self.kappa
            )
        logits, value, gradient = problem.gradient(state.x, "margin")
        short = (self.kappa - value).clamp_(min=0.0)
        offset = state.x - problem.x
        state.broke.logical_or_(succeeded(problem, state.x, logits) if problem.session.stochastic else short == 0)
        ended = self._look(state, offset, short)
        weight = state.const.masked_fill(short == 0, 0.0)
        slope = offset.mul_(2.0).sub_(gradient * per_sample(weight, gradient))
        self._descend(state, slope.mul_(1.0 - state.curve.square()))
        if bool(ended.any()):
            state = self._begin(problem, state, ended)
        torch.tanh(state.point, out=state.curve)
        x = torch.add(0.5, state.curve, alpha=0.5 * (1.0 + self.slack)).clamp_(0.0, 1.0)
        return replace(state, x=x, done=(state.search >= self.searches) | stuck(problem))

    def finish(self, problem: Problem, state: CWState) -> None:
        """Do nothing: every row has spent its iterations."""

    def _enter(self, x: Tensor) -> Tensor:
        return torch.atanh((2.0 * x - 1.0) / (1.0 + self.slack))

    def _look(self, state: CWState, offset: Tensor, short: Tensor) -> Tensor:
        """Count the iteration, in place, and return the rows whose search ends with it."""
        looking = state.count % max(1, self.steps // 10) == 0 if self.abort_early else None
        state.count += 1
        ended = state.count >= self.steps
        if looking is not None and bool(looking.any()):
            objective = norms(offset, "l2").square() + state.const * short
            ended |= looking & (objective > 0.9999 * state.before)
            state.before = torch.where(looking, objective, state.before)
        return ended

    def _descend(self, state: CWState, slope: Tensor) -> None:
        """Take Adam's step in place (Kingma and Ba, ICLR 2015), the bias corrected by each row's own count."""
        fade, fade_square, tiny = _ADAM
        state.mean.mul_(fade).add_(slope, alpha=1.0 - fade)
        state.square.mul_(fade_square).addcmul_(slope, slope, value=1.0 - fade_square)
        full = (1.0 - fade_square**state.count).sqrt_()
        rate = per_sample(full * (-self.lr) / (1.0 - fade**state.count), slope)
        state.point.addcdiv_(state.mean * rate, state.square.sqrt().add_(per_sample(tiny * full, slope)))

    def _begin(self, problem: Problem, state: CWState, ended: Tensor) -> CWState:
        """Halve or widen the bracket of the rows whose search ended and send them back to the start."""
        rows = ended.nonzero().squeeze(1)
        low = torch.where(ended & ~state.broke, torch.maximum(state.low, state.const), state.low)
        high = torch.where(ended & state.broke, torch.minimum(state.high, state.const), state.high)
        bounded = high < _UNBOUNDED
        const = torch.where(bounded, (low + high) / 2.0, state.const * 10.0)
        # The last of many searches repeats the smallest constant that has succeeded.
        last = (state.search == self.searches - 2) & bounded & (self.searches >= 10)
        const = torch.where(last, high, const)
        state.point[rows] = self._enter(problem.x[rows])
        state.mean[rows] = 0.0
        state.square[rows] = 0.0
        return replace(
            state,
            const=torch.where(ended, const, state.const),
            low=low,
            high=high,
            broke=state.broke & ~ended,
            before=torch.where(ended, torch.full_like(state.before, math.inf), state.before),
            count=torch.where(ended, torch.zeros_like(state.count), state.count),
            search=state.search + ended,
        )
