"""How long, how fast and how precisely to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from maodun.core.errors import InputError

Schedule = Literal["one-cycle", "cosine", "piecewise"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed"]


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How to train: SGD with Nesterov momentum under a learning rate that follows a `schedule`.

    `rate` is the peak learning rate. All schedules rise linearly over the first `warmup` of the steps; then one-cycle
    falls linearly to zero, cosine along half a cosine, and piecewise is multiplied by `factor` at each of the
    `milestones` (epochs). `decay` is the weight decay (biases and norms included), `clip` the largest gradient norm
    (None for none), `precision` "32-true", "bf16-mixed" or "16-mixed", `average` the decay of the running mean of the
    weights that is validated and kept (0 keeps the weights themselves). `accumulate` splits each batch into so many
    parts whose gradients are added up: the same step with less memory (batch norm sees the parts). `guard` in [0, 1)
    undoes an epoch whose validation score falls below that share of the best one (one-step training can collapse so
    within an epoch): back to the best weights, at half the rate from then on; 0 never does.
    InputError for piecewise without milestones, or fewer than one part.
    """

    epochs: int = 30
    batch_size: int = 128
    rate: float = 0.1
    schedule: Schedule = "one-cycle"
    milestones: tuple[int, ...] = ()
    factor: float = 0.1
    momentum: float = 0.9
    decay: float = 5e-4
    warmup: float = 0.2
    clip: float | None = None
    average: float = 0.0
    precision: Precision = "32-true"
    channels_last: bool = False
    accumulate: int = 1
    guard: float = 0.0

    def __post_init__(self) -> None:
        if self.schedule == "piecewise" and not self.milestones:
            raise InputError("schedule 'piecewise'", "has no milestones", "name the epochs at which the rate falls")
        if self.accumulate < 1:
            raise InputError(f"accumulate {self.accumulate}", "must be at least 1", "give a positive number")

    def rate_at(self, done: float) -> float:
        """Return the learning rate after the share `done` in [0, 1) of all steps."""
        up = done / max(self.warmup, 1e-9) + 1e-3
        down = (1 - done) / max(1 - self.warmup, 1e-9)
        if self.schedule == "cosine":
            down = 0.5 * (1 - math.cos(math.pi * min(1.0, down)))
        elif self.schedule == "piecewise":
            # A hair above: the first step of epoch 100 of 110 is at 100 / 110 of the steps, up to rounding.
            down = self.factor ** sum(done * self.epochs + 1e-9 >= epoch for epoch in self.milestones)
        return self.rate * min(1.0, up, down)


def optimiser_of(model: nn.Module, settings: FitSettings) -> torch.optim.Optimizer:
    """Return the optimiser of a model's parameters."""
    return torch.optim.SGD(
        model.parameters(),
        lr=settings.rate,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
        weight_decay=settings.decay,
    )


def set_rate(optimiser: Any, rate: float) -> None:
    """Set the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate
