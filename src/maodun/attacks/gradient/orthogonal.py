"""An attack on classifiers that refuse what a detector doubts: each half's gradient kept out of the other's way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.gradient.pgd import PGD, PGDState
from maodun.core.errors import InputError
from maodun.core.geometry import per_sample
from maodun.core.problem import Problem

_MODES = ("orthogonal", "selective")
LEAST = 0.2


@dataclass(frozen=True, kw_only=True)
class Orthogonal(PGD):
    """Orthogonal projected gradient ascent against detectors (Bryniarski et al., ICLR 2022).

    At every step and for every sample only one half is worked on: the classifier (up the gradient of `loss`) until the
    class is wrong, then the detector (down its doubt). `mode` "orthogonal" first removes from that half's gradient its
    component along the other's, so that a step against one does not undo, to first order, what was won against the
    other; "selective" leaves it in. Where less than a fifth of the gradient is left, as when the detector is a
    function of the logits, it stays whole (ours). `margin` is how far below the threshold the doubt is driven, in its
    units, before the class has its turn again. The step size falls from that of PGD (`step_size`; default eps / 4 or
    2.5 * eps / steps) to a tenth along a cosine, which the paper does not do. `steps`, `restarts` and `random_start`
    as for PGD; costs a forward and two backwards per step. Against a model that never refuses it is PGD with such
    steps.
    """

    name: ClassVar[str] = "orthogonal"

    loss: str = "margin"
    steps: int = 100
    mode: str = "orthogonal"
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise InputError(f"mode '{self.mode}'", "is not a mode of orthogonal", "use orthogonal or selective")

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the direction of this step's half, for every sample."""
        fooled, climb, doubt, rise = problem.apart(state.x, self.loss)
        # Accepted and fooled is won, and goes on down to the margin; refused and right is first to be fooled.
        down = per_sample((fooled & (doubt > -self.margin)).to(climb.dtype), climb)
        own = down * -rise + (1 - down) * climb
        if self.mode == "selective":
            return own, state
        return without(own, down * climb + (1 - down) * rise), state

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the unit step, shortened along a cosine."""
        turn = torch.tensor(torch.pi * (state.step % self.steps) / self.steps)
        share = float(0.1 + 0.45 * (1 + torch.cos(turn)))
        return share * problem.threat.steepest(gradient, state.x), None


def without(vector: Tensor, other: Tensor) -> Tensor:
    """Return rows of `vector` less their component along those of `other`; the rows as they are where LEAST is left."""
    flat, along = vector.flatten(1), other.flatten(1)
    along = along / along.norm(dim=1, keepdim=True).clamp(min=1e-30)
    left = flat - (flat * along).sum(1, keepdim=True) * along
    some = left.norm(dim=1, keepdim=True) > LEAST * flat.norm(dim=1, keepdim=True)
    return torch.where(some, left, flat).reshape(vector.shape)


__all__ = ["Orthogonal", "without"]
