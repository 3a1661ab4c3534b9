"""What the multi-task experiment stands on: images with their truths, task networks, surrogate, unlabelled pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from maodun.arena.multitask_recipe import MultitaskRecipe
from maodun.attacks.multitask.fit import RelationFit, fit_relation
from maodun.attacks.multitask.module import PATCH, Kind, RelationModule, build_module
from maodun.attacks.multitask.views import ViewsFit, fit_views
from maodun.tasks import (
    Classification,
    Detection,
    FitSettings,
    Labelled,
    Reconstruction,
    Retrieval,
    Segmentation,
    Task,
    fit_task,
    load_camvid,
    load_cifar10,
    load_penn_fudan,
    load_weights,
    save_weights,
)
from maodun.tasks.nets import Embedding
from maodun.zoo.cards import checkout
from maodun.zoo.models import load_model

GROUPS = ("street", "people", "things")
TASK_GROUPS: dict[str, tuple[str, ...]] = {
    "segmentation": ("street",),
    "detection": ("people",),
    "classification": ("things",),
    "retrieval": ("things",),
    "reconstruction": GROUPS,
}
"""The tasks, and the groups of images whose truth they are judged by."""

# Rare classes would be given up otherwise: about the inverse root of their share of the pixels.
_BALANCE = (0.6, 0.5, 2.0, 0.4, 1.2, 0.75, 2.0, 2.0, 1.0, 2.5, 3.0)
_FITS = {
    "segmentation": FitSettings(epochs=20, batch_size=8, crop=(72, 104), rate=5e-3),
    "detection": FitSettings(epochs=44, batch_size=8, crop=(104, 128), rate=3e-3),
    "reconstruction": FitSettings(epochs=3, batch_size=32, rate=3e-3),
}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Player:
    """A task with the network that serves it; everything is in evaluation mode."""

    task: Task
    model: nn.Module


class Stage:
    """Images, networks and pool of a recipe, each made when first asked for; `say` is told what takes long."""

    def __init__(self, recipe: MultitaskRecipe, say: Say) -> None:
        self.recipe, self.say = recipe, say
        folder = Path(recipe.weights)
        home = checkout()
        self.folder = folder if folder.is_absolute() or home is None or folder.is_dir() else home / folder

    @cached_property
    def groups(self) -> dict[str, Labelled]:
        """The test images of every group with their own truth."""
        sizes = self.recipe.images
        return {
            "street": load_camvid("test", sizes.street),
            "people": load_penn_fudan("test", sizes.people),
            "things": load_cifar10("test", sizes.things),
        }

    @cached_property
    def pool(self) -> Tensor:
        """Unlabelled 32 x 32 patches in [0, 1]: CIFAR-10 training images and crops of both training sets, shuffled."""
        generator = torch.Generator().manual_seed(self.recipe.seed)
        parts = [load_cifar10("train", 6000).x]
        for data in (load_camvid("train"), load_penn_fudan("train")):
            for _ in range(6):
                top, left = (
                    int(torch.randint(0, size - PATCH + 1, (1,), generator=generator)) for size in data.x.shape[2:]
                )
                parts.append(data.x[:, :, top : top + PATCH, left : left + PATCH])
        patches = torch.cat(parts)
        return patches[torch.randperm(patches.shape[0], generator=generator)].float() / 255.0

    @cached_property
    def players(self) -> dict[str, Player]:
        """Every task with its network; missing weights are trained and written to the recipe's folder."""
        embed = Embedding(load_model(self.recipe.embedder).model).eval()
        gallery = self._gallery()
        found = {
            "segmentation": self._trained(Segmentation(balance=_BALANCE), lambda: load_camvid("train")),
            "detection": self._trained(Detection(), lambda: load_penn_fudan("train")),
            "classification": Player(Classification(), load_model(self.recipe.classifier).model),
            "retrieval": Player(Retrieval.with_gallery(embed, gallery.images(), gallery.truth), embed),
            "reconstruction": self._trained(Reconstruction(), self._unlabelled),
        }
        for player in found.values():
            player.model.requires_grad_(False)
        return found

    @cached_property
    def surrogate(self) -> nn.Module:
        """The classifier that the rival attacks search on: trained for one task on other images."""
        return load_model(self.recipe.surrogate).model

    def relation(self, kind: Kind) -> RelationModule:
        """Return the relation module or a control, trained on the pool where it is learned; weights are kept."""
        path = self.folder / f"relation-{kind}.safetensors"
        if path.is_file():
            module = RelationModule(kind)
            load_weights(module, path)
            return module.requires_grad_(False)
        self.say(f"relation module ({kind}) from {self.pool.shape[0]} unlabelled patches")
        module = build_module(kind, self.pool, seed=self.recipe.seed)
        if kind == "learned":
            fit_relation(module, self.pool, RelationFit(steps=self.recipe.relation_steps, batch_size=128))
        elif kind == "views":
            fit_views(module, self.pool, ViewsFit(steps=self.recipe.view_steps), seed=self.recipe.seed)
        save_weights(module, path)
        load_weights(module, path)
        return module.requires_grad_(False)

    def _trained(self, task: Task, data: Callable[[], Labelled]) -> Player:
        path = self.folder / f"{task.name}.safetensors"
        model = task.build(self.recipe.seed)
        if not path.is_file():
            self.say(f"training {task.name}")
            fit_task(task, model, data(), _FITS[task.name], seed=self.recipe.seed)
            save_weights(model, path)
        return Player(task, load_weights(model, path))

    def _unlabelled(self) -> Labelled:
        return Labelled("pool", (self.pool * 255.0).round().byte(), torch.zeros(self.pool.shape[0], dtype=torch.int64))

    def _gallery(self) -> Labelled:
        """The gallery: test images that are no queries, spread over the set."""
        everything, queries = load_cifar10("test"), self.recipe.images.things
        used = (torch.arange(queries, dtype=torch.float64) * len(everything) / queries).long()
        free = torch.ones(len(everything), dtype=torch.bool)
        free[used] = False
        return Labelled("gallery", everything.x[free], everything.truth[free]).take(self.recipe.images.gallery)
