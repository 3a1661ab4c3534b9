"""Charts as static SVG: for pages without scripts, for print, and until Plotly has drawn."""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING

from maodun.report.charts import MARKERS, Chart, Line, Style

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, HEIGHT = 360, 257
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 22, 44
_CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
    "triangle-up": ((0, -1.2), (1.2, 1), (-1.2, 1)),
    "triangle-down": ((0, 1.2), (1.2, -1), (-1.2, -1)),
}
_DASHES = {"solid": "", "dash": "7 4", "dot": "2 4", "dashdot": "7 4 2 4"}


def ticks(top: float, wanted: int = 5) -> list[float]:
    """Return round numbers from 0 to at most `top` (> 0), about `wanted` steps of 1, 2 or 5 times a power of ten."""
    raw = top / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    return [step * place for place in range(int(top / step * (1 + 1e-9)) + 1)]


def to_svg(chart: Chart) -> str:
    """Return the chart as an SVG element of WIDTH x HEIGHT units that scales to its box; user text is escaped."""

    def across(value: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * value / chart.x_max

    def down(value: float) -> float:
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * value / chart.y_max

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}" class="chart">',
        *_axes(chart, across, down),
    ]
    if chart.diagonal:
        parts.append(_segment(across(0), down(0), across(chart.x_max), down(chart.y_max), "mark"))
    for x, label in chart.marks:
        parts.append(_segment(across(x), down(0), across(x), _TOP, "mark"))
        parts.append(f'<text x="{across(x):.1f}" y="{_TOP - 7}" class="middle">{escape(label)}</text>')
    parts.extend(_line(line, across, down) for line in chart.lines)
    return "".join([*parts, "</svg>"])


def _segment(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _axes(chart: Chart, across: Callable[[float], float], down: Callable[[float], float]) -> list[str]:
    parts = []
    for value in ticks(chart.y_max):
        parts.append(_segment(_LEFT, down(value), WIDTH - _RIGHT, down(value), "grid"))
        parts.append(f'<text x="{_LEFT - 7}" y="{down(value) + 4:.1f}" class="end">{value:g}</text>')
    for value in ticks(chart.x_max):
        parts.append(_segment(across(value), down(0), across(value), down(0) + 4, "grid"))
        parts.append(f'<text x="{across(value):.1f}" y="{down(0) + 17:.1f}" class="middle">{value:.4g}</text>')
    middle = (WIDTH + _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" class="middle">{escape(chart.x_title)}</text>')
    height = (HEIGHT + _TOP - _BOTTOM) / 2
    turned = f'transform="rotate(-90 13 {height})"'
    parts.append(f'<text x="13" y="{height}" class="middle" {turned}>{escape(chart.y_title)}</text>')
    return parts


def _line(line: Line, across: Callable[[float], float], down: Callable[[float], float]) -> str:
    points = [(across(x), down(y)) for x, y in zip(line.x, line.y, strict=True)]
    corners = [(x, before) for (_, before), (x, _) in pairwise(points)] if line.steps else []
    # A step first runs level to the next point's x, then falls to its y.
    drawn = (
        [point for pair in zip_longest(points, corners) for point in pair if point is not None] if corners else points
    )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    dash = _DASHES[line.style.dash]
    parts = [f"<g><title>{escape(line.name)}</title>"]
    pen = f'fill="none" stroke="{line.style.colour}" stroke-width="2" stroke-dasharray="{dash}"'
    parts.append(f'<polyline points="{path}" {pen}/>')
    sizes = line.sizes or (7.0,) * len(points)
    step = 1 if line.sizes else -(-len(points) // MARKERS) or 1
    shown = list(zip(points, sizes, strict=True))[::step]
    parts.extend(symbol(line.style, x, y, size / 2) for (x, y), size in shown)
    return "".join([*parts, "</g>"])


def symbol(style: Style, x: float, y: float, r: float) -> str:
    """Return a marker of radius `r` centred at (x, y)."""
    fill = f'fill="{style.colour}" fill-opacity="0.85"'
    if style.symbol == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}" {fill}/>'
    corners = _CORNERS.get(style.symbol)
    if corners is not None:
        path = " ".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners)
        return f'<polygon points="{path}" {fill}/>'
    strokes = [(-1, 0, 1, 0), (0, -1, 0, 1)] if style.symbol == "cross" else [(-1, -1, 1, 1), (-1, 1, 1, -1)]
    path = " ".join(f"M{x + r * a:.1f} {y + r * b:.1f}L{x + r * c:.1f} {y + r * d:.1f}" for a, b, c, d in strokes)
    return f'<path d="{path}" stroke="{style.colour}" stroke-width="2.4" fill="none"/>'


def sample(style: Style) -> str:
    """Return a small SVG of a line with its marker, for a legend."""
    dash = _DASHES[style.dash]
    line = f'<line x1="1" y1="8" x2="31" y2="8" stroke="{style.colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
    return f'<svg width="32" height="16" viewBox="0 0 32 16" aria-hidden="true">{line}{symbol(style, 16, 8, 4)}</svg>'
