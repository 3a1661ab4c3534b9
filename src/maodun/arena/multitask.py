"""The multi-task experiment: every attack makes one set of images, and every task is asked about it.

What is attacked is stored as 8-bit images, and judged from what is stored. A second start makes only what is missing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from maodun.arena.multitask_recipe import MultitaskRecipe, RowSpec, load_multitask_recipe
from maodun.arena.multitask_stage import GROUPS, TASK_GROUPS, Stage
from maodun.attacks.artifacts import TrainedAttack, save_artifact
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.files import write_whole
from maodun.core.modes import evaluation_mode
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.tasks import Statistics

CLEAN = "clean"
_MODULES = {
    "relation": "learned",
    "relation-pca": "pca",
    "relation-random": "random",
    "views": "views",
    "views-random": "views-random",
}
_FIRST_ID = {"street": 0, "people": 1_000_000, "things": 2_000_000}


@dataclass(frozen=True)
class Line:
    """One row: each task's metric, its drop (clean - attacked) / clean, their mean, the worst task, and the cost.

    `margin`, `low`, `high`, `p` compare the mean drop of the reference row with this one (reference minus this): the
    difference, its 95 % interval, and twice the smaller share of resamples on either side of zero.
    """

    name: str
    metrics: dict[str, float]
    drops: dict[str, float]
    score: float
    score_low: float
    score_high: float
    worst: str
    seconds: float
    margin: float
    low: float
    high: float
    p: float


def run_multitask(
    recipe: MultitaskRecipe | str | Path,
    out: str | Path,
    *,
    rows: tuple[str, ...] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Line]:
    """Attack and judge what a recipe describes in the folder `out`, and return its lines, clean first.

    `rows` limits what is made in this call to some rows (lines come for all rows that are there). Errors: InputError
    for a recipe, data or models that cannot be used.
    """
    described = recipe if isinstance(recipe, MultitaskRecipe) else load_multitask_recipe(recipe)
    folder = Path(out)
    _claim(folder, described)
    stage = Stage(described, say)
    for row in (RowSpec(name=CLEAN, attack=CLEAN), *described.rows):
        if (rows is None or row.name in rows or row.name == CLEAN) and not (folder / f"{row.name}.json").exists():
            say(f"row {row.name}")
            _make(stage, row, folder)
    lines = summarise_multitask(described, folder)
    text = json.dumps({"recipe": described.model_dump(mode="json"), "lines": [vars(line) for line in lines]}, indent=1)
    write_whole(folder / "results.json", text.encode())
    return lines


def _claim(folder: Path, recipe: MultitaskRecipe) -> None:
    """Make the folder; refuse one that holds another experiment (rows may be added)."""
    text = json.dumps(recipe.model_dump(mode="json", exclude={"rows", "reference", "resamples"}), sort_keys=True)
    manifest = folder / "manifest.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not manifest.exists():
            write_whole(manifest, text.encode())
        same = manifest.read_text(encoding="utf-8") == text
    except OSError as error:
        raise InputError(f"folder '{folder}'", f"cannot be used ({error.strerror})", "choose another") from error
    if not same:
        raise InputError(f"folder '{folder}'", "holds the run of another recipe", "choose another folder")


def _make(stage: Stage, row: RowSpec, folder: Path) -> None:
    """Make a row's images, judge them, and write both."""
    started = time.process_time()
    made = {group: _quantised(images) for group, images in craft(stage, row, folder).items()}
    seconds = time.process_time() - started
    judged = judge(stage, made)
    from safetensors.torch import save

    write_whole(folder / f"{row.name}.images.safetensors", save({k: v.contiguous() for k, v in made.items()}))
    flat = {f"{task}/{name}": value.contiguous() for task, values in judged.items() for name, value in values.items()}
    write_whole(folder / f"{row.name}.statistics.safetensors", save(flat))
    write_whole(folder / f"{row.name}.json", json.dumps({"name": row.name, "seconds": seconds}).encode())


def craft(stage: Stage, row: RowSpec, folder: Path) -> dict[str, Tensor]:
    """Return what a row's attack makes of every group's images, float32 in the ball; labels are given to none."""
    eps = stage.recipe.eps
    clean = {group: data.images() for group, data in stage.groups.items()}
    ids = {group: torch.arange(len(x)) + _FIRST_ID[group] for group, x in clean.items()}
    threat = Threat("linf", eps)
    if row.attack == CLEAN:
        return clean
    if row.attack == "noise":
        stream = Stream(stage.recipe.seed, "multitask/noise")
        return {g: (x + eps * stream.signs(ids[g], tuple(x.shape[1:]))).clamp(0, 1) for g, x in clean.items()}
    if row.attack == "oracle":
        return {group: white_box(stage, group, x, **row.options) for group, x in clean.items()}
    if row.attack in ("uap", "relation-generator", "ltp"):
        trained = _train(stage, row)
        save_artifact(trained, folder / f"{row.name}.attack.safetensors")
        return {group: _applied(trained, x, ids[group], threat, stage.recipe.seed) for group, x in clean.items()}
    attack = build_attack(row.attack, **row.options)
    model = stage.surrogate if row.space == "surrogate" else stage.relation(_MODULES[row.space])  # type: ignore[arg-type]
    oracle = Oracle(model, surrogate=True, stochastic=False, batch_size=32)
    made = {}
    for group, x in clean.items():
        y = torch.zeros(len(x), dtype=torch.int64)
        made[group] = attack.run(
            oracle, x, y, threat, seed=stage.recipe.seed, ids=ids[group], check_model=False
        ).x_adv  # fmt: skip
    return made


def _train(stage: Stage, row: RowSpec) -> TrainedAttack:
    """Return the trained attack of a row, from the unlabelled pool (labels, where needed, are the surrogate's own)."""
    from maodun.attacks.multitask import generator as made
    from maodun.attacks.multitask.attack import Weights

    eps, seed, pool = stage.recipe.eps, stage.recipe.seed, stage.pool
    if row.attack == "uap":
        from maodun.attacks.universal.training import UniversalFit
        from maodun.attacks.universal.uap import train_uap

        few = pool[:1024]
        with torch.no_grad():
            own = torch.cat([stage.surrogate(part).argmax(1) for part in torch.split(few, 256)])
        fit = UniversalFit(**row.options)
        return train_uap(Oracle(stage.surrogate), few, own, Threat("linf", eps), fit, seed=seed)
    settings = made.GeneratorSettings(steps=stage.recipe.generator_steps)
    if row.attack == "ltp":
        layer = str(row.options.get("layer", "features.4"))
        goal = made.separation_value(stage.surrogate, layer)
        return made.train_generator(made.FeatureGenerator, stage.surrogate, goal, pool, eps, settings, seed=seed)
    module = stage.relation(_MODULES[row.space])  # type: ignore[arg-type]
    goal = made.relation_value(module, Weights(), levels=float(row.options.get("levels", 0.0)))
    return made.train_generator(made.RelationGenerator, module, goal, pool, eps, settings, seed=seed)


def _applied(attack: TrainedAttack, x: Tensor, ids: Tensor, threat: Threat, seed: int) -> Tensor:
    """Apply a trained attack to images larger than those it was trained on; a perturbation is repeated like tiles."""
    shape = tuple(x.shape[1:])
    delta = attack.tensors.get("delta")
    if shape == attack.shape or delta is None:
        return replace(attack, shape=shape).candidates(x, ids, threat, seed)
    times = [math.ceil(wanted / have) for wanted, have in zip(shape[1:], delta.shape[1:], strict=True)]
    tiled = delta.repeat(1, *times)[:, : shape[1], : shape[2]]
    return replace(attack, shape=shape, tensors={"delta": tiled}).candidates(x, ids, threat, seed)


def white_box(stage: Stage, group: str, x: Tensor, steps: int = 10) -> Tensor:
    """Return images that climb the losses of all the group's own task networks at once: what knowing everything buys.

    Signed steps of 2.5 eps / steps along the sum of the l1-normalised gradients, from a random start.
    """
    eps, players = stage.recipe.eps, [stage.players[task] for task in TASK_GROUPS if group in TASK_GROUPS[task]]
    truth, made = stage.groups[group].truth, []
    for first in range(0, len(x), 32):
        rows = slice(first, first + 32)
        clean, ids = x[rows], torch.arange(len(x))[rows] + _FIRST_ID[group]
        threat = Threat("linf", eps)
        x_adv = threat.random_start(clean, Stream(stage.recipe.seed, "multitask/oracle"), ids)
        targets = [player.task.target(player.model, clean, truth[rows]) for player in players]
        for _ in range(steps):
            total = torch.zeros_like(x_adv)
            for player, target in zip(players, targets, strict=True):
                with evaluation_mode(player.model), torch.enable_grad():
                    point = x_adv.detach().requires_grad_(True)
                    (slope,) = torch.autograd.grad(player.task.loss(player.model(point), target).sum(), point)
                total += slope / slope.abs().flatten(1).mean(1).clamp(min=1e-20).reshape(-1, 1, 1, 1)
            x_adv = threat.project(x_adv + 2.5 * eps / steps * total.sign(), clean)
        made.append(x_adv)
    return torch.cat(made)


def judge(stage: Stage, made: dict[str, Tensor]) -> dict[str, Statistics]:
    """Return every task's statistics of 8-bit images; a task of several groups is judged on all, in order."""
    judged: dict[str, Statistics] = {}
    for name, groups in TASK_GROUPS.items():
        player, parts = stage.players[name], []
        for group in groups:
            data = stage.groups[group]
            parts.append(player.task.evaluate(player.model, made[group].float() / 255, data.images(), data.truth))
        judged[name] = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return judged


def summarise_multitask(recipe: MultitaskRecipe, folder: Path) -> list[Line]:
    """Return the lines of all rows that are there, with paired bootstraps over the images of each group."""
    from maodun.tasks import TASKS

    there = [CLEAN, *(row.name for row in recipe.rows if (folder / f"{row.name}.json").exists())]
    statistics = {name: _read(folder, name) for name in there}
    tasks = {name: kind() for name, kind in TASKS.items()}
    draws = _resamples(recipe)

    def scores(name: str, weights: dict[str, Tensor] | None) -> dict[str, float]:
        found = {}
        for task, groups in TASK_GROUPS.items():
            w = None if weights is None else torch.cat([weights[group] for group in groups])
            found[task] = tasks[task].score(statistics[name][task], w)
        return found

    plain = {name: scores(name, None) for name in there}
    resampled = {name: [scores(name, weights) for weights in draws] for name in there}
    means = {
        name: torch.tensor([_drop_mean(resampled[CLEAN][k], each) for k, each in enumerate(resampled[name])])
        for name in there
    }
    lines = []
    for name in there:
        cost = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["seconds"]
        drops = _drops(plain[CLEAN], plain[name])
        reference = recipe.reference if recipe.reference in there else CLEAN
        gap = means[reference] - means[name]
        low, high = (float(v) for v in gap.quantile(torch.tensor([0.025, 0.975])))
        score_low, score_high = (float(v) for v in means[name].quantile(torch.tensor([0.025, 0.975])))
        p = 2.0 * min(float((gap <= 0).float().mean()), float((gap >= 0).float().mean()))
        lines.append(
            Line(
                name=name,
                metrics=plain[name],
                drops=drops,
                score=_mean(drops),
                score_low=score_low,
                score_high=score_high,
                worst=min(drops, key=lambda task: drops[task]),
                seconds=cost,
                margin=_drop_mean(plain[CLEAN], plain[reference]) - _mean(drops),
                low=low,
                high=high,
                p=min(1.0, max(p, 2.0 / len(draws))),
            )
        )
    return lines


def _resamples(recipe: MultitaskRecipe) -> list[dict[str, Tensor]]:
    """Return how often each image counts in each resample; the same for every row, so comparisons are paired."""
    sizes = {"street": recipe.images.street, "people": recipe.images.people, "things": recipe.images.things}
    stream, drawn = Stream(recipe.seed, "multitask/bootstrap"), []
    for number in range(recipe.resamples):
        one = torch.tensor([number])
        drawn.append(
            {
                group: torch.bincount(stream.child(group).integers(one, (n,), n)[0], minlength=n).double()
                for group, n in sizes.items()
            }
        )
    return drawn


def _drops(clean: dict[str, float], attacked: dict[str, float]) -> dict[str, float]:
    # A metric that is zero without any attack (a resample may draw hard images alone) has nothing to lose.
    return {task: (clean[task] - attacked[task]) / clean[task] if clean[task] > 0 else 0.0 for task in clean}


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _drop_mean(clean: dict[str, float], attacked: dict[str, float]) -> float:
    return _mean(_drops(clean, attacked))


def _read(folder: Path, name: str) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    found: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(folder / f"{name}.statistics.safetensors").items():
        task, _, statistic = key.partition("/")
        found.setdefault(task, {})[statistic] = value
    return found


def _quantised(x: Tensor) -> Tensor:
    return (x * 255.0).round().clamp(0, 255).byte()


__all__ = ["GROUPS", "Line", "run_multitask", "summarise_multitask"]
