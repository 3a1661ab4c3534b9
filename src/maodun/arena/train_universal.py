"""Training a universal perturbation or a patch from a recipe: the zoo gives model and images, a file comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from maodun.arena.recipe import Radius
from maodun.arena.train_recipe import TrainData, read_recipe
from maodun.arena.workplace import refuse_one_split, two_sides, usable_folder
from maodun.attacks.artifacts import TrainedAttack, load_attack, save_artifact
from maodun.attacks.universal.patch import train_patch
from maodun.attacks.universal.placement import Placement
from maodun.attacks.universal.training import UniversalFit
from maodun.attacks.universal.uap import DeepFoolFit, train_uap, train_uap_deepfool
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.core.verdict import interval
from maodun.zoo import load_model
from maodun.zoo.cards import Measured
from maodun.zoo.data import Dataset, load_data

if TYPE_CHECKING:
    from maodun.arena.train_generator import GeneratorResult

ATTACKS = ("uap", "patch")
Told = Callable[[dict[str, float | str]], None]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class UniversalFitSpec(_Part):
    """The arguments of maodun.attacks.universal.training.UniversalFit."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    draws: int = Field(default=1, ge=1)
    loss: str = "margin"
    clip: float = 9.0
    rate: float = Field(default=0.1, gt=0)
    starts: int = Field(default=3, ge=1)


class DeepFoolFitSpec(_Part):
    """The arguments of maodun.attacks.universal.uap.DeepFoolFit."""

    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=5, ge=1)
    step: float = Field(default=4.0, gt=0)
    enough: float = Field(default=1.0, gt=0, le=1)
    steps: int = Field(default=20, ge=1)
    overshoot: float = Field(default=0.1, ge=0)
    classes: int | None = Field(default=10, ge=2)


class PlacementSpec(_Part):
    """The arguments of maodun.attacks.universal.placement.Placement."""

    side: int = Field(ge=1)
    form: Literal["square", "circle"] = "square"
    scale: tuple[float, float] = (1.0, 1.0)
    rotation: float = 0.0
    lighting: float = 0.0
    at: tuple[float, float] | None = None


class MeasureSpec(_Part):
    """On how many test samples the finished attack is measured, and on which models beside those trained against."""

    limit: int | None = Field(default=1000, ge=1)
    targets: tuple[str, ...] = ()


class UniversalRecipe(_Part):
    """A whole training of a universal attack; equal recipes give equal files on one machine.

    uap: a perturbation in a ball `eps` of `norm`, by `method` sgd (settings `fit`) or deepfool (settings
    `deepfool`). patch: `placement` says what it looks like and where it may stand. `models` are trained against, as the
    mean of their logits when there are several. `target` is the class to bring about (left out: any wrong one). A share
    `validation` of the data is held out, and the share of it that falls is told at the end, beside the test split's.
    """

    name: str
    attack: Literal["uap", "patch"]
    seed: int = 0
    data: TrainData
    models: tuple[str, ...] = Field(min_length=1)
    norm: Literal["linf", "l2"] = "linf"
    eps: Radius | None = None
    target: int | None = Field(default=None, ge=0)
    method: Literal["sgd", "deepfool"] = "sgd"
    placement: PlacementSpec | None = None
    fit: UniversalFitSpec = UniversalFitSpec()
    deepfool: DeepFoolFitSpec = DeepFoolFitSpec()
    measure: MeasureSpec = MeasureSpec()


class UniversalResult(NamedTuple):
    """What a recipe made: the attack, its file, and what was measured on images it has not seen."""

    attack: TrainedAttack
    file: Path
    measured: tuple[Measured, ...]


def load_universal_recipe(path: str | Path) -> UniversalRecipe:
    """Return the recipe of a YAML file; InputError names the file, the line and what is wrong."""
    recipe, where = read_recipe(path, UniversalRecipe), f"recipe '{path}'"
    if recipe.attack == "patch" and recipe.placement is None:
        raise InputError(where, "describes a patch without a placement", "add placement: {side: 5}")
    if recipe.attack == "patch" and (recipe.eps is not None or recipe.method == "deepfool"):
        raise InputError(
            where, "gives a patch a ball or a method", "placement.side is its size; leave out eps and method"
        )
    if recipe.attack == "uap" and (recipe.eps is None or recipe.placement is not None):
        raise InputError(where, "describes a perturbation without a radius or with a placement", "give eps alone")
    if recipe.method == "deepfool" and recipe.target is not None:
        raise InputError(where, "asks DeepFool for a target", "use method: sgd, which can be targeted")
    return recipe


def train_universal(
    recipe: UniversalRecipe | str | Path,
    out: str | Path = "runs/train",
    *,
    on_epoch: Told | None = None,
    resume: bool = True,
) -> UniversalResult:
    """Train what a recipe describes and write the attack NAME.safetensors into the folder `out`.

    Checkpoints lie beside it until the end (not for deepfool); with `resume` a second call continues from them. Errors:
    InputError for a recipe, a folder, data or models that cannot be used.
    """
    described = recipe if isinstance(recipe, UniversalRecipe) else load_universal_recipe(recipe)
    folder = usable_folder(out)
    data = load_data(described.data.spec, split=described.data.split, limit=described.data.limit)
    refuse_one_split(data)
    kept, held = two_sides(data, described.data.validation, described.seed)
    models = {spec: load_model(spec).model for spec in described.models}
    checkpoint = folder / f"{described.name}.ckpt"
    if not resume:
        _forget(checkpoint)
    attack = _train(described, _one(models), _rows(data, kept), checkpoint, on_epoch)
    test = load_data(described.data.spec, split="test", limit=described.measure.limit)
    targets = {spec: load_model(spec).model for spec in described.measure.targets if spec not in models}
    command = f"maodun train {recipe}" if isinstance(recipe, str | Path) else f"train_universal({described.name})"
    sets = ((f"{described.data.split}, held out", _rows(data, held)), ("test", test))
    measured = tuple(
        _measure(attack, model, spec, split, part, described.seed, command)
        for spec, model in (models | targets).items()
        for split, part in sets
    )
    file = folder / f"{described.name}.safetensors"
    about = {"measured": [each.model_dump(mode="json", exclude_none=True) for each in measured]}
    save_artifact(type(attack)(**attack.options(), tensors=attack.tensors, about={**attack.about, **about}), file)
    _forget(checkpoint)
    return UniversalResult(load_attack(file), file, measured)


def train_attack(
    recipe: str | Path,
    out: str | Path = "runs/train",
    *,
    on_epoch: Told | None = None,
    on_step: Callable[[int, int], None] | None = None,
    resume: bool = True,
) -> UniversalResult | GeneratorResult:
    """Train the attack that a recipe file names: a universal one here, any other as a generator.

    Arguments and errors are those of `train_universal` and `train_generator`.
    """
    if yaml.safe_load(Path(recipe).read_text(encoding="utf-8")).get("attack") in ATTACKS:
        return train_universal(recipe, out, on_epoch=on_epoch, resume=resume)
    from maodun.arena.train_generator import train_generator

    return train_generator(recipe, out, on_epoch=on_epoch, on_step=on_step, resume=resume)


def _one(models: dict[str, nn.Module]) -> nn.Module:
    members = list(models.values())
    return members[0] if len(members) == 1 else Ensemble(members)


def _rows(data: Dataset, rows: torch.Tensor) -> Dataset:
    return dataclasses.replace(data, x=data.x[rows], y=data.y[rows], ids=data.ids[rows])


def _forget(checkpoint: Path) -> None:
    for file in checkpoint.parent.glob(f"{checkpoint.name}.*"):
        file.unlink()


def _train(
    recipe: UniversalRecipe, model: nn.Module, data: Dataset, checkpoint: Path, on_epoch: Told | None
) -> TrainedAttack:
    """Train on the samples of `data` and return the attack with the recipe in its provenance."""
    common: dict[str, Any] = {
        "ids": data.ids,
        "seed": recipe.seed,
        "about": {"name": recipe.name, "recipe": recipe.model_dump(mode="json")},
        "on_epoch": None if on_epoch is None else lambda line: on_epoch({"phase": recipe.attack, **line}),
    }
    oracle, fit = Oracle(model), UniversalFit(**recipe.fit.model_dump())
    if recipe.placement is not None:
        placement = Placement(**recipe.placement.model_dump())
        common |= {"target": recipe.target, "checkpoint": checkpoint}
        return train_patch(oracle, data.x, data.y, placement, fit, **common)
    threat = Threat(recipe.norm, recipe.eps or 0.0)
    if recipe.method == "deepfool":
        settings = DeepFoolFit(**recipe.deepfool.model_dump())
        return train_uap_deepfool(oracle, data.x, data.y, threat, settings, **common)
    common |= {"target": recipe.target, "checkpoint": checkpoint}
    return train_uap(oracle, data.x, data.y, threat, fit, **common)


def _measure(
    attack: TrainedAttack, model: nn.Module, spec: str, split: str, data: Dataset, seed: int, command: str
) -> Measured:
    """Measure who falls among the samples that are right without the attack (and not of its target class)."""
    target: int | None = getattr(attack, "target", None)
    threat = Threat(attack.norm, attack.eps)
    oracle = Oracle(model)
    with oracle.ready(), torch.no_grad():
        clean = torch.cat([model(part) for part in torch.split(data.x, 256)]).argmax(1)
        made = attack.candidates(data.x, data.ids, threat, seed)
        forced = torch.cat([model(part) for part in torch.split(made, 256)]).argmax(1)
    meant = clean == data.y
    if target is not None:
        meant &= data.y != target
    fallen = (forced != data.y) if target is None else (forced == target)
    share = interval(int((meant & fallen).sum()), int(meant.sum()))
    goal = "" if target is None else f" (class {target})"
    return Measured(
        metric=f"success{goal} on {spec}, {split}",
        value=round(share.value, 4),
        low=round(share.low, 4),
        high=round(share.high, 4),
        n=share.n,
        seed=seed,
        command=command,
    )


__all__ = ["ATTACKS", "UniversalRecipe", "UniversalResult", "load_universal_recipe", "train_attack", "train_universal"]
