"""Does the confidence mean anything? Calibration of predicted probabilities, clean and under attack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 15


@dataclass(frozen=True)
class Bins:
    """Mean confidence, accuracy and count per bin (float64, B each), empty bins with zeros."""

    confidence: Tensor
    accuracy: Tensor
    count: Tensor

    @property
    def gap(self) -> Tensor:
        """Accuracy minus confidence per bin: negative where the model is over-confident."""
        return self.accuracy - self.confidence

    @property
    def share(self) -> Tensor:
        """The share of samples per bin."""
        return self.count / self.count.sum()


def _top(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, predicted = probs.double().max(1)
    return confidence, (predicted == labels).double()


def _binned(index: Tensor, confidence: Tensor, correct: Tensor, bins: int) -> Bins:
    zeros = torch.zeros(bins, dtype=torch.float64, device=confidence.device)
    count = zeros.index_add(0, index, torch.ones_like(confidence))
    safe = count.clamp(min=1.0)
    return Bins(zeros.index_add(0, index, confidence) / safe, zeros.index_add(0, index, correct) / safe, count)


def equal_width(probs: Tensor, labels: Tensor, bins: int = BINS) -> Bins:
    """Bin N x C probabilities by confidence into `bins` intervals (lo, hi] of [0, 1]; labels are (N,)."""
    confidence, correct = _top(probs, labels)
    return _binned(equal_width_index(confidence, bins), confidence, correct, bins)


def equal_width_index(confidence: Tensor, bins: int = BINS) -> Tensor:
    """Return the number of the interval (lo, hi] of [0, 1] in which each confidence lies; 0 lies in the first."""
    return (torch.ceil(confidence * bins).long() - 1).clamp(0, bins - 1)


def equal_mass(probs: Tensor, labels: Tensor, bins: int = BINS) -> Bins:
    """Bin N x C probabilities by confidence rank into `bins` groups of equal size (up to one sample)."""
    confidence, correct = _top(probs, labels)
    n = confidence.shape[0]
    rank = torch.empty(n, dtype=torch.int64, device=confidence.device)
    rank[confidence.argsort(stable=True)] = torch.arange(n, device=confidence.device)
    return _binned(rank * bins // max(1, n), confidence, correct, bins)


@dataclass(frozen=True)
class Scores:
    """Calibration of `n` predictions.

    `ece` and `ece_mass` are the expected calibration error over 15 bins of equal width and of equal mass,
    `mce` the largest gap of an equal-width bin; `over` and `under` split `ece` into the part where confidence
    exceeds accuracy and the part where it falls short. `brier` is the multi-class Brier score (0 to 2),
    `nll` the mean negative log-likelihood in nats. ECE is biased upwards for small n.
    """

    ece: float
    ece_mass: float
    mce: float
    over: float
    under: float
    brier: float
    nll: float
    n: int


def calibrate(probs: Tensor, labels: Tensor, bins: int = BINS) -> Scores:
    """Score N x C probabilities against (N,) labels; Guo et al. (ICML 2017), Brier (1950). Needs N >= 1.

    A probability of exactly zero for the label counts as the smallest float32: 87 nats, not infinity.
    """
    width = equal_width(probs, labels, bins)
    mass = equal_mass(probs, labels, bins)
    p = probs.double()
    truth = torch.nn.functional.one_hot(labels, p.shape[1]).double()
    likelihood = p.gather(1, labels[:, None]).clamp(min=torch.finfo(torch.float32).tiny)
    return Scores(
        ece=float((width.share * width.gap.abs()).sum()),
        ece_mass=float((mass.share * mass.gap.abs()).sum()),
        mce=float(width.gap.abs().max()),
        over=float((width.share * (-width.gap).clamp(min=0)).sum()),
        under=float((width.share * width.gap.clamp(min=0)).sum()),
        brier=float(((p - truth) ** 2).sum(1).mean()),
        nll=float(-likelihood.log().mean()),
        n=int(labels.shape[0]),
    )
