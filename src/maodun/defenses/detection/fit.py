"""From an unfitted detector and clean samples to a classifier that refuses a stated share of clean inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.files import state_sha256
from maodun.core.modes import evaluation_mode
from maodun.core.streams import Stream
from maodun.defenses.detection.base import Adversary, Detector, RejectingClassifier, Seen

_BATCH = 256


def fit_detector(
    model: nn.Module,
    detector: Detector,
    train: tuple[Tensor, Tensor],
    validation: Tensor,
    *,
    adversary: Adversary | None = None,
    seed: int = 0,
) -> RejectingClassifier:
    """Fit `detector` to `model` and set its threshold; returns the two as one rejecting classifier.

    `train` are clean inputs (N x ..., in [0, 1]) and labels (N,) to fit to, `validation` other clean inputs (M x ...)
    of which at most the share `detector.fpr` may be rejected: the threshold is the ceil((M + 1)(1 - fpr))-th smallest
    of their scores, so that a further clean input of the same kind is rejected with probability at most fpr. A
    stochastic part draws from `seed`. Raises InputError for too few validation samples to tell that share from none,
    for a detector that learns from attacks without `adversary`, and for scores that are not finite.
    """
    place = math.ceil((validation.shape[0] + 1) * (1.0 - detector.fpr))
    if place > validation.shape[0]:
        least = math.ceil(1.0 / detector.fpr) - 1
        reason = f"{validation.shape[0]} clean validation samples cannot tell a share of {detector.fpr:g} from none"
        raise InputError(f"detector '{detector.name}'", reason, f"give {least} or more")
    if detector.needs_adversary and adversary is None:
        raise InputError(f"detector '{detector.name}'", "learns from attacked samples", "give adversary=...")
    rejecting = RejectingClassifier(model, detector).eval()
    detector.fitted_to = state_sha256(model)
    x, y = train
    with evaluation_mode(rejecting):
        attacked = None
        if detector.needs_adversary and adversary is not None:
            attacked = see(rejecting, adversary(model, x, y), seed, "attacked")
        with torch.no_grad():
            if detector.learnt:
                detector.learn(see(rejecting, x, seed, "train"), y, attacked)
            scores = torch.cat([detector.score(each) for each in _looks(rejecting, validation, seed, "validation")])
    if not bool(torch.isfinite(scores).all()):
        raise InputError(f"detector '{detector.name}'", "its scores of clean samples are not finite", "take another")
    threshold = scores.double().sort().values[place - 1]
    detector.keep(threshold=threshold, spread=scores.double().std().clamp(min=1e-12))
    return rejecting


def see(rejecting: RejectingClassifier, x: Tensor, seed: int, purpose: str) -> Seen:
    """Return what the detector sees of all of `x`, in batches of its own and without a graph."""
    with torch.no_grad():
        parts = list(_looks(rejecting, x, seed, purpose))
    columns = zip(*(part.features for part in parts), strict=True)
    features = [torch.cat(column) for column in columns]
    return Seen(x, torch.cat([part.logits for part in parts]), features, rejecting.model)


def _looks(rejecting: RejectingClassifier, x: Tensor, seed: int, purpose: str) -> Iterator[Seen]:
    stream = Stream(seed, f"detector/{purpose}")
    for start in range(0, x.shape[0], _BATCH):
        part = x[start : start + _BATCH]
        ids = torch.arange(start, start + part.shape[0], device=x.device)
        with context.draw(stream, ids, torch.zeros_like(ids)):
            yield rejecting.look(part)


__all__ = ["fit_detector", "see"]
