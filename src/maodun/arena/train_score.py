"""Training a score network from a recipe: the zoo gives images, the one training loop the steps, a file comes out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from maodun.arena.train_recipe import AugmentSpec, TrainData, read_recipe
from maodun.arena.workplace import checkpoint_in, origin, refuse_one_split, two_sides, usable_folder
from maodun.core.errors import InputError
from maodun.core.files import write_whole
from maodun.core.streams import Stream
from maodun.defenses.purification.artifact import load_artifact, save_score
from maodun.defenses.purification.denoiser import clean_estimate
from maodun.defenses.purification.levels import parse_levels
from maodun.defenses.purification.matching import ScoreMatching
from maodun.defenses.purification.network import Preconditioning, ScoreNetwork, new_network
from maodun.defenses.training import FitReport, FitSettings, NoAugmentation, ShiftFlip, fit
from maodun.zoo.cards import Measured, file_sha256
from maodun.zoo.data import Dataset, load_data
from maodun.zoo.scores import ScoreCard

MEASURED_AT = (0.036, 0.1, 0.2)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NetworkSpec(_Part):
    """The arguments of maodun.defenses.purification.network.new_network, and the law of the training's noise."""

    channels: tuple[int, ...] = (32, 64)
    layers: int = Field(default=1, ge=1)
    patch: int = Field(default=1, ge=1)
    groups: int = Field(default=8, ge=1)
    form: Preconditioning = "edm"
    spread: float = Field(default=0.5, gt=0)
    levels: str = "vp_discrete"
    top: float = Field(default=0.27, gt=0, le=1)
    mean: float = -1.2
    std: float = Field(default=1.2, gt=0)


class ScoreFitSpec(_Part):
    """How long and how fast: the arguments of maodun.defenses.training.FitSettings that a score network needs."""

    epochs: int = Field(default=10, ge=1)
    samples: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=64, ge=1)
    rate: float = Field(default=1e-3, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    clip: float | None = Field(default=1.0, gt=0)
    average: float = Field(default=0.999, ge=0, lt=1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"


class ScoreCardSpec(_Part):
    """What the card says beyond what the recipe and the measurements say."""

    summary: str
    provenance: str
    licence: str = "MIT"
    data: str


class ScoreRecipe(_Part):
    """A whole training of a score network; equal recipes give equal weights on one machine with one thread.

    The epoch with the lowest loss on the held-out share of the training split is kept. Its running mean over the
    steps (`fit.average`) is what is validated and written, in half precision. The test split is measured at the end.
    """

    name: str
    score: NetworkSpec
    seed: int = 0
    data: TrainData
    augment: AugmentSpec = AugmentSpec()
    fit: ScoreFitSpec = ScoreFitSpec()
    measure: int = Field(default=256, ge=1)
    card: ScoreCardSpec


def trains_score(path: str | Path) -> bool:
    """Tell whether the YAML file at `path` describes a score network: its top level has a `score`."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # Whoever loads it next says what is wrong.
        return False
    return isinstance(content, dict) and "score" in content


@dataclass(frozen=True)
class ScoreResult:
    """What a recipe made: the network as the file holds it, the files, what was measured, and how the epochs went."""

    network: ScoreNetwork
    file: Path
    card_file: Path
    measured: tuple[Measured, ...]
    report: FitReport


def load_score_recipe(path: str | Path) -> ScoreRecipe:
    """Return the recipe of a YAML file; InputError names the file, the line and what is wrong."""
    return read_recipe(path, ScoreRecipe)


def train_score(
    recipe: ScoreRecipe | str | Path,
    out: str | Path = "runs/train",
    *,
    on_epoch: Callable[[dict[str, float | str]], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    resume: bool = True,
) -> ScoreResult:
    """Train what a recipe describes and write NAME.safetensors and its card NAME.yaml into the folder `out`.

    A checkpoint per epoch lies beside them until the end; with `resume` a second call continues from it and meets
    the noise it would have met. Errors: InputError for a recipe, a folder or data that cannot be used, and without
    lightning-fabric or diffusers.
    """
    described = recipe if isinstance(recipe, ScoreRecipe) else load_score_recipe(recipe)
    folder = usable_folder(out)
    data = load_data(described.data.spec, split=described.data.split, limit=described.data.limit)
    refuse_one_split(data)
    network = _network(described, data)
    checkpoint = checkpoint_in(folder, described.name, resume=resume)
    report = _fit(network, described, data, checkpoint, on_epoch, on_step)
    file = save_score(network, folder / f"{described.name}.safetensors")
    # What is measured must be what the file holds.
    finished = load_artifact(file)
    place = origin(recipe, described.name)
    measured = tuple(_measure(finished, described, f"maodun train {place}"))
    card = ScoreCard(
        name=described.name,
        weights=file.name,
        sha256=file_sha256(file),
        parameters=sum(each.numel() for each in finished.parameters()),
        shape=finished.shape or (0, 0, 0),
        recipe=place,
        measured=measured,
        **described.card.model_dump(),
    )
    text = yaml.safe_dump(card.model_dump(mode="json", exclude_none=True), sort_keys=False, width=110)
    card_file = write_whole(folder / f"{described.name}.yaml", text.encode())
    checkpoint.unlink(missing_ok=True)
    return ScoreResult(finished, file, card_file, measured, report)


def _network(recipe: ScoreRecipe, data: Dataset) -> ScoreNetwork:
    shape = tuple(data.x.shape[1:])
    if len(shape) != 3:
        raise InputError(f"data '{data.spec}'", f"holds samples of shape {shape}, not images", "use C x H x W images")
    spec = recipe.score
    network = new_network(
        (shape[0], shape[1], shape[2]),
        channels=spec.channels,
        layers=spec.layers,
        patch=spec.patch,
        groups=spec.groups,
        form=spec.form,
        spread=spec.spread,
        levels=parse_levels(spec.levels),
        top=spec.top,
        seed=recipe.seed,
    )
    network.about["recipe"] = recipe.model_dump(mode="json")
    network.name = recipe.name
    return network


def _fit(
    network: ScoreNetwork,
    recipe: ScoreRecipe,
    data: Dataset,
    checkpoint: Path,
    on_epoch: Callable[[dict[str, float | str]], None] | None,
    on_step: Callable[[int, int], None] | None,
) -> FitReport:
    """Train `network` in place; validation is the same loss on held-out images under noise that never changes."""
    kept, held = two_sides(data, recipe.data.validation, recipe.seed)
    objective = ScoreMatching(
        network.levels,
        network.levels.nearest(network.top),
        "edm" if recipe.score.form == "edm" else "uniform",
        recipe.score.spread,
        recipe.score.mean,
        recipe.score.std,
        recipe.seed,
    )
    unseen = data.x[held]

    def validate(core: nn.Module) -> float:
        with torch.no_grad():
            parts = torch.split(torch.arange(unseen.shape[0]), 128)
            errors = torch.cat([objective.errors(core, unseen[rows], -1 - rows, 0) for rows in parts])
        return -float(errors.double().mean())

    augment = recipe.augment
    plain = augment.shift == 0 and not augment.flip
    return fit(
        network.core,
        data.x[kept],
        data.y[kept],
        objective,
        FitSettings(optimiser="adamw", momentum=0.9, decay=0.0, schedule="cosine", **recipe.fit.model_dump()),
        validate=validate,
        augment=NoAugmentation() if plain else ShiftFlip(augment.shift, augment.flip),
        seed=recipe.seed,
        checkpoint=checkpoint,
        label=f"{recipe.score!r} {recipe.data!r} {augment!r}",
        on_epoch=None if on_epoch is None else lambda line: on_epoch({"phase": "score", **line}),
        on_step=on_step,
    )


def psnr(network: ScoreNetwork, x: Tensor, t: int, seed: int = 0) -> Tensor:
    """Return the peak signal-to-noise ratio in dB (N,) of Tweedie's estimate for images x in [0, 1] noised to level t.

    On the [0, 1] scale, the estimate clipped to it; noise is keyed by (seed, row).
    """
    scale, sigma = network.levels.at(t)
    noise = Stream(seed, "psnr").normal(torch.arange(x.shape[0]), tuple(x.shape[1:]), t).to(x)
    with torch.no_grad():
        u = scale * (2.0 * x - 1.0) + sigma * noise
        parts = [clean_estimate(network, network.levels, part, t) for part in torch.split(u, 128)]
    errors = ((torch.cat(parts) + 1.0) / 2.0).clamp(0.0, 1.0).sub(x).square().flatten(1).mean(1)
    return -10.0 * errors.double().log10()


def _measure(network: ScoreNetwork, recipe: ScoreRecipe, command: str) -> list[Measured]:
    """Measure the denoising of test images at three levels, with a 95 % interval of the mean."""
    data = load_data(recipe.data.spec, split="test", limit=recipe.measure)
    numbers = []
    for t_star in MEASURED_AT:
        t = network.levels.index(t_star)
        if network.levels.ratio(t) > network.top:
            continue
        each = psnr(network, data.x, t, recipe.seed)
        value, spread = float(each.mean()), 1.96 * float(each.std()) / math.sqrt(len(each))
        numbers.append(
            Measured(
                metric=f"PSNR of Tweedie's estimate at t* {t_star}",
                value=round(value, 3),
                low=round(value - spread, 3),
                high=round(value + spread, 3),
                n=len(each),
                seed=recipe.seed,
                command=command,
                unit="dB",
            )
        )
    return numbers
