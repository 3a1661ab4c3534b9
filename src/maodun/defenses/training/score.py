"""SCORE: squared errors of probabilities in place of TRADES' cross-entropy and divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from maodun.core.losses import square_gap
from maodun.defenses.training.adversarial import Adversarial


@dataclass(frozen=True)
class SCORE(Adversarial):
    """mean ||p(x) - onehot(y)||^2 + beta * mean ||p(x') - p(x)||^2, with p = softmax f (the LSE form).

    `beta` is 3 to 4 in the paper. A distance obeys the triangle inequality, so accuracy and robustness share an
    optimum. The published inner attack climbs the same squared gap (`loss: square`).
    Source: Pang et al., "Robustness and accuracy could be reconcilable by (proper) definition", ICML 2022.
    """

    beta: float = 3.0

    mixes: ClassVar[bool] = True

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return both mean squared gaps."""
        truth = (F.one_hot(y, clean.shape[1]) if y.ndim == 1 else y).to(clean)
        error = (clean.softmax(1) - truth).square().sum(1)
        return error.mean() + self.beta * square_gap(adv, clean).mean()
