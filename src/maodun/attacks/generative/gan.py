"""The class-conditional GAN behind gan-sampling: it learns what images of a class look like and meets no victim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.attacks.generative import losses as terms
from maodun.attacks.generative.attack import GanSampling
from maodun.attacks.generative.contest import Batch, Losses
from maodun.attacks.generative.networks import Critic, Sampler, check_shape, initialise
from maodun.attacks.generative.proxies import Proxies
from maodun.core.errors import InputError


class SamplingGame:
    """The contest for images of `shape` of `classes` classes: least squares or hinge, critic conditioned on the class.

    `proxies`, where given, are reference models (never the victim) whose cross-entropy, times `fidelity`, tells the
    sampler to draw the class it was asked for.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        classes: int,
        *,
        noise: int = 64,
        width: int = 16,
        game: terms.Game = "lsgan",
        proxies: Proxies | None = None,
        fidelity: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_shape(shape, "attack 'gan-sampling'")
        if classes < 2 or noise < 1 or fidelity < 0:
            raise InputError("gan-sampling", "needs classes >= 2, noise >= 1, fidelity >= 0", "correct the options")
        if proxies is not None and proxies.classes < classes:
            raise InputError("proxies", f"know {proxies.classes} classes of {classes}", "use models for this data")
        self.shape, self.classes, self.noise, self.width = shape, classes, noise, width
        self.game, self.proxies, self.fidelity = game, proxies, fidelity
        with torch.random.fork_rng(devices=[]):
            self.generator = Sampler(shape, classes, noise, width)
            self.critic = Critic(shape[0], 2 * width, classes)
        initialise(self.generator, 2 * seed)
        initialise(self.critic, 2 * seed + 1)

    def play(self, batch: Batch) -> Tensor:
        """Return one image per label of the batch."""
        made: Tensor = self.generator(batch.normal(batch.y.shape[0], self.noise), batch.y)
        return made

    def critic_loss(self, batch: Batch, made: Tensor) -> Tensor:
        """Return the critic's loss on real and made images of the same classes."""
        return terms.critic_loss(self.game, self.critic(batch.x, batch.y), [self.critic(made.detach(), batch.y)])

    def losses(self, batch: Batch, made: Tensor) -> Losses:
        """Return realism and, with proxies, fidelity, and their weighted sum."""
        parts = {"realism": terms.realism_loss(self.game, [self.critic(made, batch.y)])}
        loss = parts["realism"]
        if self.proxies is not None:
            answers = self.proxies.logits(made)
            parts["fidelity"] = torch.stack([F.cross_entropy(each, batch.y) for each in answers]).mean()
            loss = loss + self.fidelity * parts["fidelity"]
        parts["loss"] = loss
        return parts

    def attack(self, about: Mapping[str, Any] | None = None) -> GanSampling:
        """Return the sampler as it is now, as an attack."""
        return GanSampling(
            shape=self.shape,
            classes=self.classes,
            noise=self.noise,
            width=self.width,
            tensors={name: value.clone() for name, value in self.generator.state_dict().items()},
            about=about or {},
        )
