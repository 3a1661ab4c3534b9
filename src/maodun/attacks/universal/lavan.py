"""A patch of its own for every image: unlimited change inside one small square."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.engine import Attack, State
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.losses import get_loss
from maodun.core.problem import Problem
from maodun.core.threat import Threat

_FIRST_RATE, _LAST_RATE = 0.5, 0.05


@dataclass
class LaVANState(State):
    """`mask` (N x 1 x H x W) is true where the patch lies; `worth` (N x rows x columns) is what a place could gain.

    Places already tried are worth minus infinity. `step` counts all steps.
    """

    mask: Tensor
    worth: Tensor
    step: int


@dataclass(frozen=True, kw_only=True)
class LaVAN(Attack[LaVANState]):
    """Repaint one small square of every image, where and as it serves best (Karmon et al., 2018).

    Images N x C x H x W in [0, 1]. The threat is l0: `eps` entries (pixels times channels) may change at will; the
    square is the largest they pay for, or of `side` pixels. The first place is where the linearised `loss` (ce, margin,
    dlr, probability) can gain most within the box, which is the best place of a linear model; each of the other
    `restarts` takes the best of those not yet covered by half (the paper takes places at random). Inside, signed steps
    of 0.5, falling to 0.05, climb the loss. Costs `steps` forwards and backwards per restart and sample, one more pair
    to choose the places, and a last forward, less what stops early.
    """

    name: ClassVar[str] = "lavan"
    norms: ClassVar[tuple[str, ...]] = ("l0",)
    images_only: ClassVar[bool] = True

    side: int | None = None
    loss: str = "margin"
    steps: int = 40
    restarts: int = 4

    def __post_init__(self) -> None:
        get_loss(self.loss)
        for option in ("steps", "restarts") + (() if self.side is None else ("side",)):
            if getattr(self, option) < 1:
                raise InputError(f"option '{option}' of lavan", f"is {getattr(self, option)}", "give at least 1")

    @property
    def total_steps(self) -> int:
        """All steps over all restarts."""
        return self.steps * self.restarts

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse what is no image, an infinite budget, and a square larger than the image or the budget."""
        super().check(x, threat)
        if math.isinf(threat.eps):
            raise UnsupportedError("attack 'lavan'", "needs a finite eps", "give the entries that may change")
        channels, height, width = x.shape[1:]
        if self.side is not None and self.side > min(height, width):
            reason = f"is larger than the image of {height} x {width}"
            raise InputError(f"a patch of side {self.side}", reason, "give a smaller side")
        if channels * (self.side or 1) ** 2 > threat.eps:
            reason = f"changes {channels * (self.side or 1) ** 2} entries and the threat allows {threat.eps:g}"
            raise InputError(f"a patch of side {self.side or 1}", reason, "raise eps or give a smaller side")

    def init(self, problem: Problem) -> LaVANState:
        """Choose every image's first place and start from the clean image."""
        _, _, gradient = problem.gradient(problem.x, self.loss)
        room = torch.where(gradient > 0, 1.0 - problem.x, problem.x)
        gain = (gradient.abs() * room).sum(1, keepdim=True)
        worth = F.avg_pool2d(gain, self._side(problem), stride=1).squeeze(1)
        done = torch.zeros(len(problem), dtype=torch.bool, device=worth.device)
        mask = torch.zeros_like(gain, dtype=torch.bool)
        return self._place(problem, LaVANState(x=problem.x, done=done, mask=mask, worth=worth, step=0))

    def step(self, problem: Problem, state: LaVANState) -> LaVANState:
        """Climb once inside the square; after the last step of a restart, move to the next place."""
        _, _, gradient = problem.gradient(state.x, self.loss)
        turn = state.step % self.steps
        rate = _FIRST_RATE + (_LAST_RATE - _FIRST_RATE) * turn / max(1, self.steps - 1)
        x = torch.where(state.mask, state.x + rate * gradient.sign(), state.x).clamp_(0.0, 1.0)
        state = replace(state, x=x, step=state.step + 1)
        if state.step % self.steps == 0 and state.step < self.total_steps:
            problem.logits(x)
            return self._place(problem, state)
        return state

    def _side(self, problem: Problem) -> int:
        return window_side(problem.threat.eps, tuple(problem.x.shape[1:])) if self.side is None else self.side

    def _place(self, problem: Problem, state: LaVANState) -> LaVANState:
        """Return the state at the best place left, on the clean image; rows without one are done."""
        side, (height, width) = self._side(problem), problem.x.shape[2:]
        best, flat = state.worth.flatten(1).max(1)
        columns = state.worth.shape[2]
        top, left = (flat // columns).reshape(-1, 1, 1), (flat % columns).reshape(-1, 1, 1)
        row = torch.arange(height, device=flat.device).reshape(1, -1, 1) - top
        column = torch.arange(width, device=flat.device).reshape(1, 1, -1) - left
        mask = ((row >= 0) & (row < side) & (column >= 0) & (column < side)).unsqueeze(1)
        rows, across = row[:, : state.worth.shape[1]].abs(), column[:, :, :columns].abs()
        overlap = (side - rows).clamp(min=0) * (side - across).clamp(min=0)
        worth = state.worth.masked_fill(2 * overlap > side**2, -math.inf)
        return replace(state, x=problem.x, mask=mask, worth=worth, done=state.done | torch.isneginf(best))


def window_side(eps: float, shape: tuple[int, ...]) -> int:
    """Return the side of the largest square that `eps` entries of an image C x H x W pay for; at least one."""
    return max(1, min(math.isqrt(int(eps) // shape[0]), shape[1], shape[2]))
