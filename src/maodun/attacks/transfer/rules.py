"""What the gradients of an ensemble's members add up to. Every rule reduces to the plain gradient for one member.

A rule gets `slope(problem, x)`, the gradient of a problem's loss with the attack's input and gradient hooks applied,
and calls it for the ensemble or its members, so that everything is metered where it is spent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.geometry import norms, per_sample, unit_l2
from maodun.core.losses import cross_entropy
from maodun.core.problem import Problem
from maodun.core.streams import Stream

Slope = Callable[[Problem, Tensor], Tensor]

RULES = ("fused", "losses", "svre", "adaea", "cwa")

# The published inner step of CWA is 250 for inputs of 3 x 224 x 224, each gradient scaled to l2 length one.
_CWA_STEP = 250.0 / (3 * 224 * 224) ** 0.5
_CWA_REVERSE = 1.0 / 15.0
_ADAEA_BETA, _ADAEA_CUT = 10.0, -0.3


def unit_l1(gradient: Tensor) -> Tensor:
    """Scale every sample to a mean absolute entry of one; a zero gradient stays zero."""
    length = norms(gradient, "l1") / gradient[0].numel()
    return gradient / per_sample(torch.where(length > 0, length, torch.ones_like(length)), gradient)


def losses(problem: Problem, x: Tensor, slope: Slope) -> Tensor:
    """Return the gradient of the members' mean loss."""
    members = problem.members()
    total = slope(members[0], x)
    for member in members[1:]:
        total = total + slope(member, x)
    return total / len(members)


def svre(problem: Problem, x: Tensor, slope: Slope, rate: float, decay: float, inner: int, order: Stream) -> Tensor:
    """Return the direction of stochastic variance reduced ensembling (Xiong et al., CVPR 2022, algorithm 1).

    `inner` steps of length `rate` from `x`, each along one member's gradient corrected by what it differs from the
    ensemble's at `x`, with a momentum of their own; the member of each step is drawn for all samples alike.
    """
    members = problem.members()
    pooled = slope(problem, x)
    if len(members) == 1:
        return pooled
    picks = order.integers(torch.zeros(1, dtype=torch.int64), (inner,), len(members))[0].tolist()
    there = {pick: slope(members[pick], x) for pick in sorted(set(picks))}
    look, velocity = x, torch.zeros_like(x)
    for pick in picks:
        corrected = slope(members[pick], look) - (there[pick] - pooled)
        velocity = decay * velocity + unit_l1(corrected)
        look = problem.threat.project(look + rate * problem.threat.steepest(velocity, look), problem.x)
    return velocity


def adaea(problem: Problem, x: Tensor, slope: Slope, rate: float) -> Tensor:
    """Return the adaptively weighted gradient with disparate pixels filtered out (Chen et al., ICCV 2023).

    A member weighs more the more its own step raises the others' losses, here per sample and on the members' losses
    rather than per batch and on their logits (reconstruction). Pixels where the members' gradients point apart
    (mean pairwise cosine over the channels below -0.3) are left alone; inputs that are not images are not filtered.
    """
    members = problem.members()
    if len(members) == 1:
        return slope(problem, x)
    slopes = [slope(member, x) for member in members]
    steps = [problem.threat.project(x + rate * problem.threat.steepest(one, x), problem.x) for one in slopes]
    harm = torch.stack([torch.stack([_loss(other, step) for other in members]) for step in steps])
    own = harm.diagonal().T.unsqueeze(0)
    ratio = harm / own.clamp(min=1e-6) if not problem.targeted else own / harm.clamp(min=1e-6)
    others = ~torch.eye(len(members), dtype=torch.bool, device=x.device).unsqueeze(2)
    weights = (_ADAEA_BETA * (ratio * others).sum(1)).softmax(0)
    combined = sum((per_sample(weight, x) * one for weight, one in zip(weights, slopes, strict=True)), torch.zeros(()))
    return combined * _agreement(slopes) if x.ndim == 4 else combined


def _loss(member: Problem, x: Tensor) -> Tensor:
    logits = member.logits(x)
    if member.targets is None:
        return cross_entropy(logits, member.y)
    return -cross_entropy(logits, member.y, member.targets)


def _agreement(slopes: list[Tensor]) -> Tensor:
    """Return N x 1 x H x W: 1 where the gradients' mean pairwise cosine over the channels reaches the cut."""
    pairs = [F.cosine_similarity(one, two, dim=1) for place, one in enumerate(slopes) for two in slopes[:place]]
    return (torch.stack(pairs).mean(0, keepdim=False) >= _ADAEA_CUT).unsqueeze(1).to(slopes[0])


def cwa(problem: Problem, x: Tensor, slope: Slope, decay: float, inner: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the direction of the common weakness attack and its inner momentum (Chen et al., ICLR 2024).

    First a step back by eps / 15, then one step per member along normalised gradients with momentum; the direction
    is where that led. The published inner step of 250 is for 3 x 224 x 224 entries and scales with their root.
    """
    members = problem.members()
    pooled = slope(problem, x)
    if len(members) == 1:
        return pooled, inner
    threat = problem.threat
    look = threat.project(x - _CWA_REVERSE * threat.eps * threat.steepest(pooled, x), problem.x)
    length = _CWA_STEP * x[0].numel() ** 0.5
    for member in members:
        step = unit_l2(slope(member, look))
        inner = step if inner is None else decay * inner + step
        look = threat.project(look + length * inner, problem.x)
    return look - x, inner
