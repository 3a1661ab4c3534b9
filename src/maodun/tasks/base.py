"""What every task answers: how it is trained, how one image is judged, and what number the judgements make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

Statistics = Mapping[str, Tensor]
"""Per-image judgements, name -> N x ...; a metric is a function of them and of weights over the images."""

_CHUNK = 64


class Task:
    """A purpose a network serves.

    `name`, `metric` (what `score` returns; higher is better for its owner). Images N x 3 x H x W in [0, 1].
    """

    name: ClassVar[str] = "task"
    metric: ClassVar[str] = "score"

    def build(self, seed: int = 0) -> nn.Module:
        """Return a freshly initialised small network for this task, in train mode."""
        raise NotImplementedError("a task builds its network")

    def target(self, model: nn.Module, x: Tensor, truth: Tensor) -> Tensor:  # noqa: ARG002 - for those that need it
        """Return what the loss compares the answers about clean images `x` with: the truth, unless said otherwise."""
        return truth

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Return the (N,) losses of a network's answers: small when it serves the task well."""
        raise NotImplementedError("a task has a loss")

    def judge(self, output: Tensor, clean: Tensor, truth: Tensor) -> Statistics:
        """Return the per-image statistics of answers; `clean` are the unattacked images, `truth` their ground truth."""
        raise NotImplementedError("a task judges answers")

    def score(self, statistics: Statistics, weights: Tensor | None = None) -> float:
        """Return the metric; `weights` (N,) say how often each image counts."""
        raise NotImplementedError("a task has a metric")

    def evaluate(self, model: nn.Module, x: Tensor, clean: Tensor, truth: Tensor) -> Statistics:
        """Judge a network in evaluation mode on images `x`, made from `clean`, in chunks of 64."""
        parts = []
        with torch.no_grad():
            for images, originals, facts in zip(
                *(torch.split(each, _CHUNK) for each in (x, clean, truth)), strict=True
            ):
                parts.append(self.judge(model(images), originals, facts))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
