"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from maodun.core.losses import best_other, divergence
from maodun.defenses.training.adversarial import Adversarial

# The published constants: they keep the logarithm and the weight away from zero.
_LOG_FLOOR, _WEIGHT_FLOOR = 1.0001, 1.0000001


@dataclass(frozen=True)
class MART(Adversarial):
    """Boosted cross-entropy on x' plus a divergence that counts most where the clean input is misclassified.

    mean[ -log p'_y - log(1.0001 - max over j != y of p'_j) ] + beta * mean[ KL(p || p') * (1.0000001 - p_y) ], with
    p = softmax f(x), p' = softmax f(x'). `beta` is 6 in the published code (5 in the paper).
    Source: Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.
    """

    beta: float = 6.0

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the boosted cross-entropy and the weighted divergence."""
        rival = best_other(adv.softmax(1), y)
        boosted = F.cross_entropy(adv, y) - (_LOG_FLOOR - rival).log().mean()
        doubt = _WEIGHT_FLOOR - clean.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
        return boosted + self.beta * (divergence(adv, clean) * doubt).mean()
