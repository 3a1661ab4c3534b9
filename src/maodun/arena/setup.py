"""Everybody who meets in the arena: the data, the shields with their models, and the store that watches."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maodun.arena.commands import evaluate_command
from maodun.arena.detectors import fit_detectors
from maodun.arena.fallback import FALLBACK, falls_back
from maodun.arena.ladder import evaluations, rung
from maodun.arena.plan import Cell, Plan, Shard, access, budget, estimator, make_plan, steps
from maodun.arena.recipe import Recipe
from maodun.arena.shield_recipe import ShieldSpec
from maodun.arena.shields import about_shield, refuse_unfit, shield_model
from maodun.arena.store import Store
from maodun.arena.strategy import Strategy, derive, resolve
from maodun.arena.surrogates import PREFIX, Surrogate, found_name, load_surrogates, white_box
from maodun.arena.surrogates import oracle as surrogate_oracle
from maodun.attacks.artifacts import TrainedAttack
from maodun.core import admission
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.known import KnownDraw
from maodun.core.oracle import Oracle, granted, is_stochastic
from maodun.core.sizing import metered
from maodun.core.verdict import Rule

if TYPE_CHECKING:
    from maodun.zoo import Dataset

# What must agree between a store and the recipe that continues it.
IDENTITY = ("recipe", "data", "weights")


@dataclass(frozen=True)
class Shield:
    """A defended model ready to be attacked; `about` is what the report says of it."""

    label: str
    model: nn.Module
    sha256: str
    defended: bool
    stochastic: bool
    about: dict[str, str]


@dataclass(frozen=True)
class Arena:
    """A plan with everything it needs to run; the same object serves the driver and any worker."""

    plan: Plan
    data: Dataset
    shields: dict[str, Shield]
    store: Store
    device: torch.device
    surrogates: dict[str, Surrogate] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe behind the plan."""
        return self.plan.recipe

    def rows(self, shard: Shard) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, labels and ids of a shard on the device."""
        part = slice(shard.start, shard.stop)
        x, y, ids = self.data.x[part], self.data.y[part], self.data.ids[part]
        return x.to(self.device), y.to(self.device), ids.to(self.device)

    def oracle(self, shield: Shield, cell: Cell | None = None) -> Oracle:
        """Return what the cell's spear may ask, the shield or its surrogates; without a cell, the verdict's shield."""
        compute = self.recipe.compute
        if cell is None:
            return Oracle(shield.model, batch_size=compute.batch_size, stochastic=shield.stochastic)
        if cell.spec.surrogate:
            return surrogate_oracle(self, cell)
        known = cell.spec.seed_known and is_stochastic(shield.model)
        return Oracle(
            KnownDraw(shield.model, self.recipe.seed) if known else shield.model,
            access=access(cell.spec, cell.attack),
            gradient=estimator(cell.spec),
            budget=budget(cell.spec),
            batch_size=compute.batch_size,
            precision=compute.precision,
            channels_last=compute.channels_last,
            compile=compute.compile,
            stochastic=shield.stochastic,
        )

    def rule(self, shield: Shield) -> Rule:
        """Return the verdict's rule for a shield: as asked for, or by whether it is stochastic."""
        verdict = self.recipe.verdict
        if verdict.rule == "auto":
            return Rule("majority", verdict.draws) if shield.stochastic else Rule("single", 1)
        return Rule(verdict.rule, verdict.draws)


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    command: str = "",
    device: str = "cpu",
    models: Mapping[str, nn.Module] | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    data: Dataset | None = None,
) -> Arena:
    """Load data and models, check every combination and open the store; nothing is attacked yet.

    `models` gives shields (by label) and `surrogates` surrogates (by specification) as modules, `data` the samples
    instead of the recipe's. Raises InputError, UnsupportedError or StoreError with a reason.
    """
    place = usable_device(device)
    if data is None:
        from maodun.zoo import load_data

        data = load_data(recipe.data.spec, split=recipe.data.split, limit=recipe.data.limit)
    if len(data) == 0:
        raise InputError(f"data '{data.spec}'", "holds no samples", "give at least one")
    plan = make_plan(recipe, len(data), tuple(data.x.shape[1:]))
    shields = {
        spec.label: _shield(spec, recipe, data, place, None if models is None else models.get(spec.label))
        for spec in recipe.shields
    }
    stand_ins = load_surrogates(recipe, data, shields, place, surrogates)
    plan, shields = choose_gradients(plan, shields)
    arena = Arena(plan, data, shields, Store(out), place, stand_ins)
    refuse_blind(arena)
    refuse_rounding(arena)
    arena.store.open_for(manifest(arena, command), IDENTITY, expected_bytes(arena))
    keep_answers(arena)
    return arena


def choose_gradients(plan: Plan, shields: dict[str, Shield]) -> tuple[Plan, dict[str, Shield]]:
    """Return the plan with the estimators it was left to choose (gradient auto), and the shields, told why."""
    shields, cells = dict(shields), []
    for cell in plan.cells:
        if cell.spec.gradient == "auto" and cell.spec.surrogate:
            cell = resolve(cell, Strategy("exact", cell.spec.eot, ""))
        elif cell.spec.gradient == "auto":
            shield = shields[cell.shield]
            strategy = derive(shield.model, cell.spec.eot)
            also = falls_back(cell.spec, cell.attack, shield.model)
            cell = replace(resolve(cell, strategy), fallback=also)
            if cell.attack.access == "gradient":
                why = f"{strategy.why} {FALLBACK}" if also else strategy.why
                shields[cell.shield] = replace(shield, about={**shield.about, "gradient": why})
        cells.append(cell)
    return replace(plan, cells=tuple(cells)), shields


def refuse_blind(arena: Arena) -> None:
    """Raise UnsupportedError for a spear that asks more of a shield than it tells, as gradients of a service."""
    for cell in arena.plan.cells:
        try:
            arena.oracle(arena.shields[cell.shield], cell).refuse(cell.attack.access)
        except InputError as error:
            where = f"spear '{cell.spear}' against '{cell.shield}'"
            remedy = "give it gradient nes or spsa, or take a query attack such as square"
            blind = granted(arena.shields[cell.shield].model) == "decision"
            remedy = "take an attack by decisions, such as hopskipjump" if blind else remedy
            raise UnsupportedError(where, f"{error.thing} {error.reason}", remedy) from None


def refuse_rounding(arena: Arena) -> None:
    """Raise InputError for a linf radius of half a level where images are rounded to 8 bits on their way to a service.

    With whole levels the image that is sent stays in the ball that the recipe names, with others it would not.
    """
    for cell in arena.plan.cells:
        levels = 255 * cell.threat.eps
        eight_bit = getattr(arena.shields[cell.shield].model, "eight_bit", False)
        if eight_bit and cell.threat.norm == "linf" and math.isfinite(levels) and abs(levels - round(levels)) > 1e-3:
            reason = f"is {levels:.4g} levels of 8 bits, to which images are rounded on their way to '{cell.shield}'"
            raise InputError(f"eps {cell.threat.eps:g}", reason, f"give {int(levels)}/255, or body=npy or pixels=float")


def services(shield: Shield) -> list[Any]:
    """Return the parts of a shield that cost queries elsewhere: each has a journal and a bill."""
    return [module for module in shield.model.modules() if getattr(module, "metered", False)]


def keep_answers(arena: Arena) -> None:
    """Let services keep their answers beside a local store, so that a second start asks for none of them again."""
    for shield in arena.shields.values():
        for service in services(shield) if arena.store.local else ():
            service.keep_answers(Path(arena.store.root) / "answers")


def usable_device(name: str) -> torch.device:
    """Return the device called `name`; InputError when this machine does not have it."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"device '{name}'", f"cannot be used ({reason})", "use cpu") from error


def _shield(spec: ShieldSpec, recipe: Recipe, data: Dataset, device: torch.device, given: nn.Module | None) -> Shield:
    model, digest = shield_model(spec, device, given)
    fit_detectors(model, recipe, data, device)
    defended = bool(spec.parts or spec.members)
    if defended:
        refuse_unfit(spec.label, model, data.x[:2].to(device), data.ids[:2].to(device))
    stochastic = _stochastic(model, data, device)
    about = {**about_shield(spec), "sha256": digest, "stochastic": "yes" if stochastic else "no"}
    return Shield(spec.label, model, digest, defended, stochastic, about)


def _stochastic(model: nn.Module, data: Dataset, device: torch.device) -> bool:
    """Tell whether a module declares randomness or answers the same few samples in two ways."""
    if is_stochastic(model):
        return True
    if metered(model):
        # A service says so itself: to try it out would cost queries.
        return False
    oracle = Oracle(model)
    few, ids = admission.check_inputs(data.x[:8]).to(device), data.ids[:8].to(device)
    try:
        with oracle.ready():
            return admission.looks_stochastic(oracle.session(few, ids, 0), few)
    except RuntimeError as error:
        reason = f"cannot take inputs of shape {tuple(few.shape[1:])} ({str(error).splitlines()[0]})"
        raise InputError("model", reason, "check its input size and channels, and the device") from error


def expected_bytes(arena: Arena) -> int:
    """Return about how many bytes the missing parts of a run will take, generously."""
    classes = max(len(arena.data.classes), 2)
    row = 200 + 3 * 4 * classes
    inputs = 2 * 4 * arena.data.x[0].numel() if arena.recipe.adversarials else 0
    total = 64 * 1024
    for unit in [*arena.plan.clean_units(), *arena.plan.attack_units()]:
        if not arena.store.exists(unit.part):
            samples = unit.shard.stop - unit.shard.start
            total += 8 * 1024 + samples * (row + (0 if unit.cell is None else inputs))
    searches = {
        found_name(cell, shard): shard.stop - shard.start
        for cell in arena.plan.cells
        for shard in (arena.plan.shards if cell.spec.surrogate else ())
    }
    total += sum(4096 + 5 * arena.data.x[0].numel() * samples for samples in searches.values())
    return total


def manifest(arena: Arena, command: str) -> dict[str, Any]:
    """Return what the run is: recipe, versions, seed, hashes of data and weights, cells."""
    recipe, data = arena.recipe, arena.data
    return {
        "format": 1,
        "name": recipe.name,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "seed": recipe.seed,
        "digest": recipe.digest(),
        "recipe": recipe.identity(),
        "compute": recipe.compute.model_dump(mode="json"),
        "diagnostics": recipe.diagnostics,
        "versions": versions(),
        "data": {
            "spec": data.spec,
            "name": data.name,
            "sha256": data.sha256,
            "samples": len(data),
            "shape": list(data.x.shape[1:]),
        },
        "classes": list(data.classes),
        "weights": {label: shield.sha256 for label, shield in arena.shields.items()}
        | {PREFIX + spec: each.sha256 for spec, each in arena.surrogates.items()}
        | {cell.spec.attack: cell.attack.sha256 for cell in arena.plan.cells if isinstance(cell.attack, TrainedAttack)},
        "shields": {label: shield.about for label, shield in arena.shields.items()},
        "cells": [
            {
                "name": cell.name,
                "shield": cell.shield,
                "spear": cell.spear,
                "norm": cell.threat.norm,
                "eps": cell.threat.model_dump(mode="json")["eps"],
                "targeted": cell.threat.targeted,
                "attack": repr(cell.attack),
                "command": evaluate_command(recipe, cell) or command,
                "kind": cell.attack.kind,
                "steps": steps(cell.attack),
                "rung": rung(cell.spec, cell.attack, cell.threat.norm),
                "eot": cell.spec.eot,
                "nfe": evaluations(arena.shields[cell.shield].model),
                "access": "surrogate" if cell.spec.surrogate else access(cell.spec, cell.attack),
                "surrogates": list(cell.spec.surrogate),
                "hooks": cell.spec.model_copy(update={"surrogate": ()}).label,
                "white_box": bool(cell.spec.surrogate) and white_box(arena, cell),
                "rule": arena.rule(arena.shields[cell.shield]).name,
                "reference": recipe.compute.precision == "float32" and not recipe.compute.compile,
            }
            for cell in arena.plan.cells
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions that can change a number: this package, Python, torch, NumPy, SciPy and the machine."""
    import numpy as np
    import scipy

    import maodun

    return {
        "maodun": maodun.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "platform": platform.platform(),
    }
