"""NES and SPSA: projected ascent along gradients that are estimated from scores.

Ilyas, Engstrom, Athalye and Lin, "Black-box adversarial attacks with limited queries and information", ICML 2018 (NES);
Uesato, O'Donoghue, van den Oord and Kohli, "Adversarial risk and the dangers of evaluating against weak attacks", ICML
2018 (SPSA, there with Adam; here, as in NES, with momentum, for both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from maodun.attacks.gradient.pgd import PGD, PGDState
from maodun.core import estimators
from maodun.core.errors import InputError
from maodun.core.estimators import Estimator
from maodun.core.oracle import BudgetExceededError
from maodun.core.problem import Problem


@dataclass(frozen=True, kw_only=True)
class NES(PGD):
    """PGD with momentum along antithetic Gaussian differences of scores (Ilyas et al., ICML 2018).

    Inputs N x ..., values in [0, 1]. `samples` queries per estimate, in pairs; `sigma` their distance in input units;
    `momentum` the share of the old direction that is kept. `loss`, `steps`, `step_size` (None: as PGD),
    `restarts` and `random_start` as in PGD. Costs steps * (1 + samples) + 1 queries per restart, less what stops early;
    no backwards. A sample whose budget cannot pay for another estimate has its last point looked at, and leaves.
    """

    name: ClassVar[str] = "nes"
    access: ClassVar[str] = "scores"

    loss: str = "margin"
    samples: int = 50
    sigma: float = 0.001
    momentum: float = 0.9
    random_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 2:
            raise InputError(f"samples {self.samples}", "must be at least 2, a pair", "give an even number of queries")
        if not 0.0 < self.sigma < 1.0:
            raise InputError(f"sigma {self.sigma}", "is a distance in input units", "give a number in (0, 1)")
        if not 0.0 <= self.momentum < 1.0:
            raise InputError(f"momentum {self.momentum}", "is the share kept", "give a number in [0, 1)")

    @property
    def estimator(self) -> Estimator:
        """Antithetic Gaussian differences."""
        return estimators.NES(self.samples, self.sigma)

    def step(self, problem: Problem, state: PGDState) -> PGDState:
        """Estimate and climb once; who cannot pay for it leaves before anything is asked."""
        able, single = problem.affords(1 + 2 * (self.samples // 2)), problem.affords(1)
        if able is not None and single is not None and not bool(able.all()):
            last = (single & ~able).nonzero().squeeze(1)
            if last.numel():
                problem.select(last).logits(state.x[last])
            raise BudgetExceededError(problem.rows[~able])
        return super().step(problem, state)

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the estimated gradient."""
        return problem.gradient(state.x, self.loss, estimator=self.estimator)[2], state

    def direction(self, problem: Problem, state: PGDState, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the steepest step along the running mean of the estimates."""
        velocity = gradient if state.velocity is None else self.momentum * state.velocity + gradient
        return problem.threat.steepest(velocity, state.x), velocity


@dataclass(frozen=True, kw_only=True)
class SPSA(NES):
    """PGD with momentum along antithetic Rademacher differences of scores (Uesato et al., ICML 2018).

    As NES, with random signs in place of Gaussian directions; 128 samples per estimate, 40 steps.
    """

    name: ClassVar[str] = "spsa"

    samples: int = 128
    sigma: float = 0.01

    @property
    def estimator(self) -> Estimator:
        """Antithetic Rademacher differences."""
        return estimators.SPSA(self.samples, self.sigma)
