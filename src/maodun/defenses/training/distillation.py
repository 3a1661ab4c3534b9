"""Defensive distillation (Papernot et al., 2016): it blinds gradients, and is here to be seen through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.oracle import evaluation_mode
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class Distillation:
    """Cross-entropy of softmax(logits / T), on hard labels (the teacher) or on a teacher's soft ones (the student).

    `temperature` T > 0; `soft` holds the teacher's probabilities at the same T for every training row, N x classes,
    or None for hard labels. Both nets are trained at T and deployed at T = 1, so the student's logits are about T
    times larger than usual, cross-entropy gradients underflow there, and a plain gradient attack goes blind while a
    margin loss does not. The loss is multiplied by T, or in training too its gradient would vanish as 1 / T.
    Source: Papernot et al., "Distillation as a defense", 2016; broken by Carlini and Wagner, 2017.
    """

    temperature: float
    soft: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise InputError(f"temperature {self.temperature}", "it divides the logits", "give a positive number")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return T times the mean cross-entropy at temperature T, in nats."""
        target = batch.y if self.soft is None else self.soft[batch.rows].to(batch.x.device)
        return self.temperature * F.cross_entropy(model(batch.x) / self.temperature, target)


def soft_labels(teacher: nn.Module, x: Tensor, temperature: float, batch_size: int = 512) -> Tensor:
    """Return the teacher's probabilities softmax(logits / temperature) for x (N x ...), N x classes, float32."""
    with evaluation_mode(teacher), torch.no_grad():
        parts = [F.softmax(teacher(chunk).float() / temperature, dim=1) for chunk in torch.split(x, batch_size)]
    return torch.cat(parts)
