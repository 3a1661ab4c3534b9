"""GeoDA: the boundary taken for a plane, its normal from labels, and the nearest point along it (l2 and linf).

Rahmati, Moosavi-Dezfooli, Frossard and Dai, "GeoDA: a geometric framework for black-box adversarial attacks", CVPR
2020. As in HopSkipJump here, votes are asked at l2 / (2 sqrt D) from the boundary point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from maodun.attacks.query.asking import Asking, Draw, anywhere, find_start, normal_at, walk_back
from maodun.attacks.query.simba import cosines
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.geometry import norms, per_sample
from maodun.core.problem import Problem

# The paper's rate of convergence; the best share of the votes grows by its power of -2/3 from step to step.
_GROWTH = 0.6 ** (-2.0 / 3.0)
_WIDTH = 1e-4
_RESERVE = 20
_REACHES = 12


@dataclass
class GeoDAState(State):
    """`x` is the nearest point found at the boundary; `step` counts the iterations done."""

    step: int


@dataclass(frozen=True, kw_only=True)
class GeoDA(Attack[GeoDAState]):
    """Least distance from labels alone, along the boundary's normal from the clean input (Rahmati et al., CVPR 2020).

    Inputs N x ..., values in [0, 1]; l2 and linf. `steps` iterations share `queries` votes, each about 1.4 times as
    many as the one before. `frequencies` draws directions among the lowest so many cosine waves per side of an image
    (None: everywhere). `starts` "noise" looks for a start in noise keyed by the sample's id, at most `tries` queries;
    "batch" asks first the nearest sample of the batch with another label (the target's), which makes a result depend
    on its batch and is what targeted runs need. A sample without a start has no candidate. Costs `queries` and about
    20 forwards per iteration; no backwards.
    """

    name: ClassVar[str] = "geoda"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    kind: ClassVar[str] = "minimum"
    access: ClassVar[str] = "decision"

    queries: int = 4000
    steps: int = 10
    frequencies: int | None = None
    starts: Literal["noise", "batch"] = "noise"
    tries: int = 100

    def __post_init__(self) -> None:
        for option in ("queries", "steps", "tries", "frequencies"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise InputError(f"{option} {value}", "must be at least 1", "give a positive number")

    @property
    def total_steps(self) -> int:
        """One step per normal."""
        return self.steps

    def votes(self, step: int) -> int:
        """Return the votes of iteration `step` (from 0)."""
        return max(1, int(self.queries * _GROWTH**step * (_GROWTH - 1.0) / (_GROWTH**self.steps - 1.0)))

    def init(self, problem: Problem) -> GeoDAState:
        """Find a point that fools the model and walk back to the boundary."""
        asking = Asking.of(problem)
        start, have = find_start(asking, self.starts, self.tries, problem.stream("geoda/start"))
        x = walk_back(asking, start, have, _WIDTH)
        return GeoDAState(x, ~have | asking.leave(), 0)

    def step(self, problem: Problem, state: GeoDAState) -> GeoDAState:
        """Estimate the normal at the boundary point and look for the boundary along it, from the clean input."""
        asking, threat = Asking.of(problem), problem.threat
        entries = problem.x[0].numel()
        radius = norms(state.x - problem.x, "l2") / (2.0 * math.sqrt(entries))
        normal, made = normal_at(
            asking, state.x, radius, self.votes(state.step), ~state.done, self._draw(problem), state.step + 1, _RESERVE
        )
        asking.broke |= made == 0
        if threat.norm == "linf":
            normal = normal.sign()
        near = threat.distance(state.x, problem.x)
        far, reached = _along(asking, normal, near)
        found = walk_back(asking, far, reached, _WIDTH)
        nearer = reached & (threat.distance(found, problem.x) < near)
        x = torch.where(per_sample(nearer, found).bool(), found, state.x)
        return GeoDAState(x, state.done | asking.leave(), state.step + 1)

    def finish(self, problem: Problem, state: GeoDAState) -> None:
        """Nothing is left to look at: every point was asked for."""

    def _draw(self, problem: Problem) -> Draw:
        stream, shape = problem.stream("geoda/normal"), tuple(problem.x.shape[1:])
        if self.frequencies is None or len(shape) != 3:
            return anywhere(stream, math.prod(shape))
        channels, height, width = shape
        down = cosines(height, "l2")[: self.frequencies].to(problem.x)
        across = cosines(width, "l2")[: self.frequencies].to(problem.x)

        def waves(ids: Tensor, size: int, number: int) -> Tensor:
            weights = stream.coarse_normal(ids, (size, channels, down.shape[0], across.shape[0]), number).to(down)
            return (down.T @ weights @ across).flatten(2)

        return waves


def _along(asking: Asking, normal: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Return points that fool the model along `normal`, `near` (N,) from the clean input or farther, and for whom."""
    problem = asking.problem
    open_, length, far = ~asking.broke, near, problem.x
    reached = torch.zeros_like(open_)
    for _ in range(_REACHES):
        if not bool(open_.any()):
            break
        there = (problem.x + per_sample(length, normal) * normal).clamp_(0.0, 1.0)
        hit = asking.fooled(there, open_)
        far = torch.where(per_sample(hit, far).bool(), there, far)
        reached = reached | hit
        open_ = open_ & ~hit & ~asking.broke
        length = length * 1.5
    return far, reached
