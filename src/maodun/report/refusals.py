"""What refusing to answer cost and bought, as a table: a line per spear, for the page and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from maodun.report.words import NOTHING, number, percent, rate, threat

if TYPE_CHECKING:
    from maodun.arena.summary import Rejection, RunSummary


@dataclass(frozen=True)
class Line:
    """The refusals `what` of a shield under a spear."""

    shield: str
    spear: str
    threat: str
    what: Rejection


HEADERS = ("answers clean", "right of these", "risk, surest half", "answers changed", "usable", "AUROC")


def lines(summary: RunSummary) -> list[Line]:
    """Return a line per cell of a shield that may refuse to answer, in the run's order."""
    return [
        Line(cell.shield, cell.spear, threat(cell.norm, cell.eps, targeted=cell.targeted), cell.rejection)
        for cell in summary.cells
        if cell.rejection is not None
    ]


def spelled(line: Line) -> tuple[str, ...]:
    """Return a line's numbers as words, one for each of HEADERS; rates with their intervals."""
    what = line.what
    half = next((risk for coverage, risk in what.risk if coverage >= 0.5), None)
    return (
        rate(what.coverage),
        rate(what.accuracy),
        NOTHING if half is None else f"{percent(half)} %",
        rate(what.accepted),
        rate(what.usable),
        number(what.auroc, digits=3),
    )


__all__ = ["HEADERS", "Line", "lines", "spelled"]
