"""Any attack as the inner maximiser of adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.engine import Attack
from maodun.core.oracle import Oracle
from maodun.core.problem import Ledger, Problem
from maodun.core.threat import Threat
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class Inner:
    """An attack's last iterate on every sample of a batch, whether it fools the model or not.

    A search for an evaluation stops a sample once it is fooled and returns the clean input where nothing was found;
    training needs the highest loss instead, so the steps are driven here to the end and the last point is returned.
    `attack` is a fixed-radius attack, `threat` the ball. Random starts follow from `seed`, the batch's step and
    the rows of its samples.
    """

    attack: Attack[Any]
    threat: Threat
    seed: int = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return adversarial inputs like `batch.x`, inside the ball and [0, 1]; flags and gradients stay untouched."""
        x = batch.x.detach()
        self.attack.check(x, self.threat)
        oracle = Oracle(model, batch_size=x.shape[0], stochastic=False)
        with oracle.ready():
            session = oracle.session(x, batch.rows, (self.seed << 32) + batch.step)
            ledger = Ledger(session, x, self.threat, minimum=False, enough=None, stop=False)
            rows = torch.arange(x.shape[0], device=x.device)
            problem = Problem(x, batch.y, None, batch.rows, rows, self.threat, session, ledger)
            state = self.attack.init(problem)
            for _ in range(self.attack.total_steps):
                state = self.attack.step(problem, state)
        return self.threat.project(state.x, x)
