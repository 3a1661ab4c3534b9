"""What every contender receives: one model, one batch, one threat, one set of published parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Attack = Callable[[], Tensor]
"""A prepared attack: calling it once attacks the batch of its job and returns the adversarial batch."""


@dataclass(frozen=True)
class Job:
    """One unit of work.

    `x` is [N, ...] in [0, 1], `y` is [N] (true labels), `norm` is "linf", "l2" or "l1", `eps` is in the units of
    the inputs, `classes` is the number of logits, `options` holds the attack's parameters (steps, queries, ...).
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    norm: str
    eps: float
    classes: int
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def p(self) -> float:
        """The norm as a number, as most peers want it."""
        return {"linf": float("inf"), "l2": 2.0, "l1": 1.0}[self.norm]

    @property
    def step_size(self) -> float:
        """Absolute step size: `rel_step` (default 2.5 / steps) times eps."""
        return float(self.eps * self.options.get("rel_step", 2.5 / self.options["steps"]))


def reset(model: nn.Module, seed: int) -> None:
    """Put the model and the global generators into the same state before every run.

    Parameters require gradients (as in a model straight from training), no gradient is stored, all modules are in
    evaluation mode. Peers draw from the global generator, so it is seeded here; ours does not use it.
    """
    import numpy as np

    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 -- ART draws from the legacy global generator
