"""Training a network behind a defence it is to live with, as k-winners-take-all and noise layers are meant to be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maodun.arena.shield_recipe import DefensePart
from maodun.arena.shields import behind, build_part
from maodun.arena.train_recipe import TrainRecipe
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.training import Objective
from maodun.defenses.training.objective import Batch, Learning, Replaying, takes_mixed


def defended(model: nn.Module, defense: DefensePart | None) -> nn.Module:
    """Return `model` behind a recipe's defence, sharing its weights; the model itself without one."""
    if defense is None:
        return model
    return behind((defense,), model, next(model.parameters()).device)


def refuse_defense(recipe: TrainRecipe) -> None:
    """Raise InputError for a defence that is not there or cannot go with the recipe's objective or settings."""
    if recipe.defense is None:
        return
    thing = f"defence '{recipe.defense.name}'"
    if build_part(recipe.defense).spec.may_reject:
        raise InputError(thing, "may refuse to answer, which no label calls right", "fit it to the finished network")
    if recipe.objective.kind == "distillation":
        raise InputError(thing, "distillation has two networks, and one of them no defence", "use another objective")
    if recipe.fit.compile is not None:
        raise InputError(thing, "reaches into the model, which a compiled one hides", "leave fit.compile out")


@dataclass(frozen=True)
class Keyed:
    """An objective whose model draws noise of its own, as a function of (seed, sample, step) alone."""

    objective: Objective
    seed: int

    @property
    def mixes(self) -> bool:
        """Whether the objective takes mixed pictures."""
        return takes_mixed(self.objective)

    def state(self) -> dict[str, Tensor]:
        """Return what the objective has learnt; nothing of one that learns nothing."""
        return self.objective.state() if isinstance(self.objective, Learning) else {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Give the objective back what it has learnt."""
        if isinstance(self.objective, Learning):
            self.objective.restore(state)

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the objective's loss of the batch."""
        with context.draw(Stream(self.seed, "train/defense"), batch.rows, torch.full_like(batch.rows, batch.step)):
            return self.objective(model, batch)


def keyed(objective: Objective, recipe: TrainRecipe, seed: int) -> Objective:
    """Return the objective with keyed draws for the recipe's defence; itself without one.

    InputError for an objective that replays its batches, which a wrapper would hide.
    """
    if recipe.defense is None:
        return objective
    if isinstance(objective, Replaying):
        name = type(objective).__name__
        raise InputError(f"defence '{recipe.defense.name}'", f"{name} trains behind none", "use kind adversarial")
    return Keyed(objective, seed)


def right(model: nn.Module, x: Tensor, y: Tensor, seed: int) -> Tensor:
    """Return (N,) booleans: `model` answers y, in a single draw by seed and row where it is random."""
    found, rows = [], torch.arange(x.shape[0], device=x.device)
    with torch.no_grad():
        for part, ids in zip(torch.split(x, 256), torch.split(rows, 256), strict=True):
            with context.draw(Stream(seed, "train/measure"), ids, torch.zeros_like(ids)):
                found.append(model(part).argmax(1))
    return torch.cat(found) == y


__all__ = ["Keyed", "defended", "keyed", "refuse_defense", "right"]
