"""Detectors that ask the classifier itself how sure it is."""

from __future__ import annotations

from torch import Tensor

from maodun.defenses.detection.base import Detector, Seen


class MaxSoftmax(Detector):
    """Refuse where the largest softmax probability is low (Hendrycks and Gimpel, ICLR 2017).

    The score is -log of that probability, in nats, which keeps its resolution where the probability rounds to one. No
    fit, only a threshold. Breaker: any attack that goes on past the boundary, towards confident mistakes.
    """

    name = "max_softmax"

    def __init__(self, fpr: float = 0.05, samples: int = 2000, validation: str = "train", file: str = "") -> None:
        super().__init__(fpr, samples, validation, file)

    def score(self, seen: Seen) -> Tensor:
        """Return -log of the largest probability."""
        return seen.logits.logsumexp(1) - seen.logits.amax(1)


class Entropy(Detector):
    """Refuse where the entropy of the softmax is high, in nats (Hendrycks and Gimpel, ICLR 2017; reject option).

    No fit, only a threshold. Breaker: as for max_softmax.
    """

    name = "entropy"

    def __init__(self, fpr: float = 0.05, samples: int = 2000, validation: str = "train", file: str = "") -> None:
        super().__init__(fpr, samples, validation, file)

    def score(self, seen: Seen) -> Tensor:
        """Return the entropy."""
        log_p = seen.logits.log_softmax(1)
        return -(log_p.exp() * log_p).sum(1)
