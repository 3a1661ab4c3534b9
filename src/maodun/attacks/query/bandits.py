"""Bandits: a gradient guessed from two scores a step, remembered from step to step and shared by neighbouring pixels.

Ilyas, Engstrom and Madry, "Prior convictions: black-box adversarial attacks with bandits and priors", ICLR 2019
(algorithms 1 to 3, time and data prior). Unlike the published code the point itself is asked only when a probe beside
it fools the model, and the last one, so that a step mostly costs two queries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.engine import Attack, State
from maodun.core.errors import InputError
from maodun.core.geometry import per_sample, unit_l2
from maodun.core.losses import get_loss
from maodun.core.oracle import BudgetExceededError
from maodun.core.problem import Problem


@dataclass
class BanditsState(State):
    """`x` is the point; `prior` N x C x tile x tile (inputs without a plane: N x ...) the direction; `step` counts."""

    prior: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class Bandits(Attack[BanditsState]):
    """Ascent along a direction that two scores a step correct; sees scores only (Ilyas et al., ICLR 2019).

    Inputs N x ..., values in [0, 1]; linf and l2. `steps` steps of two queries, and one more whenever a probe fools
    the model. `tile` is the side of the direction's grid on images (None: half the image's, at least
    8); other inputs have none. `reach` is how far probes are from the point (l2, input units), `exploration` how far
    their directions are apart, `prior_rate` the rate at which scores move the direction (None: 10 in linf, 1 in l2),
    `step_size` that of the point (None: eps / 5 in linf, eps / 10 in l2). `loss` as in PGD. No backwards.
    """

    name: ClassVar[str] = "bandits"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    access: ClassVar[str] = "scores"

    steps: int = 5000
    tile: int | None = None
    reach: float = 0.1
    exploration: float = 1.0
    prior_rate: float | None = None
    step_size: float | None = None
    loss: str = "margin"

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for option in ("steps", "tile", "reach", "exploration", "prior_rate", "step_size"):
            value = getattr(self, option)
            if value is not None and not value > 0:
                raise InputError(f"{option} {value}", "must be positive", "leave it out for its default")

    @property
    def total_steps(self) -> int:
        """One step per pair of probes."""
        return self.steps

    def init(self, problem: Problem) -> BanditsState:
        """Start at the clean input without a direction."""
        x = problem.x
        shape = x.shape
        if x.ndim == 4:
            side = [min(size, self.tile or max(8, size // 2)) for size in shape[2:]]
            shape = torch.Size((*shape[:2], *side))
        prior = torch.zeros(shape, dtype=x.dtype, device=x.device)
        return BanditsState(x.clone(), torch.zeros(len(problem), dtype=torch.bool, device=x.device), prior, 0)

    def step(self, problem: Problem, state: BanditsState) -> BanditsState:
        """Correct the direction by two scores, move along it, and look at the point where a probe fools the model."""
        able = problem.affords(3)
        if able is not None and not bool(able.all()):
            self._last(problem, state, able)
        entries = state.prior[0].numel()
        noise = problem.stream("bandits/probe").coarse_normal(problem.ids, tuple(state.prior.shape[1:]), state.step)
        noise = noise.to(state.x) * (self.exploration / math.sqrt(entries))
        probes = [state.x + self.reach * unit_l2(self._grown(state.prior + side * noise, state.x)) for side in (1, -1)]
        wide = problem.repeat(2)
        logits = wide.logits(torch.stack(probes, 1).flatten(0, 1).clamp_(0.0, 1.0))
        values = get_loss(self.loss)(logits, wide.y, wide.targets).reshape(-1, 2)
        slope = (values[:, 0] - values[:, 1]) / (self.reach * self.exploration)
        state.prior = self._corrected(state.prior, per_sample(slope, noise) * noise, problem.threat.norm)
        state.x = self._moved(problem, state)
        state.step += 1
        near = wide.is_adversarial(logits).reshape(-1, 2).any(1).nonzero().squeeze(1)
        if near.numel():
            problem.select(near).logits(state.x[near])
        return state

    def _last(self, problem: Problem, state: BanditsState, able: Tensor) -> None:
        """Look at the points of the rows that cannot pay for another step, and let them leave."""
        single = problem.affords(1)
        last = (~able if single is None else single & ~able).nonzero().squeeze(1)
        if last.numel():
            problem.select(last).logits(state.x[last])
        raise BudgetExceededError(problem.rows[~able])

    @staticmethod
    def _grown(prior: Tensor, x: Tensor) -> Tensor:
        """Return the direction at the size of the input: every cell of the grid covers its pixels."""
        return prior if prior.shape == x.shape else F.interpolate(prior, size=x.shape[2:], mode="nearest")

    def _corrected(self, prior: Tensor, estimate: Tensor, norm: str) -> Tensor:
        """Return the direction after one step: exponentiated gradients in linf, plain ones in l2 (algorithm 2)."""
        if norm == "l2":
            return prior + (self.prior_rate or 1.0) * estimate
        # (1 + p) / 2 times exp(rate g), renormalised against (1 - p) / 2 times exp(-rate g), is a shift in atanh.
        rate = self.prior_rate or 10.0
        share = prior.clamp(-1.0 + 1e-6, 1.0 - 1e-6)
        return torch.tanh(torch.atanh(share) + rate * estimate)

    def _moved(self, problem: Problem, state: BanditsState) -> Tensor:
        threat = problem.threat
        size = self.step_size or threat.eps / (5.0 if threat.norm == "linf" else 10.0)
        direction = threat.steepest(self._grown(state.prior, state.x), state.x)
        return threat.project(state.x + size * direction, problem.x)
