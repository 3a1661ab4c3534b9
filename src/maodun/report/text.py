"""The table of a text experiment, for a terminal or a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from maodun.arena.text_compare import Line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

HEADERS = ("attack", "run", "stands [95 %]", "per seed", "minus reference [95 %]", "p", "n")


def words(line: Line) -> tuple[str, ...]:
    """Return one line of the table as text."""
    share = f"{line.share:.3f} [{line.low:.3f}, {line.high:.3f}]"
    seeds = " ".join(f"{each:.3f}" for each in line.seeds)
    gap, p = "", ""
    if line.gap is not None:
        gap, p = f"{line.gap:+.3f} [{line.gap_low:+.3f}, {line.gap_high:+.3f}]", f"{line.p:.2g}"
    return line.attack, line.run, share, seeds, gap, p, str(line.n)


def to_table(lines: Sequence[Line]) -> Table:
    """Return the lines as a table for a terminal."""
    from rich.table import Table as RichTable

    table = RichTable(title="Sentences answered rightly")
    for header in HEADERS:
        table.add_column(header)
    for line in lines:
        table.add_row(*words(line))
    return table


def to_markdown(lines: Sequence[Line]) -> str:
    """Return the lines as a Markdown table."""
    rows = [HEADERS, ("---",) * len(HEADERS), *(words(line) for line in lines)]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)
