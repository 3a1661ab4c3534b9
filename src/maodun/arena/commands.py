"""The command line that repeats one cell, so that every number of a report can be asked for again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from maodun.arena.recipe import BudgetSpec, Recipe, format_radius
from maodun.arena.shield_recipe import usual_gradient

if TYPE_CHECKING:
    from maodun.arena.plan import Cell

GIVEN = "given:"


def evaluate_command(recipe: Recipe, cell: Cell) -> str | None:
    """Return the `maodun evaluate` line for a cell, None when its set-up goes beyond what flags can say."""
    shield = next(each for each in recipe.shields if each.label == cell.shield)
    # The spear as it was asked for: the cell's own may have its estimator from the plan.
    spear, threat = next(each for each in recipe.spears if each.label == cell.spear), cell.threat
    beyond = bool(shield.members or spear.seed_known or spear.gradient_options)
    beyond = beyond or spear.budget != BudgetSpec(queries=spear.budget.queries)
    if beyond or (threat.targeted and threat.goal != "random") or shield.model.startswith(GIVEN):
        return None
    attack = _named(spear.attack, spear.options)
    parts = [_named(part.name, part.options) for part in shield.parts]
    defense = ",".join(part for part in parts if part is not None)
    if attack is None or None in parts:
        return None
    words = ["maodun", "evaluate", "--model", shield.model]
    words += ["--weights", shield.weights] if shield.weights else []
    for key, value in shield.model_options.items():
        words += ["--model-option", f"{key}={value}"]
    words += ["--defense", defense] if defense else []
    words += ["--data", recipe.data.spec]
    words += ["--split", recipe.data.split] if recipe.data.split != "test" else []
    words += ["--limit", str(recipe.data.limit)] if recipe.data.limit else []
    words += ["--norm", threat.norm]
    words += ["--eps", format_radius(threat.eps)] if threat.eps != float("inf") else []
    words += ["--targeted"] if threat.targeted else []
    words += ["--attack", attack]
    usual = "exact" if spear.surrogate else usual_gradient(shield.model, defended=bool(shield.parts))
    words += ["--gradient", spear.gradient] if spear.gradient != usual else []
    words += ["--eot", str(spear.eot)] if spear.eot > 1 else []
    words += ["--surrogate", ",".join(spear.surrogate)] if spear.surrogate else []
    words += ["--fusion", spear.fusion] if spear.fusion != "logits" else []
    words += ["--access", spear.access] if spear.access else []
    words += ["--query-budget", str(spear.budget.queries)] if spear.budget.queries else []
    verdict = recipe.verdict
    words += ["--rule", verdict.rule] if verdict.rule != "auto" else []
    words += ["--draws", str(verdict.draws)] if verdict.draws != 10 else []
    words += ["--precision", recipe.compute.precision] if recipe.compute.precision != "float32" else []
    return shlex.join([*words, "--seed", str(recipe.seed)])


def _named(name: str, options: Mapping[str, Any]) -> str | None:
    """Return "name:key=value", None when a value is no plain word."""
    words = [name]
    for key, value in options.items():
        text = {True: "true", False: "false", None: "null"}.get(value) if _constant(value) else str(value)
        if isinstance(value, list | dict | tuple) or any(mark in str(text) for mark in ",:= "):
            return None
        words.append(f"{key}={text}")
    return ":".join(words)


def _constant(value: object) -> bool:
    return value is None or isinstance(value, bool)
