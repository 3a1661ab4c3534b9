"""Classification: one class for an image, judged by accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from maodun.tasks import metrics
from maodun.tasks.base import Statistics, Task
from maodun.tasks.nets import ClassificationNet, initialise


@dataclass(frozen=True)
class Classification(Task):
    """Top-1 accuracy; truth is (N,) int64 classes, the network's answer N x `classes` logits."""

    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "accuracy"

    classes: int = 10

    def build(self, seed: int = 0) -> nn.Module:
        """Return a residual network."""
        return initialise(ClassificationNet(self.classes), seed)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output, target, reduction="none")

    def judge(self, output: Tensor, clean: Tensor, truth: Tensor) -> Statistics:  # noqa: ARG002 - the common shape
        """Return whether each image got its class."""
        return {"right": (output.argmax(1) == truth).float()}

    def score(self, statistics: Statistics, weights: Tensor | None = None) -> float:
        """Return the accuracy."""
        return metrics.weighted_mean(statistics["right"], weights)
