"""Adversarial training: minimise the loss at the inputs an attack finds (Madry et al., 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.oracle import evaluation_mode
from maodun.defenses.training.objective import Batch, Crafter


@dataclass(frozen=True)
class AdversarialTraining:
    """Cross-entropy on adversarial inputs only, crafted anew for every batch.

    `attack` is the inner attack, any callable from (model, batch) to inputs like `batch.x`; `smoothing` is label
    smoothing in [0, 1). Crafting happens in evaluation mode, so batch norm neither mixes the samples of a batch nor
    learns from half-made inputs; the training pass then sees one batch of adversarial inputs.
    Source: Madry et al., "Towards deep learning models resistant to adversarial attacks", 2018; evaluation-mode
    crafting: Pang et al., "Bag of tricks for adversarial training", 2021.
    """

    attack: Crafter
    smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy at the adversarial inputs."""
        with evaluation_mode(model):
            x_adv = self.attack(model, batch).detach()
        return F.cross_entropy(model(x_adv), batch.y, label_smoothing=self.smoothing)
