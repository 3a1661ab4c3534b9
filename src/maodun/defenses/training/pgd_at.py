"""Adversarial training: minimise the loss at the inputs an attack finds, alone or mixed with the clean loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.training.adversarial import Adversarial


@dataclass(frozen=True)
class AdversarialTraining(Adversarial):
    """Cross-entropy on adversarial inputs only: CE(f(x'), y).

    `smoothing` is label smoothing in [0, 1).
    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018.
    """

    smoothing: float = 0.0

    needs_clean: ClassVar[bool] = False
    mixes: ClassVar[bool] = True

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:  # noqa: ARG002
        """Return the mean cross-entropy at the adversarial inputs."""
        return F.cross_entropy(adv, y, label_smoothing=self.smoothing)


@dataclass(frozen=True)
class MixedTraining(Adversarial):
    """Clean and adversarial cross-entropy in fixed shares: alpha CE(f(x), y) + (1 - alpha) CE(f(x'), y).

    `alpha` in [0, 1], 0.5 by default; with FGSM as the attack this is the original adversarial training. A one-step
    attack can be learnt by heart (catastrophic overfitting): select epochs by a multi-step attack.
    Source: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015.
    """

    alpha: float = 0.5
    smoothing: float = 0.0

    mixes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise InputError(f"alpha {self.alpha}", "is the share of the clean loss", "give a number in [0, 1]")

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the weighted mean of both cross-entropies."""
        own = F.cross_entropy(clean, y, label_smoothing=self.smoothing)
        return self.alpha * own + (1 - self.alpha) * F.cross_entropy(adv, y, label_smoothing=self.smoothing)
