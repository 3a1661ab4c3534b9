"""What a training loop minimises, and the shape of what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One step's samples: `x` N x ... in [0, 1] (augmented), `y` int64 (N,), `rows` int64 (N,) their positions in the
    training set, `step` the number of the optimiser step.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    step: int


Crafter = Callable[[nn.Module, Batch], Tensor]
"""Makes the adversarial inputs of a batch for a model in evaluation mode; returns a tensor like `batch.x`."""


class Objective(Protocol):
    """The loss of one batch; calls the model in train mode as often as it needs."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss, a scalar with a graph to the model's parameters."""
        ...


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean inputs; `smoothing` in [0, 1) spreads that much of each label over all classes."""

    smoothing: float = 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return F.cross_entropy(model(batch.x), batch.y, label_smoothing=self.smoothing)
