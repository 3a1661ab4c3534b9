"""What a defence in front of a classifier is, and what it owes to whoever attacks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from maodun.core.errors import InputError


@dataclass(frozen=True)
class DefenseSpec:
    """What a defence declares about itself, so that an evaluation can adapt to it.

    `stochastic`: two calls may differ (attack with EOT, judge with fresh draws). `differentiable`: its own derivative
    exists almost everywhere and is not constantly zero (if not, attack with BPDA). `inner_loop`: it iterates or
    optimises. `nfe`: network evaluations per input besides the classifier's. `votes`: classifications per answer.
    `may_reject`: it may refuse to answer.
    """

    stochastic: bool = False
    differentiable: bool = True
    inner_loop: bool = False
    nfe: int = 0
    votes: int = 1
    may_reject: bool = False


class Defense(nn.Module):
    """A map from inputs to inputs, N x ... in [0, 1] to the same shape and range, whatever the batch.

    Subclasses set `name` and `spec` and implement `forward`; an instance may refine `spec`, when its options decide
    what it costs. `bpda_partner` is the smooth stand-in whose derivative the BPDA estimator uses in the backward pass;
    without one of its own a defence offers the identity. A defence that changes the classifier, or answers in its
    place, overrides `wrap`; `innermost` says that it only does so right around the classifier. `noise_of` names another
    defence whose noise it draws.
    """

    name: ClassVar[str] = "defense"
    spec: DefenseSpec = DefenseSpec()
    stochastic: ClassVar[bool] = False
    broken: ClassVar[bool] = False
    innermost: ClassVar[bool] = False
    noise_of: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        """Publish `stochastic` and `broken` (no derivative of its own) where Oracle, verdict and BPDA look for them."""
        super().__init_subclass__()
        cls.stochastic = cls.spec.stochastic
        cls.broken = not cls.spec.differentiable

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the classifier `model` (N x ... in [0, 1] to N x C logits) behind this defence."""
        return Defended(self, model)

    def attach(self, model: nn.Module) -> None:
        """Take note of the classifier behind this defence, for those that look at it; by default nothing."""

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the stand-in's output for `x`; close to `forward(x)`, and differentiable."""
        return x

    def answer(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the logits of `model` behind this defence; a defence that votes asks `model` more than once."""
        logits: Tensor = model(self(x))
        return logits

    def need_images(self, x: Tensor) -> None:
        """Raise InputError unless `x` is N x C x H x W."""
        if x.ndim != 4:
            raise InputError(
                f"defence '{self.name}'",
                f"it works on images N x C x H x W, not on shape {tuple(x.shape)}",
                "use bit_depth or none for inputs that are not images",
            )


class NoDefense(Defense):
    """The identity: what a table compares every other row with."""

    name = "none"

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


class Defended(nn.Module):
    """A classifier behind a defence: N x ... in [0, 1] to logits, as one module."""

    defense: Defense
    model: nn.Module

    def __init__(self, defense: Defense, model: nn.Module) -> None:
        super().__init__()
        self.defense = defense
        self.model = model
        defense.attach(model)

    def forward(self, x: Tensor) -> Tensor:
        """Return the classifier's logits of the defended inputs."""
        return self.defense.answer(self.model, x)
