"""One referee for everybody: the same model, the same ball, the same rule, whatever a contender claims."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SLACK = 1e-5
"""Relative and absolute room for float32 rounding when a perturbation is measured against the ball and the box."""


def distances(x_adv: Tensor, x: Tensor, norm: str) -> Tensor:
    """Distance [N] between two batches in the given norm (linf, l2 or l1), computed in float64."""
    delta = (x_adv.double() - x.double()).flatten(1)
    order = {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm]
    return torch.linalg.vector_norm(delta, ord=order, dim=1)


@dataclass(frozen=True)
class Score:
    """What one adversarial batch achieved.

    `robust` [N] is True where the model is right on the clean sample and no valid adversarial was handed in at the
    judged radius; `fooled` [N] is True where the sample handed in is in the box and misclassified, at any distance;
    `distance` [N] is 0 for samples misclassified from the start, infinite where nothing was found.
    """

    robust: Tensor
    fooled: Tensor
    distance: Tensor
    outside_ball: int
    outside_box: int
    not_finite: int

    @property
    def robust_accuracy(self) -> float:
        return self.robust.float().mean().item()

    @property
    def success_rate(self) -> float:
        """Share of samples with an adversarial at any distance (clean mistakes count as found)."""
        return torch.isfinite(self.distance).float().mean().item()

    @property
    def median_distance(self) -> float:
        """Median over all samples, not found = infinite."""
        return self.distance.median().item()


@torch.no_grad()
def score(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor, norm: str, eps: float) -> Score:
    """Judge one batch (all [N, ...], labels [N]) with the model in evaluation mode.

    A sample that left the ball or the box by more than rounding, or that holds a NaN, is a failure of the attack.
    """
    model.eval()
    clean_ok = model(x).argmax(1) == y
    finite = torch.isfinite(x_adv).flatten(1).all(1)
    safe = torch.where(finite.view(-1, *[1] * (x.ndim - 1)), x_adv, x).float()
    in_box = ((safe >= -SLACK) & (safe <= 1 + SLACK)).flatten(1).all(1)
    wrong = (model(safe.clamp(0, 1)).argmax(1) != y) & in_box & finite
    measured = distances(safe, x, norm)
    in_ball = measured <= eps * (1 + SLACK) + SLACK
    return Score(
        robust=clean_ok & ~(wrong & in_ball),
        fooled=wrong,
        distance=torch.where(clean_ok, torch.where(wrong, measured, torch.inf), 0.0),
        outside_ball=int((~in_ball).sum()),
        outside_box=int((~in_box).sum()),
        not_finite=int((~finite).sum()),
    )
