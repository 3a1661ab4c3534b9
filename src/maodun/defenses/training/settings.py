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
    """How to train: an `optimiser` under a learning rate that follows a `schedule`.

    `optimiser` is sgd (Nesterov momentum) or adamw (whose first moment decays by `momentum`). `rate` is the peak
    learning rate. All schedules rise linearly over the first `warmup` of the steps; then one-cycle falls linearly to
    zero, cosine along half a cosine, and piecewise is multiplied by `factor` at each of the `milestones` (epochs).
    `decay` is the weight decay (biases and norms included), `clip` the largest gradient norm (None for none),
    `precision` "32-true", "bf16-mixed" or "16-mixed", `average` the decay of the running mean of the weights that is
    validated and kept (0 keeps the weights themselves). `swa` in [0, 1) keeps the plain mean of the weights at the end
    of every epoch after that share of them instead (stochastic weight averaging, Izmailov et al., UAI 2018), batch
    norms taken anew on the clean training inputs; 0 for none. `compile` names a torch.compile backend ("inductor") for
    the model, inner attacks included. `accumulate` splits each batch into so many parts whose
    gradients are added up: the same step with less memory (batch norm sees the parts). `guard` in [0, 1) undoes an
    epoch whose validation score falls below that share of the best one (one-step training can collapse so within an
    epoch): back to the best weights, at half the rate from then on; 0 never does.
    `samples` makes an epoch of so many images, drawn anew each time, where a pass over all of them is too long between
    two checkpoints (None: all of them).
    InputError for piecewise without milestones, fewer than one part, or `average` with `swa`.
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
    swa: float = 0.0
    compile: str | None = None
    optimiser: Literal["sgd", "adamw"] = "sgd"
    samples: int | None = None

    def __post_init__(self) -> None:
        if self.swa and self.average:
            raise InputError("average and swa", "are two ways to average the weights", "keep one of them")
        if self.schedule == "piecewise" and not self.milestones:
            raise InputError("schedule 'piecewise'", "has no milestones", "name the epochs at which the rate falls")
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples {self.samples}", "an epoch has at least one", "give a positive number or none")
        if self.accumulate < 1:
            raise InputError(f"accumulate {self.accumulate}", "must be at least 1", "give a positive number")

    @property
    def first_averaged(self) -> int | None:
        """The epoch (from 0) whose weights are the first of the plain mean; None without swa."""
        return min(self.epochs - 1, round(self.swa * self.epochs)) if self.swa else None

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
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=settings.rate, betas=(settings.momentum, 0.999), weight_decay=settings.decay
        )
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
