"""Retrieval: the nearest images of a clean gallery by an embedding, judged by mean average precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from maodun.tasks import metrics
from maodun.tasks.base import Statistics, Task
from maodun.tasks.nets import ClassificationNet, Embedding, initialise


@dataclass(frozen=True)
class Retrieval(Task):
    """Mean average precision (and recall at 1) of attacked queries in a clean gallery; truth is (N,) int64 classes.

    The network answers with embeddings of length one; `gallery` M x d are those of the gallery images, `labels` (M,)
    their classes (`with_gallery` fills both in).
    """

    name: ClassVar[str] = "retrieval"
    metric: ClassVar[str] = "mAP"

    gallery: Tensor = field(default_factory=lambda: torch.zeros(0, 1), repr=False)
    labels: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64), repr=False)

    @staticmethod
    def with_gallery(model: nn.Module, x: Tensor, labels: Tensor) -> Retrieval:
        """Return the task with the images `x` embedded by `model`, in chunks of 256."""
        with torch.no_grad():
            return Retrieval(torch.cat([model(part) for part in torch.split(x, 256)]), labels)

    def build(self, seed: int = 0) -> nn.Module:
        """Return the representation of a small classifier as an embedding."""
        return Embedding(initialise(ClassificationNet(), seed))

    def target(self, model: nn.Module, x: Tensor, truth: Tensor) -> Tensor:  # noqa: ARG002 - the common shape
        """The embedding of the clean image."""
        with torch.no_grad():
            return torch.cat([model(part) for part in torch.split(x, 256)])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """One minus the cosine to the clean image's embedding."""
        return 1.0 - (output * target).sum(1)

    def judge(self, output: Tensor, clean: Tensor, truth: Tensor) -> Statistics:  # noqa: ARG002 - the common shape
        """Return each query's average precision and whether its nearest image is relevant."""
        ap, first = metrics.retrieval_ranks(output, truth, self.gallery, self.labels)
        return {"ap": ap, "recall_at_1": first}

    def score(self, statistics: Statistics, weights: Tensor | None = None) -> float:
        """Return the mean average precision."""
        return metrics.weighted_mean(statistics["ap"], weights)
