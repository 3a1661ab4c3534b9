"""What a generator and its critic play over one batch: who is trained, on which noise, for which loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from maodun.attacks.artifacts import TrainedAttack


@dataclass(frozen=True)
class Batch:
    """One step's images `x` (N x C x H x W in [0, 1]) with labels `y` (N,), and the generator its noise comes from."""

    x: Tensor
    y: Tensor
    random: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        """Return standard normal noise of a shape, on the images' device."""
        return torch.randn(shape, generator=self.random).to(self.x)


Losses = Mapping[str, Tensor]


class Contest(Protocol):
    """A game for `fit`: `play` makes what both sides are judged on; its two losses are minimised in turn.

    `generator` and `critic` are the networks trained; `losses` returns the generator's terms, detached numbers for the
    log included under names that begin with "log ", and the sum to be minimised under "loss".
    """

    @property
    def generator(self) -> nn.Module:
        """The network that is kept."""
        ...

    @property
    def critic(self) -> nn.Module:
        """The network, or networks, that are only needed in training."""
        ...

    def play(self, batch: Batch) -> Any:
        """Make this batch's images, with gradients to the generator."""
        ...

    def critic_loss(self, batch: Batch, made: Any) -> Tensor:
        """Return the critic's loss; nothing flows back into the generator."""
        ...

    def losses(self, batch: Batch, made: Any) -> Losses:
        """Return the generator's terms and their weighted sum "loss"."""
        ...

    def attack(self, about: Mapping[str, Any] | None = None) -> TrainedAttack:
        """Return the attack that the generator is now."""
        ...
