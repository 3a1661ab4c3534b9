"""SimBA: one pixel or one cosine wave at a time, kept where the score moves the right way.

Guo, Gardner, You, Wilson and Weinberger, "Simple black-box adversarial attacks", ICML 2019. Unlike the published code
the search stays inside the threat's ball: on its surface a new wave takes its length from the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.geometry import per_sample
from maodun.core.losses import get_loss
from maodun.core.problem import Problem
from maodun.core.streams import Stream


@dataclass
class SimBAState(State):
    """`x` is the best point and `loss` (N,) its loss; `order` N x D the basis vectors in their sample's own order.

    `cursor` (N,) is the place in the order, `turned` (N,) whether the first sign has failed there, `round` (N,) how
    often the order was drawn.
    """

    loss: Tensor
    order: Tensor
    cursor: Tensor
    turned: Tensor
    round: Tensor


@dataclass(frozen=True, kw_only=True)
class SimBA(Attack[SimBAState]):
    """Greedy search along single pixels or cosine waves in random order; sees scores only (Guo et al., ICML 2019).

    Values in [0, 1]; `basis` "pixel" takes inputs N x ..., "dct" images N x C x H x W, low frequencies first. `queries`
    steps after the start; `step_size` is a vector's length in the threat's norm and input units (None: 0.2 or half of
    eps, whichever is less, in l2; 2 eps in linf), halved after each round of all vectors. `loss` decides what is kept:
    ce (the paper's probability), margin, dlr or probability.
    Costs queries + 1 forwards per sample, less what stops early; no backwards.
    """

    name: ClassVar[str] = "simba"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    access: ClassVar[str] = "scores"

    queries: int = 5000
    basis: Literal["pixel", "dct"] = "dct"
    step_size: float | None = None
    loss: str = "ce"

    def __post_init__(self) -> None:
        get_loss(self.loss)
        if self.queries < 1:
            raise InputError(f"queries {self.queries}", "must be at least 1", "give a positive number")
        if self.step_size is not None and not self.step_size > 0.0:
            raise InputError(f"step_size {self.step_size}", "must be positive", "give a length in input units")

    @property
    def total_steps(self) -> int:
        """One step per query after the start."""
        return self.queries

    def init(self, problem: Problem) -> SimBAState:
        """Start at the clean input with the first order of every sample."""
        logits = problem.clean()
        none = torch.zeros_like(problem.rows)
        return SimBAState(
            x=problem.x.clone(),
            done=none.bool(),
            loss=get_loss(self.loss)(logits, problem.y, problem.targets),
            order=self._order(problem.x, problem.ids, problem.stream("simba/order"), none),
            cursor=none,
            turned=none.bool(),
            round=none.clone(),
        )

    def step(self, problem: Problem, state: SimBAState) -> SimBAState:
        """Try one signed vector per sample and keep it where the loss grows."""
        chosen = state.order.gather(1, state.cursor.unsqueeze(1)).squeeze(1)
        push = torch.where(state.turned, 1.0, -1.0) * self._length(problem) * torch.pow(0.5, state.round)
        trial = problem.threat.project(self._moved(state.x, chosen, push, problem.threat.norm), problem.x)
        loss = get_loss(self.loss)(problem.logits(trial), problem.y, problem.targets)
        better = loss > state.loss
        state.x = torch.where(per_sample(better, trial).bool(), trial, state.x)
        state.loss = torch.maximum(loss, state.loss)
        state.cursor = state.cursor + (better | state.turned)
        state.turned = ~(better | state.turned)
        over = (state.cursor >= state.order.shape[1]).nonzero().squeeze(1)
        if over.numel():
            state.cursor[over] = 0
            state.round = state.round.index_add(0, over, torch.ones_like(over))
            stream = problem.stream("simba/order")
            state.order[over] = self._order(problem.x[over], problem.ids[over], stream, state.round[over])
        return state

    def finish(self, problem: Problem, state: SimBAState) -> None:
        """Nothing is left to look at: every candidate has been scored."""

    def _length(self, problem: Problem) -> float:
        if self.step_size is not None:
            return self.step_size
        eps = problem.threat.eps
        return 2.0 * eps if problem.threat.norm == "linf" else min(0.2, eps / 2.0)

    def _order(self, x: Tensor, ids: Tensor, stream: Stream, number: Tensor) -> Tensor:
        """Return each sample's order of basis vectors: random, for waves within bands of growing frequency."""
        key = stream.uniform(ids, (x[0].numel(),), number).to(x.device)
        if self._waves(x):
            height, width = x.shape[2:]
            down, across = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
            band = torch.maximum(down.unsqueeze(1) * _BANDS // height, across * _BANDS // width)
            key = key + band.expand(x.shape[1], -1, -1).flatten()
        return key.argsort(1)

    def _waves(self, x: Tensor) -> bool:
        return self.basis == "dct" and x.ndim == 4

    def _moved(self, x: Tensor, chosen: Tensor, push: Tensor, norm: str) -> Tensor:
        """Return `x` plus `push` (N,) times the basis vectors `chosen` (N,), of length one in `norm`."""
        if not self._waves(x):
            flat = x.flatten(1).clone()
            return flat.scatter_add_(1, chosen.unsqueeze(1), push.unsqueeze(1)).reshape(x.shape)
        height, width = x.shape[2:]
        plane, place = chosen // (height * width), chosen % (height * width)
        down = cosines(height, norm).to(x)[place // width]
        across = cosines(width, norm).to(x)[place % width]
        moved = x.clone()
        rows = torch.arange(x.shape[0], device=x.device)
        moved[rows, plane] += (down * push.unsqueeze(1)).unsqueeze(2) * across.unsqueeze(1)
        return moved


# Frequencies are taken in this many bands of equal width, the lowest first.
_BANDS = 8


def cosines(size: int, norm: str) -> Tensor:
    """Return the size x size waves of the discrete cosine transform (type II), each of length one in `norm`."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    waves = torch.cos(math.pi * torch.arange(size, dtype=torch.float64).unsqueeze(1) * place)
    length = waves.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(waves, dim=1)
    return (waves / length.unsqueeze(1)).float()
