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


LOSSES: dict[str, LossFunction] = {
    "ce": cross_entropy,
    "margin": margin,
    "dlr": dlr,
    "probability": probability_margin,
}


def get_loss(name: str) -> LossFunction:
    """Return the loss called `name` (ce, margin, dlr, probability); InputError with the nearest name otherwise."""
    if name not in LOSSES:
        raise InputError(f"loss '{name}'", "is not a loss known here", nearest(name, list(LOSSES)))
    return LOSSES[name]
