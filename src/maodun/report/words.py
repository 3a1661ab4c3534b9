"""How numbers, threats and levels are written: once, so that every format shows the same digits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from maodun.arena.recipe import format_radius

if TYPE_CHECKING:
    from collections.abc import Iterable

    from maodun.arena.summary import CellSummary, Finding, Rate, RunSummary, WorstCase

# The most urgent first: this is the order in which a reader should meet them.
LEVELS = ("alarm", "warning", "note", "ok")
NOTHING = "–"
_SIGNS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0", "flow": "flow"}


def percent(value: float, *, digits: int = 1) -> str:
    """Return a share in [0, 1] as per cent without the sign, "72.4"; a dash when there is no number."""
    return f"{100 * value:.{digits}f}" if math.isfinite(value) else NOTHING


def interval(rate: Rate) -> str:
    """Return the two ends of a rate's interval in per cent, "[69.5, 75.1]"."""
    return f"[{percent(rate.low)}, {percent(rate.high)}]"


def rate(value: Rate) -> str:
    """Return a rate with its interval, "72.4 % [69.5, 75.1]"; a dash when it has no samples."""
    if not value.n or not math.isfinite(value.value):
        return NOTHING
    return f"{percent(value.value)} % {interval(value)}"


def number(value: float | None, *, digits: int = 4) -> str:
    """Return a number with `digits` significant digits, whole numbers whole; a dash for None, NaN and infinities."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def threat(norm: str, eps: float | None, *, targeted: bool = False) -> str:
    """Return a threat in plain words of the recipe, "linf 8/255" or "l2 any radius targeted"."""
    radius = "any radius" if eps is None or math.isinf(eps) else format_radius(eps)
    return f"{norm} {radius}" + (" targeted" if targeted else "")


def threat_sign(norm: str, eps: float | None, *, targeted: bool = False) -> str:
    """Return a threat as a formula for a page, "L∞ ≤ 8/255" or "L2, any radius, targeted"."""
    sign = norm_sign(norm)
    text = f"{sign}, any radius" if eps is None or math.isinf(eps) else f"{sign} ≤ {format_radius(eps)}"
    return text + (", targeted" if targeted else "")


def norm_sign(norm: str) -> str:
    """Return a norm as a formula, "L∞"; an unknown name as it is."""
    return _SIGNS.get(norm, norm)


def count(number_of: int, singular: str, plural: str | None = None) -> str:
    """Return a number with its noun, "1 alarm" or "3 alarms"."""
    return f"{number_of} {singular if number_of == 1 else plural or singular + 's'}"


def statuses(cell: CellSummary) -> str:
    """Return how the searches of a cell ended, the most frequent first: "found 512, exhausted steps 488"."""
    ordered = sorted(cell.statuses.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{name.replace('_', ' ')} {total}" for name, total in ordered if total)


def shorter(specifications: Iterable[str]) -> str:
    """Return model specifications without their kinds, "cifar10-vgg + cifar10-densenet"."""
    return " + ".join(spec.partition(":")[2] or spec for spec in specifications)


def rule(cell: CellSummary) -> str:
    """Return the verdict's rule with its draws, "majority of 10" or "single"."""
    return cell.rule if cell.draws <= 1 else f"{cell.rule} of {cell.draws}"


def members(summary: RunSummary, worst: WorstCase) -> list[CellSummary]:
    """Return the cells that a worst case is taken over."""
    place = (worst.shield, worst.norm, worst.eps, worst.targeted)
    return [cell for cell in summary.cells if (cell.shield, cell.norm, cell.eps, cell.targeted) == place]


def by_urgency(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings with alarms first; within a level in the order given."""
    place = {level: number for number, level in enumerate(LEVELS)}
    return sorted(findings, key=lambda finding: place.get(finding.level, len(LEVELS)))


def merged(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Return the findings by urgency, those of one check about one shield with one next action together."""
    groups: dict[tuple[str, str, str, str], list[Finding]] = {}
    for finding in by_urgency(findings):
        groups.setdefault((finding.level, finding.shield, finding.name, finding.action), []).append(finding)
    return list(groups.values())


def concerns(summary: RunSummary, shield: str, level: str) -> list[Finding]:
    """Return the findings of one level about one shield."""
    return [finding for finding in summary.findings if finding.shield == shield and finding.level == level]
