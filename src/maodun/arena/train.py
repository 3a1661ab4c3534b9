"""Training from a recipe: the zoo gives data and network, the spear the inner attack, the shield the objective."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from maodun.arena.objectives import InnerAttack, build_objective
from maodun.arena.train_defense import defended, keyed, refuse_defense, right
from maodun.arena.train_log import event_log, event_writer
from maodun.arena.train_recipe import TrainRecipe, load_train_recipe
from maodun.arena.workplace import refuse_one_split, two_sides, usable_folder
from maodun.attacks.registry import build_attack
from maodun.core.engine import Attack
from maodun.core.errors import InputError
from maodun.core.files import weights_of, write_whole
from maodun.core.modes import evaluation_mode
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.threat import Threat
from maodun.core.verdict import Interval, interval, judge
from maodun.defenses.training import (
    Distillation,
    FitReport,
    FitSettings,
    NoAugmentation,
    Objective,
    ShiftFlip,
    fit,
    soft_labels,
)
from maodun.defenses.training.augment import CutMix
from maodun.zoo.architectures import build_architecture
from maodun.zoo.cards import Measured, ModelCard, file_sha256
from maodun.zoo.checkpoints import apply_weights, read_weights
from maodun.zoo.data import Dataset, load_data
from maodun.zoo.models import load_model

Line = dict[str, float | str]

# What of a recipe changes nothing while it is trained.
_APART = {"card", "measure", "weights"}


@dataclass(frozen=True)
class TrainResult:
    """What a recipe made: the model in evaluation mode, its card, the files written, and how the epochs went.

    Where the recipe has a defence, the model stands behind it.
    """

    model: nn.Module
    card: ModelCard
    weights: Path
    card_file: Path
    report: FitReport


def train(
    recipe: TrainRecipe | str | Path,
    out: str | Path = "runs/train",
    *,
    on_epoch: Callable[[Line], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    resume: bool = True,
    seed: int | None = None,
    tensorboard: bool = False,
    source: str = "",
) -> TrainResult:
    """Train what a recipe describes and write NAME.safetensors and its card NAME.yaml into the folder `out`.

    A checkpoint per epoch lies beside them until the end; with `resume` a second call continues from it. `seed`
    replaces the recipe's; `tensorboard` also logs the epochs to the folder NAME.PHASE.events. `source` is the file that
    the card names where a recipe is given itself, as one of a sweep (`TrainRecipe.each`).
    `on_epoch` gets {phase, epoch, loss, score, seconds} after every epoch, where score is what the epoch is chosen by;
    `on_step` the batches done and of all. Errors: InputError for a recipe, a folder or data that cannot be used.
    """
    described = recipe if isinstance(recipe, TrainRecipe) else load_train_recipe(recipe)
    if described.sweep:
        raise InputError(f"recipe '{described.name}'", "is a sweep of several", "train each of recipe.each()")
    if seed is not None:
        described = described.model_copy(update={"seed": seed})
    refuse_defense(described)
    folder = usable_folder(out)
    if tensorboard:
        event_writer()
    data = load_data(described.data.spec, split=described.data.split, limit=described.data.limit)
    refuse_one_split(data)
    refuse_other_classes(build_architecture(described.architecture, described.options), data, described.architecture)
    kept, held = two_sides(data, described.data.validation, described.seed)
    sides = (data.x[kept], data.y[kept], data.x[held], data.y[held])
    run = _Run(described, folder, *sides, on_epoch, on_step, resume, tensorboard)
    model, report = run.all_phases()
    weights = folder / f"{described.name}.safetensors"
    save_weights(model, weights, torch.float16 if described.weights == "float16" else torch.float32)
    # What is measured must be what the file holds.
    apply_weights(model, read_weights(weights), f"weights '{weights}'")
    shield = defended(model, described.defense).eval()
    card = _card(described, shield, weights, source or recipe)
    card_file = folder / f"{described.name}.yaml"
    write_whole(
        card_file, yaml.safe_dump(card.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110).encode()
    )
    for phase in run.phases:
        run.checkpoint(phase).unlink(missing_ok=True)
    return TrainResult(shield, card, weights, card_file, report)


@dataclass
class _Run:
    """One recipe on its data: `x`, `y` to learn from and `x_held`, `y_held` to choose the epoch on."""

    recipe: TrainRecipe
    folder: Path
    x: Tensor
    y: Tensor
    x_held: Tensor
    y_held: Tensor
    on_epoch: Callable[[Line], None] | None
    on_step: Callable[[int, int], None] | None
    resume: bool
    tensorboard: bool = False

    @property
    def phases(self) -> tuple[str, ...]:
        spec = self.recipe.objective
        if spec.kind != "distillation":
            return ("model",)
        return ("student",) if spec.teacher else ("teacher", "student")

    def checkpoint(self, phase: str) -> Path:
        return self.folder / f"{self.recipe.name}.{phase}.ckpt"

    def all_phases(self) -> tuple[nn.Module, FitReport]:
        """Train what the objective needs, a teacher before its student, and return the last model and its report."""
        spec, seed = self.recipe.objective, self.recipe.seed
        if spec.kind == "distillation":
            if spec.teacher:
                soft = self.lesson(spec.teacher)
            else:
                teacher, _ = self.phase("teacher", Distillation(spec.temperature), seed)
                soft = soft_labels(teacher, self.x, spec.temperature)
            return self.phase("student", Distillation(spec.temperature, soft), seed + 1)
        per_epoch = math.ceil(self.x.shape[0] / self.recipe.fit.batch_size)
        objective = build_objective(spec, seed=seed, per_epoch=per_epoch, epochs=self.recipe.fit.epochs)
        return self.phase("model", objective, seed)

    def lesson(self, teacher: str) -> Tensor:
        """Return a finished teacher's probabilities for every training picture (N x classes)."""
        soft = soft_labels(load_model(teacher).model, self.x, 1.0)
        classes = class_count(build_architecture(self.recipe.architecture, self.recipe.options), self.x)
        if soft.shape[1] != classes:
            reason = f"tells {soft.shape[1]} classes apart, the student {classes}"
            raise InputError(f"teacher '{teacher}'", reason, "take a teacher of the same data")
        return soft

    def phase(self, name: str, objective: Objective, seed: int) -> tuple[nn.Module, FitReport]:
        """Train one model with `objective`, from its checkpoint where there is one."""
        recipe, checkpoint = self.recipe, self.checkpoint(name)
        if not self.resume:
            checkpoint.unlink(missing_ok=True)
        model = build_architecture(recipe.architecture, recipe.options, seed=seed)
        if recipe.objective.start:
            begin_as(model, str(recipe.objective.teacher), recipe.objective.temperature)
        with event_log(self.folder / f"{recipe.name}.{name}.events", wanted=self.tensorboard) as log:
            report = fit(
                defended(model, recipe.defense),
                self.x,
                self.y,
                keyed(objective, recipe, seed),
                FitSettings(**recipe.fit.model_dump()),
                validate=partial(held_out_score, x=self.x_held, y=self.y_held, inner=recipe.select, seed=seed),
                augment=self.augmentation(model),
                seed=seed,
                checkpoint=checkpoint,
                # Checkpoints of before recipes had defences stay those of their recipes.
                label=recipe.model_dump_json(exclude=_APART | ({"defense"} if recipe.defense is None else set())),
                on_epoch=partial(self._tell, name, log),
                on_step=self.on_step,
            )
        return model, report

    def augmentation(self, model: nn.Module) -> NoAugmentation | ShiftFlip | CutMix:
        """Return how the recipe changes training pictures."""
        asked = self.recipe.augment
        pictures = ShiftFlip(asked.shift, asked.flip) if asked.shift or asked.flip else NoAugmentation()
        return CutMix(class_count(model, self.x), asked.cutmix, pictures) if asked.cutmix else pictures

    def _tell(self, phase: str, log: Callable[[dict[str, float]], None], line: dict[str, float]) -> None:
        self._log(phase, line)
        log(line)
        if self.on_epoch is not None:
            self.on_epoch({"phase": phase, **line})

    def _log(self, phase: str, line: dict[str, float]) -> None:
        """Append the epoch to a table beside the checkpoint; the first epoch begins it anew."""
        file = self.folder / f"{self.recipe.name}.{phase}.csv"
        first = line["epoch"] == 0
        with file.open("w" if first else "a", newline="", encoding="utf-8") as target:
            writer = csv.DictWriter(target, list(line))
            if first:
                writer.writeheader()
            writer.writerow(line)


def begin_as(student: nn.Module, teacher: str, temperature: float) -> None:
    """Give `student` the weights of `teacher`, the last linear layer (its bias too) times `temperature`.

    Raises InputError when their architectures differ or there is no linear layer.
    """
    apply_weights(student, load_model(teacher).model.state_dict(), f"student of teacher '{teacher}'")
    linear = [module for module in student.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise InputError(f"teacher '{teacher}'", "has no linear layer to scale", "leave start out")
    with torch.no_grad():
        for parameter in linear[-1].parameters():
            parameter.mul_(temperature)


def class_count(model: nn.Module, x: Tensor) -> int:
    """Return how many classes a model answers for inputs like `x`."""
    with evaluation_mode(model), torch.no_grad():
        return int(model(x[:1].to(next(model.parameters()).device)).shape[1])


def refuse_other_classes(model: nn.Module, data: Dataset, name: str) -> None:
    """Raise InputError when a model answers another number of classes than the data have."""
    classes, needed = class_count(model, data.x), max(len(data.classes), int(data.y.max()) + 1)
    if classes != needed:
        reason = f"answers {classes} classes, the data have {needed}"
        raise InputError(f"model '{name}'", reason, f"give it {needed} classes, or other data")


def _spear(inner: InnerAttack) -> tuple[Attack[Any], Threat]:
    return build_attack(inner.attack, **inner.options), Threat(inner.norm, inner.eps)


def held_out_score(model: nn.Module, *, x: Tensor, y: Tensor, inner: InnerAttack | None, seed: int) -> float:
    """Return clean accuracy, or robust accuracy against `inner`, on the held-out samples."""
    device = next(model.parameters()).device
    x, y = x.to(device), y.to(device)
    if inner is None:
        return float(right(model, x, y, seed).float().mean())
    attack, threat = _spear(inner)
    oracle = Oracle(model, stochastic=is_stochastic(model))
    found = attack.run(oracle, x, y, threat, seed=seed, check_model=False).found
    return 1.0 - float(found.float().mean())


def _card(recipe: TrainRecipe, model: nn.Module, weights: Path, source: object) -> ModelCard:
    """Measure the finished model on the test split and write down what is known about it."""
    test = load_data(recipe.data.spec, split="test", limit=recipe.measure.limit)
    place = str(source) if isinstance(source, str | Path) else f"recipes/train/{recipe.name}.yaml"
    command = f"maodun train {place}"
    answered = int(right(model, test.x, test.y, recipe.seed).sum())
    measured = [_number("clean accuracy", interval(answered, len(test)), recipe.seed, command)]
    if recipe.measure.inner is not None:
        attack, threat = _spear(recipe.measure.inner)
        oracle = Oracle(model)
        found = attack.run(oracle, test.x, test.y, threat, seed=recipe.seed, ids=test.ids, check_model=False)
        robust = judge(oracle, found.x_adv, test.x, test.y, threat, seed=recipe.seed, ids=test.ids).robust
        measured.append(_number(f"robust accuracy, {threat}, {attack!r}", robust, recipe.seed, command))
    return ModelCard(
        name=recipe.name,
        kind=recipe.card.kind,
        architecture=recipe.architecture,
        options=recipe.options,
        weights=weights.name,
        sha256=file_sha256(weights),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        recipe=place,
        measured=tuple(measured),
        summary=recipe.card.summary,
        data=recipe.card.data,
        provenance=recipe.card.provenance,
        licence=recipe.card.licence,
    )


def _number(metric: str, share: Interval, seed: int, command: str) -> Measured:
    return Measured(
        metric=metric,
        value=round(share.value, 4),
        low=round(share.low, 4),
        high=round(share.high, 4),
        n=share.n,
        seed=seed,
        command=command,
    )


def save_weights(model: nn.Module, path: Path, kind: torch.dtype) -> None:
    """Write the state dict as safetensors, floating-point values as `kind`; whole or not at all."""
    write_whole(path, weights_of(model, kind))


__all__ = ["TrainRecipe", "TrainResult", "load_train_recipe", "train"]
