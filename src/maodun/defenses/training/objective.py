"""What a training loop minimises, and the shape of what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One step's samples: `x` N x ... in [0, 1] (augmented), `y` int64 (N,), `rows` int64 (N,) their positions in the
    training set, `step` the number of the optimiser step. `mixed` (N x K) are the label shares of mixed pictures, each
    row summing to one; `y` is then the label of the largest share, which the inner attack climbs away from.
    """

    x: Tensor
    y: Tensor
    rows: Tensor
    step: int
    mixed: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """What a loss that takes shares of labels should aim at: `mixed` where there is one, else `y`."""
        return self.y if self.mixed is None else self.mixed


Crafter = Callable[[nn.Module, Batch], Tensor]
"""Makes the adversarial inputs of a batch for a model in evaluation mode; returns a tensor like `batch.x`."""


class Objective(Protocol):
    """The loss of one batch; calls the model in train mode as often as it needs."""

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss, a scalar with a graph to the model's parameters."""
        ...


@runtime_checkable
class Learning(Protocol):
    """An objective that learns something besides the weights, which a resumed run must know."""

    def state(self) -> dict[str, Tensor]:
        """Return what was learnt, by name."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`."""


@runtime_checkable
class Replaying(Protocol):
    """An objective that sees each batch `replays` times in a row and looks at what the backward pass left."""

    replays: int

    def after_backward(self, batch: Batch) -> None:
        """Look at gradients once they are there."""


@dataclass(frozen=True)
class Standard:
    """Cross-entropy on clean inputs; `smoothing` in [0, 1) spreads that much of each label over all classes."""

    smoothing: float = 0.0

    mixes: ClassVar[bool] = True

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the batch."""
        return F.cross_entropy(model(batch.x), batch.target, label_smoothing=self.smoothing)


def takes_mixed(objective: Objective) -> bool:
    """Tell whether the objective knows what to do with a batch whose pictures, and labels, are mixed."""
    return bool(getattr(objective, "mixes", False))


def bare(model: nn.Module) -> nn.Module:
    """Return the user's module behind what a training loop may have wrapped it in.

    An inner attack calls this one: a wrapper that collects weight gradients over processes waits for some after every
    pass, and crafting makes none.
    """
    try:
        from lightning_fabric import is_wrapped
    except ImportError:
        return model
    if not is_wrapped(model):
        return model
    inside = model.module
    return inside if isinstance(inside, nn.Module) else model
