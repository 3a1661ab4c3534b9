"""What the adversarial objectives share: craft first, then a loss of the clean and the adversarial logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from maodun.core.oracle import evaluation_mode
from maodun.defenses.training.objective import Batch, Crafter, bare


@dataclass(frozen=True)
class Adversarial:
    """A loss at inputs that `attack` crafts anew for every batch.

    `attack` is any callable from (model, batch) to inputs like `batch.x`. Crafting happens in evaluation mode, so batch
    norm neither mixes the samples of a batch nor learns from half-made inputs, and no parameter gets a gradient from
    it. A subclass says whether it `needs_clean` logits, whether it `mixes` (takes shares of labels in place of labels)
    and what it makes `of_logits`; clean and adversarial inputs pass through the model in train mode one after the
    other, as in the published codes.
    Evaluation-mode crafting: Pang et al., "Bag of tricks for adversarial training", ICLR 2021.
    """

    attack: Crafter

    needs_clean: ClassVar[bool] = True
    mixes: ClassVar[bool] = False

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch, a scalar with a graph to the model's parameters."""
        return self.loss(model, batch, self.craft(model, batch))

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the adversarial inputs of the batch, without a graph."""
        own = bare(model)
        with evaluation_mode(own):
            return self.attack(own, batch).detach()

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        """Return the mean loss given the adversarial inputs `x_adv`."""
        clean = model(batch.x) if self.needs_clean else None
        adv = model(x_adv)
        return self.of_logits(adv if clean is None else clean, adv, batch.target)

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss of clean and adversarial logits (N x C) and labels (N,), or N x C shares if it `mixes`.

        Where `needs_clean` is false the clean logits were never computed, and what stands in their place is not read.
        """
        raise NotImplementedError("an objective says what it makes of the logits")

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know beyond the weights; nothing, unless a subclass learns something."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`."""
