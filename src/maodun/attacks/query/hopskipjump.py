"""HopSkipJump: walk along the boundary by its normal, estimated from labels around it (l2 and linf).

Chen, Jordan and Wainwright, "HopSkipJumpAttack: a query-efficient decision-based attack", IEEE S&P 2020. Unlike the
paper the votes are asked at l2 / (2 sqrt D) from the boundary point, in both norms, with l2 its distance from the clean
input: the paper's d / D lies so near that the votes mostly tell of rounding and of the walk's last interval.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from maodun.attacks.query.asking import Asking, anywhere, find_start, normal_at, walk_back
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.geometry import norms, per_sample
from maodun.core.problem import Problem

# A jump this often halved is shorter than float32 can tell from none.
_HALVINGS = 24
# Queries a row keeps for the jump and the walk back when its budget ends the votes.
_RESERVE = 20
# Halving an interval below the spacing of float32 values never ends it.
_FLOAT = 1e-6


@dataclass
class HopSkipJumpState(State):
    """`x` is a point at the boundary that fools the model; `step` counts the iterations done."""

    step: int


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(Attack[HopSkipJumpState]):
    """Least distance from labels alone: normal by votes, jump, halve back to the boundary (Chen et al., S&P 2020).

    Inputs N x ..., values in [0, 1]; l2 and linf. `steps` iterations; iteration t asks `draws` * sqrt(t) labels around
    the point, at most `most_draws`. `starts` "noise" looks for a start in noise keyed by the sample's id, at most
    `tries` queries; "batch" asks first the nearest sample of the batch with another label (the target's), which makes
    a result depend on its batch and is what targeted runs need. A sample without a start has no candidate.
    """

    name: ClassVar[str] = "hopskipjump"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    kind: ClassVar[str] = "minimum"
    access: ClassVar[str] = "decision"

    steps: int = 64
    draws: int = 100
    most_draws: int = 10000
    starts: Literal["noise", "batch"] = "noise"
    tries: int = 100

    def __post_init__(self) -> None:
        for option in ("steps", "draws", "most_draws", "tries"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} {getattr(self, option)}", "must be at least 1", "give a positive number")

    @property
    def total_steps(self) -> int:
        """One step per iteration."""
        return self.steps

    def init(self, problem: Problem) -> HopSkipJumpState:
        """Find a point that fools the model and walk back to the boundary."""
        asking = Asking.of(problem)
        start, have = find_start(asking, self.starts, self.tries, problem.stream(f"{self.name}/start"))
        x = walk_back(asking, start, have, self._width(problem))
        return HopSkipJumpState(x, ~have | asking.leave(), 0)

    def step(self, problem: Problem, state: HopSkipJumpState) -> HopSkipJumpState:
        """Estimate the normal, jump along it as far as the model stays fooled, walk back to the boundary."""
        number = state.step + 1
        asking = Asking.of(problem)
        everyone = ~state.done
        distance = problem.threat.distance(state.x, problem.x)
        radius = _reach(norms(state.x - problem.x, "l2"), state)
        draws = min(int(self.draws * math.sqrt(number)), self.most_draws)
        draw = anywhere(problem.stream(f"{self.name}/normal"), problem.x[0].numel())
        normal, made = normal_at(asking, state.x, radius, draws, everyone, draw, number, _RESERVE)
        if problem.threat.norm == "linf":
            normal = normal.sign()
        asking.broke |= made == 0
        x = self._jump(asking, state.x, normal, distance / math.sqrt(number))
        x = walk_back(asking, x, ~asking.broke, self._width(problem))
        return HopSkipJumpState(x, state.done | asking.leave(), number)

    def finish(self, problem: Problem, state: HopSkipJumpState) -> None:
        """Nothing is left to look at: every point was asked for."""

    @staticmethod
    def _jump(asking: Asking, x: Tensor, normal: Tensor, length: Tensor) -> Tensor:
        """Return the point reached along `normal`: `length` halved until the model is fooled, else `x` itself."""
        open_, out = ~asking.broke, x
        for _ in range(_HALVINGS):
            if not bool(open_.any()):
                break
            there = (x + per_sample(length, x) * normal).clamp_(0.0, 1.0)
            hit = asking.fooled(there, open_)
            out = torch.where(per_sample(hit, x).bool(), there, out)
            open_ = open_ & ~hit & ~asking.broke
            length = torch.where(open_, length / 2.0, length)
        return out

    @staticmethod
    def _width(problem: Problem) -> float:
        """Return the published precision of the walk back, a share of its length: D^-3/2 in l2, D^-2 in linf."""
        entries = problem.x[0].numel()
        return max(math.pow(entries, -1.5 if problem.threat.norm == "l2" else -2.0), _FLOAT)


def _reach(distance: Tensor, state: HopSkipJumpState) -> Tensor:
    """Return the l2 radii (N,) at which votes are asked; far from the sample the first time, as published."""
    return torch.full_like(distance, 0.1) if state.step == 0 else distance / (2.0 * math.sqrt(state.x[0].numel()))
