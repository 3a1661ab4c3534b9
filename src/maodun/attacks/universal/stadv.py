"""StAdv: bend the image instead of repainting it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.core import flow as flows
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.losses import get_loss
from maodun.core.problem import Problem
from maodun.core.threat import Threat

_MOMENTUM, _SQUARES, _TINY = 0.9, 0.999, 1e-12
_LEAST_WIDTH = 0.1
_START = 0.1


@dataclass
class StAdvState(State):
    """`flow` (N x 2 x H x W, pixels) makes `x`; `mean` and `square` are Adam's moments; `step` counts all steps."""

    flow: Tensor
    mean: Tensor
    square: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class StAdv(Attack[StAdvState]):
    """Move pixels along a flow until the class changes (Xiao et al., ICLR 2018).

    Images N x C x H x W, values in [0, 1]. The threat is "flow": `eps` is the largest displacement in pixels along
    either axis. No lp ball describes a bent image: shifting an edge by a pixel changes values by up to one, in as many
    entries as the edge is long, and nobody sees it. Declaring linf = 1 would let a verdict accept any image at all, and
    declaring a small linf would throw true flows out. So displacement is the budget, as in later evaluations of StAdv
    (0.05 of half the image: 0.8 pixels on 32 x 32), and the verdict checks it on the image alone, without believing
    the attack's own flow. Smoothness is not part of the budget: `smooth` weighs it in the objective (tau; the published
    value is 0.05), and 0 gives the strongest attack of the threat.

    The objective is `loss` (ce, margin, dlr, probability) less `smooth` times the flow's total variation: the sum over
    neighbouring pixels of the distance between their displacements (equation 4 of the paper, each pair counted once).
    It is climbed by Adam steps of `step_size` pixels (None: eps / 10) that shrink to a tenth by the end, where the
    paper uses L-BFGS without a bound. Slopes are taken over min(eps, 1) pixels at first and a tenth of it at the end
    (ours; the derivative alone gets stuck between pixels). `restarts` start from other random flows of at most 0.1
    pixels, on the samples not yet broken. Costs `steps` forwards and backwards per sample and restart and one last
    forward, less what stops early. Raises UnsupportedError without a finite eps.
    """

    name: ClassVar[str] = "stadv"
    norms: ClassVar[tuple[str, ...]] = ("flow",)
    images_only: ClassVar[bool] = True

    loss: str = "margin"
    steps: int = 100
    smooth: float = 0.0
    step_size: float | None = None
    restarts: int = 1

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for option, least in (("steps", 1), ("restarts", 1), ("smooth", 0.0)):
            if not getattr(self, option) >= least:
                reason = f"is {getattr(self, option)}"
                raise InputError(f"option '{option}' of stadv", reason, f"give at least {least}")

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse what is no image, another norm than flow, and an infinite radius."""
        super().check(x, threat)
        if math.isinf(threat.eps):
            raise UnsupportedError("attack 'stadv'", "needs a finite eps", "give the largest displacement in pixels")

    @property
    def total_steps(self) -> int:
        """All steps over all restarts."""
        return self.steps * self.restarts

    def init(self, problem: Problem) -> StAdvState:
        """Start from a small random flow: on the pixels themselves the interpolation has kinks."""
        done = torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device)
        flow = self._start(problem, 0)
        zero = torch.zeros_like(flow)
        return StAdvState(x=flows.warp(problem.x, flow), done=done, flow=flow, mean=zero, square=zero, step=0)

    def step(self, problem: Problem, state: StAdvState) -> StAdvState:
        """Climb once, keep every displacement within the budget, and bend the clean image anew."""
        _, _, gradient = problem.gradient(state.x, self.loss)
        turn, eps = state.step % self.steps, problem.threat.eps
        width = min(eps, 1.0) * max(_LEAST_WIDTH, 1.0 - turn / self.steps)
        climb = flows.secants(problem.x, state.flow, gradient, width, eps)
        if self.smooth:
            climb = climb - self.smooth * variation_gradient(state.flow)
        mean = torch.lerp(climb, state.mean, _MOMENTUM)
        square = torch.lerp(climb.square(), state.square, _SQUARES)
        count = turn + 1
        pace = (mean / (1 - _MOMENTUM**count)) / ((square / (1 - _SQUARES**count)).sqrt() + _TINY)
        size = (eps / 10 if self.step_size is None else self.step_size) * (1.0 - 0.9 * turn / self.steps)
        flow = (state.flow + size * pace).clamp_(-eps, eps)
        state = replace(state, flow=flow, x=flows.warp(problem.x, flow), mean=mean, square=square, step=state.step + 1)
        if state.step % self.steps == 0 and state.step < self.total_steps:
            problem.logits(state.x)
            flow = self._start(problem, state.step // self.steps)
            zero = torch.zeros_like(flow)
            state = replace(state, flow=flow, x=flows.warp(problem.x, flow), mean=zero, square=zero)
        return state

    def _start(self, problem: Problem, restart: int) -> Tensor:
        height, width = problem.x.shape[2:]
        draw = problem.stream("stadv/start").uniform(problem.ids, (2, height, width), restart).to(problem.x)
        return (2.0 * draw - 1.0) * min(problem.threat.eps, _START)


def variation(flow: Tensor) -> Tensor:
    """Return the (N,) total variation of flows (N x 2 x H x W): equation 4 of Xiao et al., each pair counted once."""
    down, across = flow.diff(dim=2), flow.diff(dim=3)
    return down.square().sum(1).sqrt().flatten(1).sum(1) + across.square().sum(1).sqrt().flatten(1).sum(1)


def variation_gradient(flow: Tensor) -> Tensor:
    """Return the gradient of `variation`; zero between neighbours that move alike, where it has none."""
    gradient = torch.zeros_like(flow)
    for axis in (2, 3):
        change = flow.diff(dim=axis)
        unit = change / change.square().sum(1, keepdim=True).sqrt().clamp(min=_TINY)
        length = flow.shape[axis] - 1
        gradient.narrow(axis, 1, length).add_(unit)
        gradient.narrow(axis, 0, length).sub_(unit)
    return gradient
