"""What an attack climbs: per-sample objectives of the logits, larger meaning closer to success.

Every loss has the signature `loss(logits, y, targets) -> (N,)`. With `targets` None the goal is any class but `y`;
otherwise it is the class `targets`. All are unchanged when a constant is added to a sample's logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError, nearest

LossFunction = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def best_other(logits: Tensor, y: Tensor) -> Tensor:
    """Return the (N,) largest logit among the classes other than `y`; masked by -inf, so any shift is safe."""
    return logits.scatter(1, y.unsqueeze(1), -math.inf).amax(1)


def _of(logits: Tensor, y: Tensor) -> Tensor:
    return logits.gather(1, y.unsqueeze(1)).squeeze(1)


def cross_entropy(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Cross-entropy of the label, or minus that of the target (Goodfellow et al., 2015; Kurakin et al., 2017)."""
    if targets is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, targets, reduction="none")


def margin(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Best other logit minus the label's, or the target's minus its best rival; positive exactly on success.

    Carlini and Wagner (2017), objective f6, without the floor.
    """
    if targets is None:
        return best_other(logits, y) - _of(logits, y)
    return _of(logits, targets) - best_other(logits, targets)


def dlr(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Difference of logits ratio (Croce and Hein, 2020, equations 6 and 7), free of shift and scale.

    Untargeted: -(z_y - max other) / (z_(1) - z_(3)). Targeted: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2). With three
    classes the targeted denominator becomes z_(1) - z_(3). With two classes no function of the logits is free of shift
    and scale except the sign of their difference, which has no gradient, so the plain margin is used.
    """
    classes = logits.shape[1]
    top = logits.topk(min(4, classes), dim=1).values
    rise = best_other(logits, y) - _of(logits, y) if targets is None else _of(logits, targets) - _of(logits, y)
    if classes == 2:
        return rise
    if targets is None or classes == 3:
        spread = top[:, 0] - top[:, 2]
    else:
        spread = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3])
    return rise / (spread + 1e-12)


def probability_margin(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """The margin between softmax probabilities instead of logits (Gao et al., arXiv 2411.15210)."""
    return margin(torch.softmax(logits, dim=1), y, targets)


def confidence(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """Log-probability of the likeliest wrong class, or of the target (after Stutz et al., ICML 2020); at most 0.

    Its gradient does not vanish before the class has been reached, and only then as its probability nears one.
    """
    log_p = F.log_softmax(logits, dim=1)
    return best_other(log_p, y) if targets is None else _of(log_p, targets)


def divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """Return (N,) KL(softmax(reference) || softmax(logits)) in nats; zero exactly where both agree."""
    target, log_p = F.log_softmax(reference, dim=1), F.log_softmax(logits, dim=1)
    return (target.exp() * (target - log_p)).sum(1)


def square_gap(logits: Tensor, reference: Tensor) -> Tensor:
    """Return (N,) the squared l2 distance between softmax(logits) and softmax(reference), in [0, 2]."""
    return (logits.softmax(1) - reference.softmax(1)).square().sum(1)


LOSSES: dict[str, LossFunction] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "probability": probability_margin,
    "confidence": confidence,
}


DEPARTURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"kl": divergence, "square": square_gap}
"""Losses of (logits, clean logits): how far the answer has moved, whatever the label. Their gradient is zero at the
clean input, so a search needs a random start. Sources: TRADES (Zhang et al., 2019); SCORE (Pang et al., 2022)."""


def check_loss(name: str) -> None:
    """Raise InputError with the nearest name unless `name` is in LOSSES or DEPARTURES."""
    if name not in DEPARTURES:
        get_loss(name)


def get_loss(name: str) -> LossFunction:
    """Return the loss called `name` (a key of LOSSES); InputError with the nearest name otherwise."""
    if name not in LOSSES:
        raise InputError(f"loss '{name}'", "is not a loss known here", nearest(name, [*LOSSES, *DEPARTURES]))
    return LOSSES[name]
