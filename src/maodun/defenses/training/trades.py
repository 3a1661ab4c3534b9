"""TRADES: be right on clean inputs, and say the same on adversarial ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from maodun.core.losses import divergence
from maodun.defenses.training.adversarial import Adversarial


@dataclass(frozen=True)
class TRADES(Adversarial):
    """CE(f(x), y) + beta * mean KL(p(x) || p(x')), with p = softmax f.

    `beta` weighs robustness against accuracy (6 for CIFAR-10); `smoothing` is label smoothing of the first term. The
    published inner attack climbs the same divergence (`loss: kl`) from a start near x; both terms carry gradients
    through p(x).
    Source: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019.
    """

    beta: float = 6.0
    smoothing: float = 0.0

    mixes: ClassVar[bool] = True

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the clean cross-entropy and the weighted divergence."""
        return F.cross_entropy(clean, y, label_smoothing=self.smoothing) + self.beta * divergence(adv, clean).mean()
