"""The one loop of the feature attacks: signed steps along the gradient of an objective of one hidden layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from maodun.attacks.feature.layers import AUTO, Caught, catching, choose_layer
from maodun.core.engine import Attack, State
from maodun.core.ensemble import members_of
from maodun.core.errors import InputError
from maodun.core.geometry import norms, per_sample
from maodun.core.problem import Problem


@dataclass
class FeatureState(State):
    """`layers` are the paths searched on, one per member; `aims` what the objective compares with, one per member."""

    velocity: Tensor
    layers: tuple[str, ...]
    aims: list[Tensor]
    step: int


@dataclass(frozen=True, kw_only=True)
class FeatureAttack(Attack[FeatureState]):
    """Base of the attacks on hidden layers: a subclass gives the start, what to compare with, and the objective.

    `layer` is a module path of the surrogate or "auto": the convolution (linear layer in a transformer) at the share
    `depth` of all, in calling order. `steps` of `step_size` input units (None: 2.5 eps / steps) along the threat's
    steepest direction, with momentum `decay` on l1-normalised gradients (0: none). With an ensemble every member has
    its layer and the gradients, each l1-normalised, are added. Costs per step and member one forward and one backward.
    """

    can_target: ClassVar[bool] = False

    layer: str = AUTO
    depth: float = 0.5
    steps: int = 20
    step_size: float | None = None
    decay: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError(f"steps {self.steps}", "must be at least 1", "give a positive number")
        if not 0.0 <= self.depth <= 1.0:
            raise InputError(f"depth {self.depth}", "is not a share", "give a number from 0 (first) to 1 (last layer)")

    @property
    def total_steps(self) -> int:
        """As many as are asked for."""
        return self.steps

    def start(self, problem: Problem) -> Tensor:
        """Return the first iterate: the clean input."""
        return problem.x.clone()

    def aim(self, problem: Problem, model: nn.Module, layer: str) -> Tensor:  # noqa: ARG002 - a hook
        """Return what the objective compares each row with (N x ...): nothing, unless a subclass says so."""
        return problem.x.new_zeros(len(problem), 0)

    def objective(self, feature: Tensor, aim: Tensor) -> Tensor:
        """Return (B,) values of features B x ... to climb; `aim` are the rows that belong to them."""
        raise NotImplementedError("a feature attack has an objective")

    def init(self, problem: Problem) -> FeatureState:
        """Choose the layers and look at what the search compares with."""
        layers, aims = [], []
        for member, model in parts(problem):
            layers.append(choose_layer(member, model, self.layer, self.depth))
            aims.append(self.aim(member, model, layers[-1]))
        x = self.start(problem)
        done = torch.zeros(len(problem), dtype=torch.bool, device=x.device)
        return FeatureState(
            x=x, done=done, velocity=torch.zeros_like(x), layers=tuple(layers), aims=aims, step=0
        )  # fmt: skip

    def step(self, problem: Problem, state: FeatureState) -> FeatureState:
        """Climb once."""
        return self.move(problem, state, self.slope(problem, state))

    def slope(self, problem: Problem, state: FeatureState) -> Tensor:
        """Return the gradient of the objective, summed over the members with each l1-normalised."""
        total = torch.zeros_like(state.x)
        for (member, model), layer, aim in zip(parts(problem), state.layers, state.aims, strict=True):
            with catching(model, layer) as caught:
                heads = _Heads(self, caught, layer, aim)
                total += normalised(member.values_and_gradients(state.x, heads)[2][0])
        return total

    def move(self, problem: Problem, state: FeatureState, gradient: Tensor) -> FeatureState:
        """Return the state after a step along `gradient` and what momentum there is."""
        velocity = normalised(gradient) + self.decay * state.velocity
        eps = min(problem.threat.eps, 1e3)
        size = 2.5 * eps / self.steps if self.step_size is None else self.step_size
        x = problem.threat.project(state.x + size * problem.threat.steepest(velocity, state.x), problem.x)
        return replace(state, x=x, velocity=velocity, step=state.step + 1)


@dataclass(frozen=True)
class _Heads:
    """The objective as the estimator asks for it: the caught features of the micro-batch with its rows' aims."""

    attack: FeatureAttack
    caught: Caught
    layer: str
    aim: Tensor

    def __call__(self, logits: Tensor, index: Tensor) -> Tensor:
        """Return B x 1 values."""
        feature = self.caught.take(self.layer).float()
        if feature.shape[0] != logits.shape[0]:
            reason = f"its output has {feature.shape[0]} rows for {logits.shape[0]} inputs"
            raise InputError(f"layer '{self.layer}'", reason, "name another layer")
        return self.attack.objective(feature, self.aim[index]).unsqueeze(1)


def parts(problem: Problem) -> list[tuple[Problem, nn.Module]]:
    """Return every member of the surrogate with the problem that asks it alone."""
    return list(zip(problem.members(), members_of(problem.session.oracle.model), strict=True))


def normalised(gradient: Tensor) -> Tensor:
    """Return gradients of mean absolute value one per row; a row of zeros stays zero."""
    length = norms(gradient, "l1") / gradient[0].numel()
    return gradient / per_sample(torch.where(length > 0, length, torch.ones_like(length)), gradient)


__all__ = ["FeatureAttack", "FeatureState", "normalised", "parts"]
