"""A run's summary arranged for a page: verdicts, matrices, colours; no markup and no file access here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from maodun.report.words import concerns, count, members, percent, rule, shorter, threat_sign

if TYPE_CHECKING:
    from collections.abc import Sequence

    from maodun.arena.summary import CellSummary, Rate, RunSummary, WorstCase

# One hue from pale to deep: the order survives grey print and every kind of colour vision.
_RAMP = ((246, 249, 253), (205, 222, 240), (133, 176, 217), (52, 116, 178), (8, 48, 107))
# Black and no softer ink: only the widest pair leaves 4.5 to one for every shade between.
_INK, _PAPER = "#000000", "#ffffff"


def heat(value: float) -> tuple[str, str]:
    """Return (background, text) colours for a share in [0, 1]: deeper means more is standing, text always legible.

    The text is the one of black and white with the higher WCAG contrast, at least 4.5 everywhere.
    """
    if not math.isfinite(value):
        return "#f1f3f6", _INK
    place = min(max(value, 0.0), 1.0) * (len(_RAMP) - 1)
    left = min(int(place), len(_RAMP) - 2)
    mix = place - left
    colour = tuple(round(a + (b - a) * mix) for a, b in zip(_RAMP[left], _RAMP[left + 1], strict=True))
    background = "#" + "".join(f"{channel:02x}" for channel in colour)
    return background, max((_INK, _PAPER), key=lambda ink: contrast(background, ink))


def contrast(first: str, second: str) -> float:
    """Return the WCAG 2 contrast ratio of two #rrggbb colours, in [1, 21]."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@dataclass(frozen=True)
class Judgement:
    """The headline about a shield under one threat; `reference` False when reduced precision took part."""

    threat: str
    worst: WorstCase
    spears: int
    reference: bool


@dataclass(frozen=True)
class ShieldVerdict:
    """All headlines about one shield, with the number of alarms and warnings against believing them."""

    shield: str
    judgements: tuple[Judgement, ...]
    alarms: int
    warnings: int


def verdicts(summary: RunSummary) -> list[ShieldVerdict]:
    """Return the headlines, one entry per shield in order of appearance."""
    found = []
    for shield in dict.fromkeys(worst.shield for worst in summary.worst):
        judgements = []
        for worst in summary.worst:
            if worst.shield == shield:
                cells = members(summary, worst)
                reference = all(cell.reference for cell in cells)
                judgements.append(
                    Judgement(threat_sign(worst.norm, worst.eps, targeted=worst.targeted), worst, len(cells), reference)
                )
        alarms, warnings = (len(concerns(summary, shield, level)) for level in ("alarm", "warning"))
        found.append(ShieldVerdict(shield, tuple(judgements), alarms, warnings))
    return found


def sentence(shield: str, judgement: Judgement) -> str:
    """Return the verdict as one plain sentence, as read out by a screen reader or pasted into a mail."""
    worst = judgement.worst
    robust = worst.robust
    if not robust.n or not math.isfinite(robust.value):
        return f"{shield}: nothing was measured under {judgement.threat} yet."
    against = f"all {judgement.spears} spears" if judgement.spears > 1 else "its one spear"
    text = (
        f"{shield} keeps {percent(robust.value)} % [{percent(robust.low)}, {percent(robust.high)}] of its predictions "
        f"under {judgement.threat} against {against} (clean {percent(worst.clean.value)} %, n = {robust.n})"
    )
    return text + (f"; the strongest is {worst.strongest}." if worst.strongest else ".")


@dataclass(frozen=True)
class Entry:
    """One field of a matrix: a rate in its colours; `link` is the number of the cell its provenance is under."""

    rate: Rate
    background: str
    ink: str
    strongest: bool = False
    reference: bool = True
    link: int | None = None
    hint: str = ""


@dataclass(frozen=True)
class Matrix:
    """Spears down, shields across, under one threat; `clean` and `worst` are the rows around it."""

    title: str
    shields: tuple[str, ...]
    clean: tuple[Entry | None, ...]
    rows: tuple[tuple[str, tuple[Entry | None, ...]], ...]
    worst: tuple[Entry | None, ...]
    all_reference: bool


def _entry(
    rate: Rate, *, strongest: bool = False, reference: bool = True, link: int | None = None, hint: str = ""
) -> Entry:
    background, ink = heat(rate.value)
    return Entry(rate, background, ink, strongest, reference, link, hint)


def _strongest(cells: Sequence[CellSummary]) -> set[str]:
    """Return the ids of the cells with the lowest robust accuracy of their shield, none when all are equal."""
    values = [cell.robust.value for cell in cells if math.isfinite(cell.robust.value)]
    if len(set(values)) < 2:
        return set()
    return {cell.cell for cell in cells if cell.robust.value == min(values)}


def matrices(summary: RunSummary) -> list[Matrix]:
    """Return one matrix of robust accuracies per threat, in order of appearance."""
    numbers = {cell.cell: place for place, cell in enumerate(summary.cells)}
    found = []
    for norm, eps, targeted in dict.fromkeys((cell.norm, cell.eps, cell.targeted) for cell in summary.cells):
        here = [cell for cell in summary.cells if (cell.norm, cell.eps, cell.targeted) == (norm, eps, targeted)]
        shields = tuple(dict.fromkeys(cell.shield for cell in here))
        by_place = {(cell.spear, cell.shield): cell for cell in here}
        leaders = {name for shield in shields for name in _strongest([cell for cell in here if cell.shield == shield])}

        def entry(cell: CellSummary | None, leaders: set[str] = leaders) -> Entry | None:
            if cell is None:
                return None
            hint = f"{cell.shield} against {cell.spear}: n = {cell.robust.n}, rule {rule(cell)}"
            link = numbers[cell.cell]
            return _entry(cell.robust, strongest=cell.cell in leaders, reference=cell.reference, link=link, hint=hint)

        rows = tuple(
            (spear, tuple(entry(by_place.get((spear, shield))) for shield in shields))
            for spear in dict.fromkeys(cell.spear for cell in here)
        )
        found.append(
            Matrix(
                title=threat_sign(norm, eps, targeted=targeted),
                shields=shields,
                clean=tuple(_entry(next(cell.clean for cell in here if cell.shield == shield)) for shield in shields),
                rows=rows,
                worst=tuple(_worst(summary, here, shield) for shield in shields),
                all_reference=all(cell.reference for cell in here),
            )
        )
    return found


@dataclass(frozen=True)
class Transferred:
    """One field of a transfer matrix: attack success in its colours, with a mark where nothing was transferred."""

    entry: Entry
    white_box: bool


@dataclass(frozen=True)
class Transfer:
    """Searches down, targets across, under one threat: `clean` errors in per cent, rows of (attack, surrogates, fields,
    black-box mean).
    """

    title: str
    targets: tuple[tuple[str, Rate], ...]
    rows: tuple[tuple[str, str, tuple[Transferred | None, ...], float | None], ...]


def transfers(summary: RunSummary) -> list[Transfer]:
    """Return one transfer matrix per threat; a field is deeper the more samples are left standing."""
    numbers = {cell.cell: place for place, cell in enumerate(summary.cells)}

    def entry(cell: CellSummary | None) -> Transferred | None:
        if cell is None:
            return None
        rate = cell.asr_correct
        background, ink = heat(1.0 - rate.value if rate.n else math.nan)
        hint = f"{cell.spear} against {cell.shield}: n = {rate.n}, rule {rule(cell)}"
        field = Entry(rate, background, ink, reference=cell.reference, link=numbers[cell.cell], hint=hint)
        return Transferred(field, cell.white_box)

    return [
        Transfer(
            title=threat_sign(matrix.norm, matrix.eps, targeted=matrix.targeted),
            targets=tuple(zip(matrix.targets, matrix.clean, strict=True)),
            rows=tuple(
                (row.hooks, shorter(row.surrogates), tuple(entry(cell) for cell in row.cells), row.mean)
                for row in matrix.rows
            ),
        )
        for matrix in summary.transfer
    ]


def _worst(summary: RunSummary, cells: Sequence[CellSummary], shield: str) -> Entry | None:
    own = [cell for cell in cells if cell.shield == shield]
    found = next((worst for worst in summary.worst if own and own[0] in members(summary, worst)), None)
    if found is None:
        return None
    reference = all(cell.reference for cell in own)
    return _entry(found.robust, reference=reference, hint=f"{shield} against {count(len(own), 'spear')}")


def groups(summary: RunSummary) -> list[tuple[str, list[tuple[int, CellSummary]]]]:
    """Return the cells with their numbers, grouped under "shield, threat" in order of appearance."""
    found: dict[str, list[tuple[int, CellSummary]]] = {}
    for place, cell in enumerate(summary.cells):
        heading = f"{cell.shield}, {threat_sign(cell.norm, cell.eps, targeted=cell.targeted)}"
        found.setdefault(heading, []).append((place, cell))
    return list(found.items())


def key_number(place: int) -> str:
    """Return the id of a cell's row in the provenance table."""
    return f"cell-{place + 1}"
