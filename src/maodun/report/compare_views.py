"""A comparison of two runs as a terminal table, Markdown, and a page."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from maodun.report.compare import significant
from maodun.report.exports import markdown_escape, markdown_table
from maodun.report.files import write_text
from maodun.report.html import package_version, page
from maodun.report.words import NOTHING, percent

if TYPE_CHECKING:
    from pathlib import Path

    from maodun.report.compare import Comparison, Pair

_HEADERS = (
    *("shield", "spear", "threat", "n", "first %", "second %", "difference [95 %]"),
    *("gained", "lost", "p (exact)", "p (Holm)", "note"),
)
_RIGHT = 3


def points(value: float | None) -> str:
    """Return a difference of shares as signed percentage points, "+3.2"; no sign on zero, a dash for None."""
    if value is None:
        return NOTHING
    text = f"{100 * value:+.1f}"
    return "0.0" if text in {"+0.0", "-0.0"} else text.replace("-", "−")


def chance(value: float | None) -> str:
    """Return a p-value as people write it: "0.013", "< 0.001", "1"."""
    if value is None:
        return NOTHING
    if value < 0.001:
        return "< 0.001"
    return "1" if value > 0.9995 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"


def footnotes(comparison: Comparison) -> dict[str, int]:
    """Return the rows' notes with their numbers, from 1, in order of first appearance."""
    notes = dict.fromkeys(pair.note for pair in comparison.pairs if pair.note)
    return {note: number for number, note in enumerate(notes, start=1)}


def spelled(pair: Pair, notes: dict[str, int]) -> tuple[str, ...]:
    """Return a row's twelve words, the same in every format; the last one is its footnote's number."""
    note = f"[{notes[pair.note]}]" if pair.note else ""
    spear = pair.spear if pair.reference else f"{pair.spear} *"
    head = (pair.shield, spear, pair.threat)
    if pair.difference is None:
        return (*head, *([NOTHING] * 8), note)
    return (
        *head,
        str(pair.n),
        percent(pair.first if pair.first is not None else float("nan")),
        percent(pair.second if pair.second is not None else float("nan")),
        f"{points(pair.difference)} [{points(pair.low)}, {points(pair.high)}]",
        str(pair.gained),
        str(pair.lost),
        chance(pair.p_value),
        chance(pair.p_adjusted),
        note,
    )


def explanation(comparison: Comparison) -> list[str]:
    """Return the sentences that say how to read the table."""
    reading = (
        "Differences are second minus first in percentage points over the samples that both runs judged; "
        "gained samples stand in the second run only, lost in the first only."
    )
    methods = (
        f"Intervals: paired bootstrap, {comparison.draws} draws, seed {comparison.seed}. "
        "p: McNemar's exact test, per row and corrected for all rows (Holm)."
    )
    names = f"first: {comparison.first}; second: {comparison.second}"
    below = [f"[{number}] {note}" for note, number in footnotes(comparison).items()]
    return [names, reading, methods, *comparison.notes, *below]


def to_table(comparison: Comparison) -> Table:
    """Return the comparison as a Rich table; rows whose corrected p-value is at most 0.05 are bold."""
    table = Table(title="second run minus first run", title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    notes = footnotes(comparison)
    headers = _HEADERS if notes else _HEADERS[:-1]
    for place, header in enumerate(headers):
        right = place >= _RIGHT
        table.add_column(header, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for pair in comparison.pairs:
        style = "bold" if significant(pair) else "dim" if pair.difference is None else ""
        table.add_row(*(Text(word) for word in spelled(pair, notes)[: len(headers)]), style=style)
    table.caption = Text("\n".join(explanation(comparison)))
    table.caption_justify = "left"
    return table


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as a Markdown table with the reading notes below."""
    notes = footnotes(comparison)
    table = markdown_table(_HEADERS, [spelled(pair, notes) for pair in comparison.pairs], _RIGHT)
    return table + "\n" + "\n\n".join(markdown_escape(line) for line in explanation(comparison)) + "\n"


def comparison_html(comparison: Comparison) -> str:
    """Return the comparison as one self-contained page without scripts; raises InputError without Jinja2."""
    notes = footnotes(comparison)
    ends = [abs(value) for pair in comparison.pairs for value in (pair.low, pair.high) if value is not None]
    # A scale of whole tens of points, so that a tiny difference does not fill the width.
    reach = max(0.05, -(-max(ends, default=0.0) // 0.1) * 0.1)

    def place(value: float | None) -> str:
        return f"{50 + 50 * (value or 0.0) / reach:.2f}"

    lines: list[dict[str, Any]] = [
        {
            "words": spelled(pair, notes),
            "significant": significant(pair),
            "measured": pair.difference is not None,
            "low": place(pair.low),
            "high": place(pair.high),
            "middle": place(pair.difference),
            "width": f"{50 * ((pair.high or 0.0) - (pair.low or 0.0)) / reach:.2f}",
        }
        for pair in comparison.pairs
    ]
    content = {
        "lines": [(name, list(group)) for name, group in groupby(lines, key=lambda line: line["words"][0])],
        "reach": f"{100 * reach:.0f}",
        "explanation": explanation(comparison),
        "version": package_version(),
    }
    return page("compare.html.j2", content, [])


def write_comparison(comparison: Comparison, out_path: str | Path) -> Path | str:
    """Write the comparison as HTML, or as Markdown when `out_path` ends in .md; returns the path.

    Raises InputError when the place cannot be written.
    """
    markdown = str(out_path).lower().endswith(".md")
    return write_text(out_path, to_markdown(comparison) if markdown else comparison_html(comparison))
