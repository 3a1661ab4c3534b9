"""Any attack as the inner maximiser of adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.engine import Attack
from maodun.core.errors import InputError
from maodun.core.losses import DEPARTURES
from maodun.core.oracle import Oracle
from maodun.core.problem import Ledger, Problem
from maodun.core.threat import Threat
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class Inner:
    """Where an attack ends on every sample of a batch, whether it fools the model or not.

    A search for an evaluation stops a sample once it is fooled and returns the clean input where nothing was found;
    training needs the highest loss instead, so the steps are driven here to the end.
    `attack` is a fixed-radius attack, `threat` the ball, whose radius grows linearly to its full size over the first
    `ramp` optimiser steps (0: full from the start; a small network met by a large ball at once may learn to answer the
    same for everything). Random starts follow from `seed`, the batch's step and the rows of its samples.
    InputError for a search of the least distance, and for a sequence of attacks (AutoAttack, sharp): training needs the
    highest loss at one radius.
    """

    attack: Attack[Any]
    threat: Threat
    seed: int = 0
    ramp: int = 0

    def __post_init__(self) -> None:
        several = type(self.attack).step is Attack.step
        if several or self.attack.kind != "fixed":
            reason = "tries attacks until one succeeds" if several else "looks for the least distance"
            reason += ", and training needs the highest loss at one radius"
            raise InputError(f"inner attack '{self.attack.name}'", reason, "use pgd, apgd or another attack in a ball")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return adversarial inputs like `batch.x`, inside the ball and [0, 1]; flags and gradients stay untouched."""
        x = batch.x.detach()
        threat = self.threat
        if batch.step < self.ramp:
            threat = threat.with_eps(threat.eps * (batch.step + 1) / self.ramp)
        self.attack.check(x, threat)
        oracle = Oracle(model, batch_size=x.shape[0], stochastic=False)
        with oracle.ready():
            session = oracle.session(x, batch.rows, (self.seed << 32) + batch.step)
            ledger = Ledger(session, x, threat, minimum=False, enough=None, stop=False)
            rows = torch.arange(x.shape[0], device=x.device)
            # A search for the largest departure from the clean answer asks for that answer once.
            departs = getattr(self.attack, "loss", None) in DEPARTURES
            clean = session.logits(x, rows) if departs else None
            # Quiet: what fools the model on the way is of no use here.
            problem = Problem(x, batch.y, None, batch.rows, rows, threat, session, ledger, clean, quiet=True)
            state = self.attack.init(problem)
            for _ in range(self.attack.total_steps):
                state = self.attack.step(problem, state)
        return threat.project(self.attack.answer(state), x)
