"""Attacks that only ask a layer to change: how spread its values are, or how far they move. No label is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from maodun.attacks.feature.base import FeatureAttack
from maodun.attacks.feature.layers import features
from maodun.core.errors import InputError
from maodun.core.problem import Problem


@dataclass(frozen=True, kw_only=True)
class DR(FeatureAttack):
    """Dispersion reduction: make the standard deviation of a layer's output small (Lu et al., CVPR 2020).

    The standard deviation is that of all values of one sample's feature map. Labels are not used.
    """

    name: ClassVar[str] = "dr"

    def objective(self, feature: Tensor, aim: Tensor) -> Tensor:  # noqa: ARG002 - nothing to compare with
        """Return minus the standard deviation."""
        flat = feature.flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        # The root of a sum of exactly zero has no derivative.
        return -(centred.square().mean(1) + 1e-12).sqrt()


@dataclass(frozen=True, kw_only=True)
class NRDM(FeatureAttack):
    """Neural representation distortion: push a layer's output away from that of the clean input (Naseer et al., 2018).

    Climbs the mean square distance. At the clean input that has no slope, so the start is uniform in `start_share` of
    the ball. Labels are not used.
    """

    name: ClassVar[str] = "nrdm"

    start_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.start_share <= 1.0:
            reason = "there is no slope at the clean input, and none outside the ball"
            raise InputError(f"start_share {self.start_share}", reason, "give a number above 0 and up to 1")

    def start(self, problem: Problem) -> Tensor:
        """Draw a start close to the clean input."""
        far = problem.threat.random_start(problem.x, problem.stream(f"{self.name}/start"), problem.ids)
        return problem.threat.project(problem.x + self.start_share * (far - problem.x), problem.x)

    def aim(self, problem: Problem, model: nn.Module, layer: str) -> Tensor:
        """The clean input's features: one more forward."""
        return features(problem, model, layer, problem.x)

    def objective(self, feature: Tensor, aim: Tensor) -> Tensor:
        """Return the mean square distance."""
        return (feature - aim).square().flatten(1).mean(1)


@dataclass(frozen=True, kw_only=True)
class SSP(NRDM):
    """Self-supervised perturbation: NRDM from a noisy start, more steps (Naseer et al., CVPR 2020).

    The start adds Gaussian noise of standard deviation `noise` (input units, projected to the ball), which is what the
    published training of the NRP purifier does. Labels are not used.
    """

    name: ClassVar[str] = "ssp"

    steps: int = 100
    noise: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise <= 0:
            raise InputError(f"noise {self.noise}", "there is no slope at the clean input", "give a positive number")

    def start(self, problem: Problem) -> Tensor:
        """Draw a noisy start."""
        draw = problem.stream(f"{self.name}/start").normal(problem.ids, tuple(problem.x.shape[1:])).to(problem.x)
        return problem.threat.project(problem.x + self.noise * draw, problem.x)
