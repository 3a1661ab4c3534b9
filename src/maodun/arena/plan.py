"""What a recipe amounts to before anything runs: attacks built and checked, cells named, samples cut into shards."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from maodun.arena.recipe import Recipe, SpearSpec, ThreatSpec, format_radius
from maodun.arena.shield_recipe import ShieldSpec
from maodun.arena.store import part_name
from maodun.core.engine import Attack
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.estimators import BPDA, EOT, NES, SPSA, Adjoint, Estimator, Exact, Surrogate
from maodun.core.oracle import Budget
from maodun.core.threat import Threat


@dataclass(frozen=True)
class Cell:
    """One spear against one shield under one threat; `name` is its folder in the store.

    With `fallback` what the search leaves standing is sent the bare classifier's example as well.
    """

    name: str
    shield: str
    spear: str
    threat: ThreatSpec
    attack: Attack[Any]
    spec: SpearSpec
    fallback: bool = False

    @property
    def core_threat(self) -> Threat:
        """The threat as the attacks understand it."""
        return Threat(self.threat.norm, self.threat.eps, self.threat.targeted)


@dataclass(frozen=True)
class Shard:
    """Samples `start` to `stop` of the run's data, the smallest unit that is written and resumed."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class Unit:
    """A piece of work that can be done alone, in any order and more than once: the clean pass or a cell on a shard."""

    shield: str
    cell: Cell | None
    shard: Shard

    @property
    def part(self) -> str:
        """The store's name for the result; the unit is finished exactly when that part exists."""
        folder = clean_folder(self.shield) if self.cell is None else f"records/{self.cell.name}"
        return f"{folder}/{part_name(self.shard.number)}.parquet"


@dataclass(frozen=True)
class Plan:
    """All cells of a recipe and its shards over `samples` samples."""

    recipe: Recipe
    cells: tuple[Cell, ...]
    samples: int

    @property
    def shards(self) -> list[Shard]:
        """The shards in order; the last may be shorter."""
        size = self.recipe.shard_size
        return [
            Shard(number, start, min(start + size, self.samples))
            for number, start in enumerate(range(0, self.samples, size))
        ]

    def clean_units(self) -> Iterator[Unit]:
        """Yield the clean passes: once per shield and shard, shared by all cells of the shield."""
        for shield in self.recipe.shields:
            for shard in self.shards:
                yield Unit(shield.label, None, shard)

    def attack_units(self) -> Iterator[Unit]:
        """Yield every cell on every shard, cell by cell."""
        for cell in self.cells:
            for shard in self.shards:
                yield Unit(cell.shield, cell, shard)


def make_plan(recipe: Recipe, samples: int, shape: tuple[int, ...] | None = None) -> Plan:
    """Build and check every cell of `recipe` for `samples` samples of `shape` (without the batch axis).

    Raises InputError for unknown attacks and options, UnsupportedError for combinations that an attack does not
    offer. A spear restricted to some norms simply has no cell under the others, but must have one somewhere.
    """
    attacks = [build(spear) for spear in recipe.spears]
    cells: list[Cell] = []
    names: set[str] = set()
    for spear, attack in zip(recipe.spears, attacks, strict=True):
        threats = [threat for threat in recipe.threats if spear.norms is None or threat.norm in spear.norms]
        if not threats:
            reason = f"is restricted to {', '.join(spear.norms or ())} and no threat has such a norm"
            raise InputError(f"spear '{spear.label}'", reason, "add a threat or lift the restriction")
        for threat in threats:
            refuse_unsupported(spear, attack, threat, shape)
    for shield in recipe.shields:
        for threat in recipe.threats:
            for spear, attack in zip(recipe.spears, attacks, strict=True):
                if spear.norms is None or threat.norm in spear.norms:
                    name = _unique(cell_name(shield, spear, threat), names)
                    cells.append(Cell(name, shield.label, spear.label, threat, attack, spear))
    return Plan(recipe, tuple(cells), samples)


def build(spear: SpearSpec) -> Attack[Any]:
    """Return the attack of a spear; InputError names the nearest attack or option."""
    from maodun.attacks.registry import build_attack

    attack: Attack[Any] = build_attack(spear.attack, **spear.options)
    return attack


def estimator(spear: SpearSpec) -> Estimator:
    """Return the gradient estimator of a spear; InputError for options it does not have.

    Of one that leaves it to the plan (auto), before the shield is known: the exact gradient.
    """
    kinds: dict[str, Any] = {
        "auto": Exact,
        "exact": Exact,
        "bpda": BPDA,
        "surrogate": Surrogate,
        "adjoint": Adjoint,
        "nes": NES,
        "spsa": SPSA,
    }
    try:
        inner = kinds[spear.gradient](**spear.gradient_options)
    except TypeError as error:
        where = f"gradient_options of spear '{spear.label}'"
        remedy = "nes and spsa take samples and sigma, bpda every, surrogate and adjoint steps"
        raise InputError(where, str(error).rpartition(") ")[2], remedy) from None
    if spear.eot == 1:
        return inner  # type: ignore[no-any-return]
    if spear.gradient in ("nes", "spsa"):
        reason = f"cannot be averaged over {spear.eot} draws"
        raise UnsupportedError(f"gradient '{spear.gradient}'", reason, "raise its samples instead of eot")
    return EOT(inner, spear.eot)


def steps(attack: Attack[Any]) -> int:
    """Return the most steps one sample can take, 0 for a recipe of several attacks."""
    try:
        return attack.total_steps
    except NotImplementedError:
        return 0


def access(spear: SpearSpec, attack: Attack[Any]) -> str:
    """Return the oracle's access level: as asked for, else what the attack with this estimator needs."""
    if spear.access is not None:
        return spear.access
    return "scores" if spear.gradient in ("nes", "spsa") and attack.access == "gradient" else attack.access


def budget(spear: SpearSpec) -> Budget:
    """Return the spear's budget per sample."""
    limits = spear.budget
    return Budget(forwards=limits.forwards, backwards=limits.backwards, queries=limits.queries)


def refuse_unsupported(
    spear: SpearSpec, attack: Attack[Any], threat: ThreatSpec, shape: tuple[int, ...] | None
) -> None:
    """Raise UnsupportedError when a spear cannot be used under a threat or on samples of `shape`."""
    import torch

    if 0 in (spear.budget.queries, spear.budget.forwards):
        reason = "has a budget of 0, which pays for no query"
        raise InputError(f"spear '{spear.label}'", reason, "give 1 or more, or leave it out for no limit")
    core = Threat(threat.norm, threat.eps, threat.targeted)
    attack.check(torch.zeros((0, *(shape or (1, 8, 8)))), core)
    if attack.kind == "fixed" and math.isinf(threat.eps):
        reason = "searches inside a ball and was given no radius"
        raise UnsupportedError(f"attack '{attack.name}'", reason, "give eps, or use a minimum-norm attack")
    levels = ("decision", "scores", "gradient")
    needs, grants = estimator(spear).needs if attack.access == "gradient" else attack.access, access(spear, attack)
    if levels.index(grants) < levels.index(needs):
        reason = f"needs {needs} and is granted {grants} only"
        raise UnsupportedError(f"spear '{spear.label}'", reason, "use gradient nes or spsa, or a query attack")


def slug(text: str) -> str:
    """Return `text` as a file name of ASCII letters, digits, dots and dashes; never empty."""
    short = re.sub(r"[^A-Za-z0-9.]+", "-", text.replace("/", "_")).strip("-.").lower()
    return short[:60] or hashlib.sha256(text.encode()).hexdigest()[:8]


def clean_folder(shield: str) -> str:
    """Return the folder of a shield's clean pass; a digest keeps shields apart whose names slug alike."""
    return f"clean/{slug(shield)}-{hashlib.sha256(shield.encode()).hexdigest()[:6]}"


def cell_name(shield: ShieldSpec, spear: SpearSpec, threat: ThreatSpec) -> str:
    """Return a readable folder name such as none--pgd--linf-0.15."""
    radius = format_radius(threat.eps).replace("/", "-of-")
    targeted = f"-{threat.goal}" if threat.targeted else ""
    return f"{slug(shield.label)}--{slug(spear.label)}--{threat.norm}-{radius}{targeted}"


def _unique(name: str, taken: set[str]) -> str:
    number, candidate = 1, name
    while candidate in taken:
        number += 1
        candidate = f"{name}-{number}"
    taken.add(candidate)
    return candidate
