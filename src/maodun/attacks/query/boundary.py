"""The boundary attack: a random walk along the decision boundary that leans towards the clean input (l2).

Brendel, Rauber and Bethge, "Decision-based adversarial attacks", ICLR 2018. Unlike the published code each step is one
query, and both step sizes follow every answer (a success lengthens, a failure shortens, in balance at the published
success rates) instead of waiting for a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from maodun.attacks.query.asking import Asking, find_start, walk_back
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.geometry import TINY, per_sample
from maodun.core.problem import Problem

# The success rates at which the step sizes rest: half of the steps aside succeed, a quarter of those forward.
_ASIDE, _FORWARD = 0.5, 0.25
# How far one answer moves the logarithm of a step size, and the width of the first walk back.
_RATE, _WIDTH = 0.2, 0.01
# Every so many steps the step aside is asked alone.
_EVERY = 5


@dataclass
class BoundaryState(State):
    """`x` fools the model; `aside`, `forward` (N,) are step sizes as shares of the distance; `step` counts."""

    aside: Tensor
    forward: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class Boundary(Attack[BoundaryState]):
    """Least l2 distance by a random walk of labels only, aside and then a little nearer (Brendel et al., ICLR 2018).

    Inputs N x ..., values in [0, 1]. `steps` steps of one query. `aside` and `forward` are the first step sizes as
    shares of the distance. `starts` "noise" looks for a start in noise keyed by the sample's id, at most `tries`
    queries; "batch" asks first the nearest sample of the batch with another label (the target's), which makes a result
    depend on its batch and is what targeted runs need. A sample without a start has no candidate. Costs `steps` and
    about ten forwards for the start; no backwards.
    """

    name: ClassVar[str] = "boundary"
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    kind: ClassVar[str] = "minimum"
    access: ClassVar[str] = "decision"

    steps: int = 25000
    aside: float = 0.1
    forward: float = 0.1
    starts: Literal["noise", "batch"] = "noise"
    tries: int = 100

    def __post_init__(self) -> None:
        for option in ("steps", "tries"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} {getattr(self, option)}", "must be at least 1", "give a positive number")
        for option in ("aside", "forward"):
            if not 0.0 < getattr(self, option) < 1.0:
                raise InputError(f"{option} {getattr(self, option)}", "is a share", "give a number in (0, 1)")

    @property
    def total_steps(self) -> int:
        """One step per query after the start."""
        return self.steps

    def init(self, problem: Problem) -> BoundaryState:
        """Find a point that fools the model and walk back to about the boundary."""
        asking = Asking.of(problem)
        start, have = find_start(asking, self.starts, self.tries, problem.stream("boundary/start"))
        x = walk_back(asking, start, have, _WIDTH)
        size = torch.ones(len(problem), device=x.device)
        return BoundaryState(x, ~have | asking.leave(), size * self.aside, size * self.forward, 0)

    def step(self, problem: Problem, state: BoundaryState) -> BoundaryState:
        """Step aside on the sphere around the clean input, then (mostly) towards it; stay where that fools no more."""
        alone = state.step % _EVERY == 0
        noise = problem.stream("boundary/step").coarse_normal(problem.ids, tuple(state.x.shape[1:]), state.step)
        there = _stepped(problem.x, state.x, noise.to(state.x), state.aside, None if alone else state.forward)
        hit = problem.is_reached(problem.decisions(there))
        state.x = torch.where(per_sample(hit, there).bool(), there, state.x)
        rest = _ASIDE if alone else _FORWARD
        growth = torch.exp(_RATE * (hit.to(state.aside) - rest))
        if alone:
            state.aside = (state.aside * growth).clamp(1e-5, 1.0)
        else:
            state.forward = (state.forward * growth).clamp(1e-6, 0.5)
        state.step += 1
        return state

    def finish(self, problem: Problem, state: BoundaryState) -> None:
        """Nothing is left to look at: every point was asked for."""


def _stepped(clean: Tensor, x: Tensor, noise: Tensor, aside: Tensor, forward: Tensor | None) -> Tensor:
    """Return `x` moved `aside` on its sphere around `clean`, then `forward` of its distance towards it, in the box."""
    away = x - clean
    flat, step = away.flatten(1), noise.flatten(1)
    # All lengths follow from three products; the part of the noise along `away` is taken off by its coefficient.
    square = torch.linalg.vecdot(flat, flat).clamp(min=TINY)
    along = torch.linalg.vecdot(flat, step) / square
    across = (torch.linalg.vecdot(step, step) - along.square() * square).clamp(min=TINY)
    size = aside * torch.sqrt(square / across)
    shrink = torch.rsqrt(1.0 + aside.square())
    if forward is not None:
        shrink = shrink * (1.0 - forward)
    moved = away.mul_(per_sample(shrink * (1.0 - size * along), away)).add_(clean)
    return moved.addcmul_(noise, per_sample(shrink * size, noise)).clamp_(0.0, 1.0)
