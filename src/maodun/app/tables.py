"""A run's summary as tables and sentences for a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from maodun.arena.summary import CellSummary, Finding, Rate, RunSummary

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "alarm": "bold red"}


def console(*, error: bool = False) -> Console:
    """Return a console on standard output or error; wide when that is a file, so that no cell is folded."""
    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 140, highlight=False, soft_wrap=False)


def percent(rate: Rate) -> str:
    """Return a rate with its interval, in per cent: "72.4 % [69.5, 75.1]"."""
    return f"{100 * rate.value:.1f} % [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _radius(norm: str, eps: float | None) -> str:
    from maodun.arena.recipe import format_radius

    return f"{norm} {format_radius(eps)}"


def _calls(cell: CellSummary) -> str:
    parts = [f"{cell.forwards:.0f} f", f"{cell.backwards:.0f} b"]
    parts += [f"{cell.queries:.0f} q"] if cell.queries else []
    return " ".join(parts)


def cells_table(summary: RunSummary) -> Table:
    """Return a row per cell: clean and robust accuracy with intervals, median distance, calls, seconds."""
    table = Table(title=f"{summary.name}: robust accuracy per attack", title_justify="left", header_style="bold")
    for header in ("shield", "spear", "threat"):
        table.add_column(header, overflow="fold")
    for header in ("clean", "robust [95 %]", "median distance", "calls per sample", "seconds"):
        table.add_column(header, justify="right")
    for cell in summary.cells:
        spear = cell.spear if cell.reference else f"{cell.spear} *"
        distance = "" if cell.median_distance is None else f"{cell.median_distance:.4g}"
        threat = _radius(cell.norm, cell.eps) + (" targeted" if cell.targeted else "")
        table.add_row(
            cell.shield,
            spear,
            threat,
            percent(cell.clean),
            percent(cell.robust),
            distance,
            _calls(cell),
            f"{cell.seconds:.1f}",
        )
    if any(not cell.reference for cell in summary.cells):
        table.caption = "* searched in reduced precision: not a reference result"
    return table


def worst_table(summary: RunSummary) -> Table:
    """Return a row per shield and threat: what is left standing when every attack counts."""
    n = max((worst.robust.n for worst in summary.worst), default=0)
    table = Table(title=f"worst case over all attacks, n = {n}", title_justify="left", header_style="bold")
    for header in ("shield", "threat"):
        table.add_column(header, overflow="fold")
    for header in ("clean", "worst case [95 %]"):
        table.add_column(header, justify="right")
    table.add_column("strongest attack", overflow="fold")
    for worst in summary.worst:
        robust = Text(percent(worst.robust), style="bold")
        table.add_row(worst.shield, _radius(worst.norm, worst.eps), percent(worst.clean), robust, worst.strongest)
    return table


def finding_line(finding: Finding) -> Text:
    """Return a finding as a line: level, where, the sentence and the next action."""
    where = finding.shield + (f" / {finding.spear}" if finding.spear else "")
    line = Text(f"{finding.level}: ", style=_STYLES.get(finding.level, ""))
    return line.append(f"{where}: {finding.sentence} {finding.action}".rstrip(), style="default")


def print_summary(summary: RunSummary, *, findings: bool = True) -> None:
    """Print a run's cells, its worst cases, and the findings that ask for something to be done."""
    out = console()
    if summary.cells:
        out.print(cells_table(summary))
    if summary.worst:
        out.print(worst_table(summary))
    if findings:
        wanted = [finding for finding in summary.findings if finding.level != "ok"]
        for finding in wanted:
            out.print(finding_line(finding), soft_wrap=True)
        passed = len(summary.findings) - len(wanted)
        if summary.findings:
            out.print(f"checks: {passed} passed, {len(wanted)} worth a look", style="dim")
    if not summary.complete:
        out.print("this run is not complete: the same command line resumes it", style="yellow")
