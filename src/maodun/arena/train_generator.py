"""Training an attack from a recipe: the zoo gives data and proxies, the attack's room the game, the file comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from maodun.arena.recipe import Radius
from maodun.arena.train_recipe import TrainData, read_recipe
from maodun.arena.workplace import checkpoint_in, origin, refuse_one_split, two_sides, usable_folder
from maodun.attacks.artifacts import TrainedAttack, load_attack, save_artifact
from maodun.attacks.generative.attack import GanSampling
from maodun.attacks.generative.collapse import collapse
from maodun.attacks.generative.contest import Contest
from maodun.attacks.generative.fit import GeneratorFit, GeneratorReport, fit_generator
from maodun.attacks.generative.gan import SamplingGame
from maodun.attacks.generative.multi_proxy import MultiProxyGame, MultiProxyOptions
from maodun.attacks.generative.proxies import Proxies
from maodun.core.errors import InputError, nearest
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.core.verdict import interval
from maodun.zoo import load_model
from maodun.zoo.cards import Measured
from maodun.zoo.data import Dataset, load_data


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkSpec(_Part):
    """The generator's size: maps at full resolution, residual blocks."""

    width: int = Field(default=16, ge=1)
    blocks: int = Field(default=2, ge=0)


class GeneratorFitSpec(_Part):
    """The arguments of maodun.attacks.generative.fit.GeneratorFit."""

    epochs: int = Field(default=5, ge=1)
    batch_size: int = Field(default=64, ge=2)
    rate: float = Field(default=1e-3, gt=0)
    critic_rate: float = Field(default=2e-4, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


class TargetsSpec(_Part):
    """On how many test samples the finished attack is measured, and on which models beside the proxies."""

    limit: int | None = Field(default=1000, ge=1)
    targets: tuple[str, ...] = ()


class GeneratorRecipe(_Part):
    """A whole training of a generative attack; equal recipes give equal files on one machine.

    `proxies` are models to train against (for gan-sampling: reference models, or none). `labels` "model" takes the
    classes the proxies name on the clean images, so no labels are needed; "data" takes the data's. `validation` is a
    model that is neither proxy nor target: the epoch that fools it most is kept; without it, the last.
    `options` are those of MultiProxyOptions, or noise, game and fidelity for gan-sampling.
    """

    name: str
    attack: Literal["advgan", "multi-proxy", "gan-sampling"]
    seed: int = 0
    data: TrainData
    eps: Radius = 1.0
    proxies: tuple[str, ...] = ()
    labels: Literal["model", "data"] = "model"
    validation: str | None = None
    network: NetworkSpec = NetworkSpec()
    options: dict[str, Any] = Field(default_factory=dict)
    fit: GeneratorFitSpec = GeneratorFitSpec()
    measure: TargetsSpec = TargetsSpec()


@dataclass(frozen=True)
class GeneratorResult:
    """What a recipe made: the attack, its file, what was measured, and how the epochs went."""

    attack: TrainedAttack
    file: Path
    measured: tuple[Measured, ...]
    report: GeneratorReport


def load_generator_recipe(path: str | Path) -> GeneratorRecipe:
    """Return the recipe of a YAML file; InputError names the file, the line and what is wrong."""
    recipe = read_recipe(path, GeneratorRecipe)
    if recipe.attack != "gan-sampling" and not recipe.proxies:
        raise InputError(f"recipe '{path}'", "names no proxies", "give at least one model to train against")
    if recipe.attack == "advgan" and len(recipe.proxies) > 1:
        raise InputError(f"recipe '{path}'", f"gives advgan {len(recipe.proxies)} proxies", "use multi-proxy")
    both = set(recipe.proxies) & {recipe.validation}
    if both:
        raise InputError(f"recipe '{path}'", f"validates on the proxy {min(map(str, both))}", "choose another model")
    return recipe


def train_generator(
    recipe: GeneratorRecipe | str | Path,
    out: str | Path = "runs/train",
    *,
    on_epoch: Callable[[dict[str, float | str]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    resume: bool = True,
) -> GeneratorResult:
    """Train what a recipe describes and write the attack NAME.safetensors into the folder `out`.

    A checkpoint lies beside it until the end; with `resume` a second call continues from its last step.
    Errors: InputError for a recipe, a folder, data or models that cannot be used.
    """
    described = recipe if isinstance(recipe, GeneratorRecipe) else load_generator_recipe(recipe)
    folder = usable_folder(out)
    data = load_data(described.data.spec, split=described.data.split, limit=described.data.limit)
    refuse_one_split(data)
    kept, held = two_sides(data, described.data.validation, described.seed)
    x, y = data.x[kept], data.y[kept]
    proxies = Proxies([load_model(spec).model for spec in described.proxies], x) if described.proxies else None
    if proxies is not None and described.labels == "model" and described.attack != "gan-sampling":
        y = proxies.labels(x)
    checkpoint = checkpoint_in(folder, described.name, resume=resume)
    report = fit_generator(
        _contest(described, proxies, tuple(x.shape[1:]), max(len(data.classes), int(data.y.max()) + 1)),
        x,
        y,
        GeneratorFit(**described.fit.model_dump()),
        proxies=proxies,
        validate=_validation(described, data.x[held], data.y[held]),
        seed=described.seed,
        checkpoint=checkpoint,
        on_epoch=None if on_epoch is None else lambda line: on_epoch({"phase": described.attack, **line}),
        on_step=on_step,
    )
    place = origin(recipe, described.name)
    measured = tuple(_measure(report.attack, described, f"maodun train {place}"))
    about = {
        "name": described.name,
        "recipe": described.model_dump(mode="json"),
        "best epoch": report.best_epoch,
        "measured": [each.model_dump(mode="json", exclude_none=True) for each in measured],
    }
    file = folder / f"{described.name}.safetensors"
    save_artifact(_with(report.attack, about), file)
    checkpoint.unlink(missing_ok=True)
    return GeneratorResult(load_attack(file), file, measured, report)


def _with(attack: TrainedAttack, about: dict[str, Any]) -> TrainedAttack:
    return type(attack)(**attack.options(), tensors=attack.tensors, about=about)


def _contest(recipe: GeneratorRecipe, proxies: Proxies | None, shape: tuple[int, ...], classes: int) -> Contest:
    try:
        if recipe.attack == "gan-sampling":
            options = {"width": recipe.network.width, **recipe.options}
            return SamplingGame(shape, classes, proxies=proxies, seed=recipe.seed, **options)
        make = MultiProxyOptions.advgan if recipe.attack == "advgan" else MultiProxyOptions
        chosen = make(**recipe.options)
    except TypeError as error:
        known = (
            list(MultiProxyOptions.__dataclass_fields__)
            if recipe.attack != "gan-sampling"
            else ["noise", "game", "fidelity"]
        )
        wrong = next((name for name in recipe.options if name not in known), "")
        raise InputError(
            f"options of '{recipe.attack}'", str(error).rpartition(") ")[2], nearest(wrong, known)
        ) from None
    if proxies is None:
        raise InputError("proxies", "there is none", "give at least one model to train against")
    return MultiProxyGame(
        proxies,
        shape,
        recipe.eps,
        chosen,
        kind=recipe.attack,
        width=recipe.network.width,
        blocks=recipe.network.blocks,
        seed=recipe.seed,
    )


def _validation(recipe: GeneratorRecipe, x: Tensor, y: Tensor) -> Callable[[TrainedAttack], float] | None:
    if recipe.validation is None:
        return None
    oracle = Oracle(load_model(recipe.validation).model, access="decision", stochastic=False)
    threat = Threat("linf", recipe.eps)

    def validate(attack: TrainedAttack) -> float:
        found = attack.run(oracle, x, y, threat, seed=recipe.seed, check_model=False).found
        return float(found.float().mean())

    return validate


def success(
    attack: TrainedAttack, model: nn.Module, data: Dataset, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return who `model` gets right without an attack (N,), who it gets wrong with it (N,), and the forced classes.

    One candidate per sample for attacks that perturb, whose forced classes (N,) are those of every candidate; None for
    gan-sampling, which tries again. The radius is the attack's own.
    """
    threat = Threat("linf", attack.eps)
    oracle = Oracle(model, access="decision", stochastic=False)
    with oracle.ready(), torch.no_grad():
        clean = torch.cat([model(part) for part in torch.split(data.x, 256)]).argmax(1) == data.y
        if not isinstance(attack, GanSampling) and attack.tries == 1:
            made = attack.candidates(data.x, data.ids, threat, seed)
            forced = torch.cat([model(part) for part in torch.split(made, 256)]).argmax(1)
            return clean, forced != data.y, forced
    found = attack.run(oracle, data.x, data.y, threat, seed=seed, ids=data.ids, check_model=False).found
    return clean, found, None


def _measure(attack: TrainedAttack, recipe: GeneratorRecipe, command: str) -> list[Measured]:
    """Measure success where the clean image is answered rightly, on proxies (white box) and targets (black box)."""
    data = load_data(recipe.data.spec, split="test", limit=recipe.measure.limit)
    numbers = []
    for spec in dict.fromkeys((*recipe.proxies, *recipe.measure.targets)):
        clean, fooled, forced = success(attack, load_model(spec).model, data, seed=recipe.seed)
        share = interval(int((clean & fooled).sum()), int(clean.sum()))
        box = "white-box" if spec in recipe.proxies else "black-box"
        numbers.append(
            Measured(
                metric=f"{box} success on {spec} (where right; clean accuracy {clean.float().mean():.4f})",
                value=round(share.value, 4),
                low=round(share.low, 4),
                high=round(share.high, 4),
                n=share.n,
                seed=recipe.seed,
                command=command,
            )
        )
        if forced is not None:
            made = attack.candidates(data.x, data.ids, Threat("linf", attack.eps), recipe.seed)
            shape = collapse(made - data.x, forced)
            about = {"n": shape.n, "seed": recipe.seed, "command": command}
            numbers += [
                Measured(metric=f"mean pairwise cosine, {spec}", value=round(shape.cosine, 4), unit="cosine", **about),
                Measured(
                    metric=f"entropy of forced classes, {spec}", value=round(shape.entropy, 4), unit="nats", **about
                ),
            ]
    return numbers


__all__ = [
    "GeneratorRecipe",
    "GeneratorResult",
    "load_generator_recipe",
    "success",
    "train_generator",
]
