"""The driver: does what is missing of a plan, one unit after the other, in one process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from maodun.arena.diagnostics import diagnosis_name, examine, findings_name
from maodun.arena.plan import Unit
from maodun.arena.progress import Watcher, watcher
from maodun.arena.recipe import Recipe
from maodun.arena.setup import Arena, Shield, prepare, services, versions
from maodun.arena.summary import RunSummary, summarise
from maodun.arena.work import Clean, execute
from maodun.core import admission

if TYPE_CHECKING:
    from maodun.zoo import Dataset


def run(
    recipe: Recipe,
    out: str | Path,
    *,
    progress: str | Watcher = "bar",
    command: str = "",
    device: str = "cpu",
    models: Mapping[str, nn.Module] | None = None,
    surrogates: Mapping[str, nn.Module] | None = None,
    data: Dataset | None = None,
) -> RunSummary:
    """Run `recipe` into the folder `out` and return what it amounts to; a second start does what is missing.

    `progress` is quiet, bar or log. `command` is what the report says reproduces the run. `models` (by shield
    label), `surrogates` (by specification) and `data` replace what the recipe would load. Raises InputError,
    UnsupportedError or StoreError before the first attack; an interrupt leaves every finished shard in the store.
    """
    arena = prepare(recipe, out, command=command, device=device, models=models, surrogates=surrogates, data=data)
    return drive(arena, watcher(progress))


def drive(arena: Arena, watch: Watcher) -> RunSummary:
    """Do every missing unit of a prepared arena: clean passes, diagnostics, attacks; then summarise the store."""
    store, plan = arena.store, arena.plan
    units = [*plan.clean_units(), *plan.attack_units()]
    finished = [unit for unit in units if store.exists(unit.part)]
    store.event("start", units=len(units), finished=len(finished), versions=versions())
    with watch:
        watch.begin(sum(map(_samples, units)), sum(map(_samples, finished)))
        try:
            for unit in plan.clean_units():
                _do(arena, unit, watch)
            for shield in arena.shields.values():
                _admit(arena, shield)
            if arena.recipe.diagnostics:
                _diagnose(arena, watch)
            for unit in plan.attack_units():
                _do(arena, unit, watch)
        except KeyboardInterrupt:
            store.event("interrupted")
            raise
        finally:
            for label, bill in bills(arena).items():
                store.event("bill", shield=label, bill=bill)
    store.event("end")
    return summarise(store)


def bills(arena: Arena) -> dict[str, str]:
    """Return, per shield, what its services have cost in words; shields that cost nothing elsewhere have none."""
    found = {label: [str(each.bill()) for each in services(shield)] for label, shield in arena.shields.items()}
    return {label: "; ".join(lines) for label, lines in found.items() if lines}


def _do(arena: Arena, unit: Unit, watch: Watcher) -> None:
    if arena.store.exists(unit.part):
        return
    title = f"{unit.shield}: clean" if unit.cell is None else unit.cell.name
    watch.unit(title, _samples(unit))
    arena.store.event("shard", part=unit.part, samples=_samples(unit))
    started = time.perf_counter()
    execute(arena, unit, watch.step)
    seconds = time.perf_counter() - started
    arena.store.event("shard finished", part=unit.part, seconds=round(seconds, 3))
    watch.finished(title, _samples(unit), f"shard {unit.shard.number} in {seconds:.1f} s")


def _samples(unit: Unit) -> int:
    return unit.shard.stop - unit.shard.start


def _admit(arena: Arena, shield: Shield) -> None:
    """Refuse models whose clean outputs cannot be meant, over all samples and before the first attack.

    A defended model at chance accuracy is a result, not a mistake in the set-up, so only bare models are refused
    for it; probabilities matter only where some spear needs gradients.
    """
    parts = [Clean(arena, shield, shard.number) for shard in arena.plan.shards]
    logits, y = torch.cat([part.logits for part in parts]), arena.data.y.to(arena.device)
    gradient = any(cell.attack.access == "gradient" and not cell.spec.surrogate for cell in arena.plan.cells)
    access = "gradient" if gradient else "scores"
    # Fewer samples than the test for chance needs switch only that test off.
    rows = slice(None) if not shield.defended else slice(0, 49)
    admission.check_outputs(logits[rows], y[rows], None, access)


def _diagnose(arena: Arena, watch: Watcher) -> None:
    for shield in arena.shields.values():
        name = findings_name(shield.label)
        if arena.store.exists(name):
            continue
        watch.unit(f"{shield.label}: diagnostics", 0)
        started = time.perf_counter()
        examined = examine(arena, shield)
        findings = examined.findings
        diagnoses = [each.model_dump(mode="json") for each in examined.diagnoses]
        arena.store.write_json(diagnosis_name(shield.label), diagnoses)
        # The findings go last: their part is what says that the shield has been looked at.
        arena.store.write_json(name, [finding.model_dump(mode="json") for finding in findings])
        seconds = time.perf_counter() - started
        arena.store.event("diagnosed", shield=shield.label, seconds=round(seconds, 3))
        worst = sum(finding.level in ("warning", "alarm") for finding in findings)
        watch.finished(f"{shield.label}: diagnostics", 0, f"{worst} to look at, in {seconds:.1f} s")
