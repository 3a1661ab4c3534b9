"""Diagnoses for a terminal and a page: the verdict, every trial beside the plain attack, a slice of the surface."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from rich import box as boxes
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maodun.report.words import interval, percent, threat

if TYPE_CHECKING:
    from maodun.arena.summary import Diagnosis, RunSummary, Surface, Trial

LEVELS = {"holds": "ok", "not shown": "warning", "masked": "alarm"}
_STYLES = {"holds": "green", "not shown": "yellow", "masked": "bold red"}
SIDE, _MARGIN = 260, 34
# Two ramps that differ in lightness as well as in hue: right answers towards blue, mistakes towards orange.
_RIGHT, _WRONG, _MIDDLE = (33, 102, 172), (200, 80, 20), (247, 247, 247)


def weight(trial: Trial) -> str:
    """Return what a trial says against the plain attack: "fells 12 more (p = 0.0002)"."""
    if trial.only <= trial.missed:
        return "no more" if trial.only == 0 else f"{trial.only} others, misses {trial.missed}"
    gain = f"{trial.only} more" + (f", misses {trial.missed}" if trial.missed else "")
    return f"{gain} (p = {trial.p:.2g})"


def diagnosis_views(summary: RunSummary) -> list[RenderableType]:
    """Return, per diagnosis, the verdict with its sentence and a table of the trials; nothing for a run without any."""
    made: list[RenderableType] = []
    for one in summary.diagnoses:
        head = Text(f"{one.shield}, {threat(one.norm, one.eps)}: ", style="bold")
        head.append(f"{one.sentence} {one.action}".rstrip(), style=_STYLES[one.verdict])
        table = Table(title_justify="left", box=boxes.SIMPLE_HEAD, header_style="bold")
        table.add_column("trial", overflow="fold")
        table.add_column("what it mends", overflow="fold")
        table.add_column("standing, % [95 %]", justify="right")
        table.add_column("than the plain attack", justify="right")
        plain = Text(f"{percent(one.plain.value)} {interval(one.plain)}")
        table.add_row("plain", "nothing: PGD on the cross-entropy", plain, "")
        for trial in one.trials:
            standing = Text(f"{percent(trial.standing.value)} {interval(trial.standing)}")
            table.add_row(Text(trial.name), Text(trial.mends), standing, Text(weight(trial)))
        table.add_row(Text("all together", style="bold"), "", Text(f"{percent(one.bound.value)} {interval(one.bound)}"))
        made.append(Group(head, table))
    return made


def surface_svg(surface: Surface) -> str:
    """Return a slice of the margin as a square SVG: blue where the answer is right, orange where it is wrong.

    The square in the middle is the ball of the threat; the axes are in its radii.
    """
    side = len(surface.places)
    cell = SIDE / side
    largest = max((abs(value) for row in surface.margins for value in row), default=0.0) or 1.0
    box, label = f"0 0 {SIDE + _MARGIN} {SIDE + _MARGIN}", f"margins around sample {surface.sample_id}"
    parts = [f'<svg viewBox="{box}" role="img" class="chart" aria-label="{label}">']
    for down, row in enumerate(surface.margins):
        for across, value in enumerate(row):
            x, y = _MARGIN + across * cell, down * cell
            size = f'width="{cell + 0.3:.2f}" height="{cell + 0.3:.2f}"'
            parts.append(f'<rect x="{x:.2f}" y="{y:.2f}" {size} fill="{_colour(value / largest)}"/>')
    quarter, half = SIDE / 4, SIDE / 2
    ball = f'x="{_MARGIN + quarter:.1f}" y="{quarter:.1f}" width="{half:.1f}" height="{half:.1f}"'
    parts.append(f'<rect {ball} fill="none" stroke="#111" stroke-dasharray="4 3"/>')
    parts.append(f'<circle cx="{_MARGIN + half:.1f}" cy="{half:.1f}" r="3" fill="#111"/>')
    parts.append(f'<text x="{_MARGIN + half:.1f}" y="{SIDE + 22}" class="middle">{escape("a random direction")}</text>')
    turned = f'transform="rotate(-90 16 {half:.1f})"'
    parts.append(f'<text x="16" y="{half:.1f}" class="middle" {turned}>up the gradient</text>')
    return "".join([*parts, "</svg>"])


def _colour(share: float) -> str:
    """Return a colour for a margin as a share of the largest; the root brings out what is near the boundary."""
    end = _WRONG if share > 0 else _RIGHT
    depth = min(1.0, abs(share)) ** 0.5
    red, green, blue = (round(low + depth * (high - low)) for low, high in zip(_MIDDLE, end, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def shown(summary: RunSummary) -> list[tuple[Diagnosis, str, list[tuple[Trial, str]], str]]:
    """Return for the page: diagnoses with the badge's level, trials with what they say, and the slice as SVG."""
    return [
        (one, LEVELS[one.verdict], [(trial, weight(trial)) for trial in one.trials], surface_svg(one.surface))
        for one in summary.diagnoses
    ]
