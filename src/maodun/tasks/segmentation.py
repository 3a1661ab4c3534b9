"""Semantic segmentation: a class for every pixel, judged by mean intersection over union."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.tasks import metrics
from maodun.tasks.base import Statistics, Task
from maodun.tasks.nets import SegmentationNet, initialise


@dataclass(frozen=True)
class Segmentation(Task):
    """Mean IoU over `classes` classes; truth is N x H x W, where values outside 0..classes-1 do not count.

    `balance` (classes numbers) weighs the classes in the loss, which rare ones would lose otherwise; None: equally.
    """

    name: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "mIoU"

    classes: int = 11
    balance: tuple[float, ...] | None = None

    def build(self, seed: int = 0) -> nn.Module:
        """Return a U-Net of 0.06 M parameters."""
        return initialise(SegmentationNet(self.classes), seed)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy, the mean over the pixels that count."""
        valid = (target >= 0) & (target < self.classes)
        safe = torch.where(valid, target, torch.zeros_like(target))
        weight = None if self.balance is None else output.new_tensor(self.balance)
        value = F.cross_entropy(output, safe, weight=weight, reduction="none") * valid
        return value.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)

    def judge(self, output: Tensor, clean: Tensor, truth: Tensor) -> Statistics:  # noqa: ARG002 - the common shape
        """Return each image's confusion matrix."""
        return {"confusion": metrics.confusion(output.argmax(1), truth, self.classes)}

    def score(self, statistics: Statistics, weights: Tensor | None = None) -> float:
        """Return the mean IoU."""
        return metrics.mean_iou(statistics["confusion"], weights)
