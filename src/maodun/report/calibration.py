"""Does confidence mean anything, as a table: one line per set of inputs, clean first, for the page and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maodun.report.words import NOTHING, number, percent, threat

if TYPE_CHECKING:
    from maodun.arena.calibrated import Calibration
    from maodun.arena.summary import RunSummary


@dataclass(frozen=True)
class Line:
    """The calibration `what` of a shield on one set of inputs, which `inputs` names: "clean", or a spear."""

    shield: str
    inputs: str
    threat: str
    what: Calibration


def lines(summary: RunSummary) -> list[Line]:
    """Return a line per shield for its clean inputs and one per cell for the attacked ones, in the run's order."""
    found = []
    for shield in dict.fromkeys(cell.shield for cell in summary.cells):
        own = [cell for cell in summary.cells if cell.shield == shield]
        clean = next((cell.calibration_clean for cell in own if cell.calibration_clean is not None), None)
        if clean is not None:
            found.append(Line(shield, "clean", "", clean))
        for cell in own:
            if cell.calibration_adversarial is not None:
                where = threat(cell.norm, cell.eps, targeted=cell.targeted)
                found.append(Line(shield, cell.spear, where, cell.calibration_adversarial))
    return found


HEADERS = ("accuracy %", "confidence %", "ECE", "over", "under", "NLL", "AUROC", "best T, clean", "ECE after")


def spelled(line: Line) -> tuple[str, ...]:
    """Return a line's numbers as words, one for each of HEADERS; ECE, over and under with their intervals."""
    what = line.what
    after = what.after("clean")
    return (
        _percent(what.accuracy),
        _percent(what.confidence),
        *(spanned(what, key) for key in ("ece", "over", "under")),
        number(what.nll, digits=3),
        number(what.auroc, digits=3),
        number(after.temperature if after else None, digits=3),
        number(after.ece if after else None, digits=3),
    )


def spanned(what: Calibration, key: str) -> str:
    """Return a calibration error with its bootstrap interval, ".061 [.048, .077]"."""
    value = getattr(what, key)
    if value is None:
        return NOTHING
    ends = what.intervals.get(key)
    return _short(value) + ("" if ends is None else f" [{_short(ends[0])}, {_short(ends[1])}]")


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return NOTHING if value is None else percent(value)
