"""RayS: the sign direction whose ray meets the decision boundary soonest, from labels alone (linf).

Chen and Gu, "RayS: a ray searching method for hard-label adversarial attack", KDD 2020. Every sample is at its own
place of the search, and a step asks one question for each, so no sample waits for another. Unlike the published code
the radius along an accepted direction is found by steps that double down from the last one before it is halved, blocks
start over at the coarsest level after the finest, and a search ends when a whole round changed nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.problem import Problem

# What the next answer decides: whether a flip helps, how far down the doubling steps go, or the half of an interval.
CHECK, GALLOP, BISECT = 0, 1, 2


@dataclass
class RaySState(State):
    """`sign` N x D is the best direction, `radius` (N,) where it is known to fool (1 while nothing is found).

    `found` (N,); `phase` (N,) what the next answer decides; `low` (N,) a radius known to fail; `gap` (N,) the next
    doubling step; `level`, `block` (N,) the blocks under trial (-1: the start direction itself); `gained` (N,) whether
    this round of all levels changed anything. `x` is the last point asked for.
    """

    sign: Tensor
    radius: Tensor
    found: Tensor
    phase: Tensor
    low: Tensor
    gap: Tensor
    level: Tensor
    block: Tensor
    gained: Tensor


@dataclass(frozen=True, kw_only=True)
class RayS(Attack[RaySState]):
    """Least linf distance along rays of signs, flipped block by block; sees labels only (Chen and Gu, KDD 2020).

    Inputs N x ..., values in [0, 1]. `queries` is the most a sample is asked after the clean pass; `tolerance` the
    width in input units to which a radius is known. Starts at all +1: a sample for which neither a ray nor any flipped
    one fools the model at radius 1 has no candidate. Costs at most `queries` forwards, less where a round of all block
    sizes changes nothing or `enough` is reached. Untargeted.
    """

    name: ClassVar[str] = "rays"
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    kind: ClassVar[str] = "minimum"
    access: ClassVar[str] = "decision"
    can_target: ClassVar[bool] = False

    queries: int = 10000
    tolerance: float = 0.001

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise InputError(f"queries {self.queries}", "must be at least 1", "give a positive number")
        if not 0.0 < self.tolerance < 1.0:
            raise InputError(f"tolerance {self.tolerance}", "is a width in input units", "give a number in (0, 1)")

    @property
    def total_steps(self) -> int:
        """One step per query."""
        return self.queries

    def init(self, problem: Problem) -> RaySState:
        """All signs up, nothing asked yet."""
        x = problem.x
        n, device = x.shape[0], x.device
        zero = torch.zeros(n, device=device)
        no = torch.zeros(n, dtype=torch.bool, device=device)
        count = torch.zeros(n, dtype=torch.int64, device=device)
        return RaySState(
            x=x,
            done=no,
            sign=torch.ones_like(x).flatten(1),
            radius=zero + 1.0,
            found=no.clone(),
            phase=count + CHECK,
            low=zero.clone(),
            gap=zero + 0.5,
            level=count.clone(),
            block=count - 1,
            gained=no.clone(),
        )

    def step(self, problem: Problem, state: RaySState) -> RaySState:
        """Ask one question per sample and move each to its next."""
        flat = problem.x.flatten(1)
        probe = self._probe(state)
        checking = state.phase == CHECK
        trial = torch.where(_inside(state, flat) & checking.unsqueeze(1), -state.sign, state.sign)
        x = torch.addcmul(flat, trial, probe.unsqueeze(1)).clamp_(0.0, 1.0).reshape(problem.x.shape)
        hit = problem.is_reached(problem.decisions(x))
        state.sign = torch.where((checking & hit).unsqueeze(1), trial, state.sign)
        state.x = x
        self._learn(state, probe, hit)
        self._advance(state, (checking & ~hit) | (state.phase == CHECK) & ~checking, flat.shape[1])
        return state

    def finish(self, problem: Problem, state: RaySState) -> None:
        """Nothing is left to look at: every point was asked for."""

    def _probe(self, state: RaySState) -> Tensor:
        return torch.where(
            state.phase == BISECT,
            (state.low + state.radius) / 2.0,
            torch.where(state.phase == GALLOP, (state.radius - state.gap).clamp(min=0.0), state.radius),
        )

    def _learn(self, state: RaySState, probe: Tensor, hit: Tensor) -> None:
        """Take in the answers: radius, interval and phase of every sample."""
        checked, galloped = state.phase == CHECK, state.phase == GALLOP
        state.radius = torch.where(hit, probe, state.radius)
        # What failed here bounds from below; a new direction starts without a bound.
        state.low = torch.where(checked & hit, torch.zeros_like(probe), torch.where(hit, state.low, probe))
        state.gained |= hit
        # The first radius is searched by halves; later ones are near the last.
        first = checked & hit & ~state.found
        state.found |= hit
        state.gap = torch.where(checked, torch.full_like(probe, 2.0 * self.tolerance), state.gap * 2.0)
        after = torch.where(hit & ~first, GALLOP, BISECT)
        phase = torch.where(checked, torch.where(hit, after, CHECK), torch.where(galloped & hit, GALLOP, BISECT))
        narrow = (state.radius - state.low <= self.tolerance) & (phase != CHECK)
        state.phase = torch.where(narrow, CHECK, phase)

    def _advance(self, state: RaySState, leave: Tensor, entries: int) -> None:
        """Move the samples in `leave` to their next block; those whose whole round gained nothing are done."""
        size = _sizes(state.level, entries)
        last = state.block + 1 >= (entries + size - 1) // size
        # The start direction (block -1) is followed by the first block of level 0, all signs at once.
        last &= state.block >= 0
        wrap = leave & last & (size == 1)
        state.block = torch.where(leave, torch.where(last, 0, state.block + 1), state.block)
        state.level = torch.where(leave & last, torch.where(size == 1, 0, state.level + 1), state.level)
        state.done = state.done | (wrap & ~state.gained)
        state.gained &= ~wrap


def _sizes(level: Tensor, entries: int) -> Tensor:
    """Return the (N,) block sizes: the entries halved `level` times, rounded up."""
    share = torch.pow(2, level)
    return (entries + share - 1) // share


def _inside(state: RaySState, flat: Tensor) -> Tensor:
    """Return N x D booleans: the entries of the block under trial."""
    size = _sizes(state.level, flat.shape[1])
    place = torch.arange(flat.shape[1], device=flat.device)
    start = (state.block * size).unsqueeze(1)
    return (place >= start) & (place < start + size.unsqueeze(1)) & (state.block >= 0).unsqueeze(1)
