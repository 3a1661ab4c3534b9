"""The ladder for a terminal and a page: rungs down, rules across, costs beside them, resubmission as a chart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from maodun.report.charts import Chart, Line, style
from maodun.report.words import NOTHING, interval, number, percent, threat, threat_sign

if TYPE_CHECKING:
    from maodun.arena.summary import Ladder, LadderRow, RunSummary

RULES = ("single", "mean", "majority", "worst")


def name(row: LadderRow) -> str:
    """Return a rung's number and the spear on it, "4 APGD-CE"."""
    return row.title if row.rung < 0 else f"{row.rung} {row.spear}"


def numbers(ladder: Ladder) -> str:
    """Return how many draws the rules use, "majority and worst of 50 fresh draws"."""
    return f"majority and worst of {max(row.draws for row in ladder.rows)} fresh draws"


def ladder_tables(summary: RunSummary) -> list[Table]:
    """Return a table per ladder: robust accuracy under every rule with its interval, and the costs."""
    made = []
    for ladder in summary.ladders:
        title = f"ladder of {ladder.shield}, {threat(ladder.norm, ladder.eps, targeted=ladder.targeted)}: robust, %"
        table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
        table.add_column("rung", overflow="fold")
        for header in (*RULES, "s / image", "NFE / image", "MiB"):
            table.add_column(header, justify="right")
        for row in ladder.rows:
            rates = [getattr(row, rule) for rule in RULES]
            words = [Text(f"{percent(each.value)} {interval(each)}") for each in rates]
            costs = [NOTHING] * 3 if row.rung < 0 else [number(row.seconds, digits=3), number(row.nfe), _memory(row)]
            table.add_row(Text(name(row)), *words, *costs)
            if row.known is not None:
                known = f"in the draw that was known: {percent(row.known.value)} {interval(row.known)}"
                table.add_row(Text(known, style="dim"))
        knew = any(row.known is not None for row in ladder.rows)
        table.caption = numbers(ladder) + ("; who knew one draw is judged by others" if knew else "")
        made.append(table)
    return made


def _memory(row: LadderRow) -> str:
    return NOTHING if row.memory is None else number(row.memory, digits=3)


def resubmission_charts(summary: RunSummary) -> list[Chart]:
    """Return a chart per ladder: robust accuracy against free tries R, a line per rung, on an axis from 0."""
    found = []
    for ladder in summary.ladders:
        if max(len(row.resubmission) for row in ladder.rows) < 2:
            continue
        lines = tuple(
            Line(
                name(row),
                tuple(float(tries) for tries, _ in row.resubmission),
                tuple(100 * value for _, value in row.resubmission),
                style(place),
            )
            for place, row in enumerate(ladder.rows)
        )
        top = max(line.x[-1] for line in lines)
        title = f"{ladder.shield}, {threat_sign(ladder.norm, ladder.eps, targeted=ladder.targeted)}"
        found.append(Chart(title, "free tries R", "robust accuracy, %", top, 100.0, lines))
    return found
