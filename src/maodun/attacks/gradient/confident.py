"""How sure can it be of a wrong answer? The search that does not stop at the first one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from maodun.attacks.gradient.apgd import APGD, likely_targets
from maodun.core.engine import Candidates
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.problem import Problem
from maodun.core.threat import Threat


@dataclass(frozen=True, kw_only=True)
class MaximalConfidence(APGD):
    """Auto-PGD on a wrong class's log-probability, all the way: adversarial sets to measure confidence on.

    Inputs N x ..., values in [0, 1]. Other searches end at the first wrong answer and hand back the clean input where
    there is none, so confidences on what they return say little. This one gives every sample, the wrong ones included,
    all its `steps` and hands over the point of the highest loss, whether it fools or not (objective: Stutz et al., ICML
    2020; search: Croce and Hein, ICML 2020). With `loss` confidence it climbs towards each of the `targets` likeliest
    wrong classes by the clean logits, side by side; other losses climb once: ce gives the usual PGD set, every sample
    at the end of its way. Costs steps + 1 forwards and backwards per sample, target and restart.
    Its robust accuracy is no measure of robustness: a point that fooled may be left for one that is surer of less.
    """

    name: ClassVar[str] = "maxconf"

    loss: str = "confidence"
    targets: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets < 1:
            raise InputError(f"targets {self.targets}", "must be at least 1", "give a positive number")

    @property
    def runs(self) -> int:
        """All runs go side by side."""
        return 1

    def aims(self, problem: Problem) -> Tensor | None:
        """Return the likeliest wrong classes of every sample, N x min(targets, classes - 1)."""
        if problem.targets is not None:
            return problem.targets.unsqueeze(1)
        return likely_targets(problem.clean(), problem.y, self.targets) if self.loss == "confidence" else None

    def lanes(self, problem: Problem, left: int) -> int:  # noqa: ARG002 - a hook
        """All at once: the answer is the best point of the runs that stand side by side."""
        return left

    def run(self, oracle: Oracle, x: Tensor, y: Tensor, threat: Threat, **options: Any) -> Candidates:
        """Search as `Attack.run` does, with no early stop and no success to rest on."""
        return super().run(dataclasses.replace(oracle, surrogate=True), x, y, threat, **options)
