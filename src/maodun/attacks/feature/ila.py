"""Intermediate level attack: a found direction, made longer in a hidden layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.feature.base import FeatureAttack, FeatureState, parts
from maodun.attacks.feature.layers import features
from maodun.core.errors import InputError
from maodun.core.losses import get_loss
from maodun.core.problem import Problem


@dataclass(frozen=True, kw_only=True)
class ILA(FeatureAttack):
    """Intermediate level attack with projection (Huang et al., ICCV 2019).

    `first_steps` of MI-FGSM (momentum `first_decay`, steps of eps / first_steps) on the `loss` of the labels give a
    guide; then `steps` from the clean input climb the inner product of a layer's change with the change the guide
    makes there.
    """

    name: ClassVar[str] = "ila"

    loss: str = "ce"
    steps: int = 10
    first_steps: int = 10
    first_decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        get_loss(self.loss)
        if self.first_steps < 1:
            raise InputError(f"first_steps {self.first_steps}", "must be at least 1", "give a positive number")

    @property
    def total_steps(self) -> int:
        """The guide's steps and the search's."""
        return self.first_steps + self.steps

    def step(self, problem: Problem, state: FeatureState) -> FeatureState:
        """Make the guide first, then climb along it."""
        if state.step < self.first_steps:
            _, _, gradient = problem.gradient(state.x, self.loss)
            first = replace(self, steps=self.first_steps, decay=self.first_decay, step_size=self._first_size(problem))
            state = first.move(problem, state, gradient)
            return self._turn(problem, state) if state.step == self.first_steps else state
        return super().step(problem, state)

    def objective(self, feature: Tensor, aim: Tensor) -> Tensor:
        """Return the projection of the change on the guide's; `aim` holds clean features and the guide's change."""
        clean, guide = aim.unbind(1)
        return ((feature - clean) * guide).flatten(1).sum(1)

    def _first_size(self, problem: Problem) -> float:
        return min(problem.threat.eps, 1e3) / self.first_steps

    def _turn(self, problem: Problem, state: FeatureState) -> FeatureState:
        """Return the state at the clean input, with the direction that the guide has found in every layer."""
        aims = []
        for (member, model), layer in zip(parts(problem), state.layers, strict=True):
            clean = features(member, model, layer, problem.x)
            aims.append(torch.stack([clean, features(member, model, layer, state.x) - clean], 1))
        return replace(state, x=problem.x.clone(), velocity=torch.zeros_like(state.x), aims=aims)
