"""Adversarial weight perturbation: minimise the loss at the worst weights nearby."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from maodun.core.errors import InputError
from maodun.defenses.training.objective import Batch, bare


class TwoStep(Protocol):
    """An objective that crafts first and then has a loss: what AWP can wrap."""

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the adversarial inputs of the batch."""

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        """Return the mean loss given the adversarial inputs."""

    def state(self) -> dict[str, Tensor]:
        """Return what the objective has learnt."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`."""


@dataclass(frozen=True)
class AWP:
    """Any adversarial objective, taken at weights moved one ascent step: min over w of L(w + v), |v_l| = gamma |w_l|.

    The step is one gradient of the same loss at the same adversarial inputs; in every weight matrix or kernel (more
    than one axis) it is scaled to `gamma` times the norm of the weights themselves; biases and norm layers stay.
    `gamma` is 0.01 for PGD-AT and 0.005 for TRADES in the paper; nothing is moved in the first `warmup` optimiser
    steps. The moved weights are made for the pass (no weight is written to), so weight decay acts on the true ones;
    running statistics of batch norm see the moved pass only. Costs one forward and backward more than its base.
    Source: Wu, Xia and Wang, "Adversarial weight perturbation helps robust generalization", NeurIPS 2020.
    """

    base: TwoStep
    gamma: float = 0.005
    warmup: int = 0

    reaches_inside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise InputError(f"gamma {self.gamma}", "is a share of the weights' norm", "give a number >= 0")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss at the moved weights, with a graph to the true ones."""
        return self.loss(model, batch, self.craft(model, batch))

    @property
    def mixes(self) -> bool:
        """Whether the base takes shares of labels."""
        return bool(getattr(self.base, "mixes", False))

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the base's adversarial inputs, crafted at the true weights."""
        return self.base.craft(model, batch)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        """Return the base's loss at the moved weights."""
        if self.gamma == 0 or batch.step < self.warmup:
            return self.base.loss(model, batch, x_adv)
        own = bare(model)
        place = next(path for path, module in model.named_modules() if module is own)
        moved = {f"{place}.{name}".lstrip("."): value for name, value in self.moved(own, batch, x_adv).items()}
        return self.base.loss(_At(model, moved), batch, x_adv)

    def moved(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> dict[str, Tensor]:
        """Return the moved weights under all their names, with a graph to the true ones."""
        named = list(model.named_parameters(remove_duplicate=False))
        places = {name: p for name, p in named if p.requires_grad and p.ndim > 1}
        weights = list(dict.fromkeys(places.values()))
        # The probe must not teach batch norm or the objective anything.
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        kept = {name: value.clone() for name, value in self.base.state().items()}
        value = self.base.loss(_At(model, buffers), batch, x_adv)
        self.base.restore(kept)
        gradients = torch.autograd.grad(value, weights, allow_unused=True)
        moved = {}
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                size = self.gamma * weight.detach().norm() / (gradient.norm() + 1e-20)
                moved[weight] = weight + size * gradient
        return {name: moved[weight] for name, weight in places.items() if weight in moved}

    def state(self) -> dict[str, Tensor]:
        """Return the base's state."""
        return self.base.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`."""
        self.base.restore(state)


class _At(nn.Module):
    """A model with some parameters or buffers replaced for the length of each call."""

    def __init__(self, model: nn.Module, replaced: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.replaced = model, replaced

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = functional_call(self.model, self.replaced, (x,), tie_weights=False)
        return result
