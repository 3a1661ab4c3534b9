"""Charts as plain data: one description, drawn by Plotly where scripts run and as an SVG everywhere else."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from maodun.report.words import norm_sign, threat_sign

if TYPE_CHECKING:
    from collections.abc import Sequence

    from maodun.arena.summary import Curve, Reliability, RunSummary

# Okabe and Ito's colours, which people with any common colour blindness tell apart, without the pale yellow.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "x")
DASHES = ("solid", "dash", "dot", "dashdot")
# Colour alone does not tell lines apart for everyone, and a marker on every point of a long line hides it.
MARKERS = 12
_THIN = {"color": "#8a94a6", "dash": "dot", "width": 1}
_ABOVE = {"yref": "paper", "yanchor": "bottom", "showarrow": False, "font": {"size": 11}}
_ROBUST = "robust accuracy, %"


@dataclass(frozen=True)
class Style:
    """How a line looks: colour, marker and dash; no two styles share all three before the 28th."""

    colour: str
    symbol: str
    dash: str


@dataclass(frozen=True)
class Line:
    """One line: its name, x and y in the axes' units, its style, and optionally marker sizes in pixels and texts.

    `steps` holds each value until the next x, instead of a straight line between the points.
    """

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: Style
    sizes: tuple[float, ...] = ()
    texts: tuple[str, ...] = ()
    steps: bool = False


@dataclass(frozen=True)
class Chart:
    """A panel of lines; `marks` are labelled vertical lines, `diagonal` the line y = x."""

    title: str
    x_title: str
    y_title: str
    x_max: float
    y_max: float
    lines: tuple[Line, ...]
    marks: tuple[tuple[float, str], ...] = ()
    diagonal: bool = False


def style(place: int) -> Style:
    """Return the style of the series number `place`, the same on every chart of a page."""
    return Style(
        COLOURS[place % len(COLOURS)], SYMBOLS[place % len(SYMBOLS)], DASHES[place // len(COLOURS) % len(DASHES)]
    )


def styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a style per name, in order of first appearance."""
    return {name: style(place) for place, name in enumerate(dict.fromkeys(names))}


def _finite(x: Sequence[float], y: Sequence[float], scale: float = 1.0) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pairs = [(a, scale * b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    return tuple(a for a, _ in pairs), tuple(b for _, b in pairs)


def lowest(curves: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """Return the radii of all curves and, at each, the lowest robust accuracy any of them has shown up to there.

    A sample that fell at a smaller radius has fallen, so these values, and the steps between them, are never
    below the true worst case over the spears; a line through the points could be.
    """
    points = sorted(point for curve in curves for point in zip(*_finite(curve.eps, curve.robust), strict=True))
    least: dict[float, float] = {}
    running = math.inf
    for eps, robust in points:
        running = min(running, robust)
        least[eps] = running
    return list(least), list(least.values())


def security_charts(summary: RunSummary) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of robust accuracy against radius: across shields (one per norm), and per shield and norm."""
    spears = styles([*(cell.spear for cell in summary.cells), *(curve.spear for curve in summary.curves)])
    shields = styles([*summary.shields, *(curve.shield for curve in summary.curves)])
    across, single = [], []
    for norm in dict.fromkeys(curve.norm for curve in summary.curves):
        here = [curve for curve in summary.curves if curve.norm == norm]
        radii = [eps for curve in here for eps in curve.eps if math.isfinite(eps)]
        x_max = max(radii, default=1.0) or 1.0
        marks = _marks(summary, norm, x_max)
        names = list(dict.fromkeys(curve.shield for curve in here))
        x_title = f"radius ({norm_sign(norm)})"
        lines = []
        for name in names:
            own = [curve for curve in here if curve.shield == name]
            x, y = _finite(*lowest(own), scale=100)
            lines.append(Line(name, x, y, shields[name], steps=True))
            drawn = tuple(Line(each.spear, *_finite(each.eps, each.robust, 100), spears[each.spear]) for each in own)
            title = f"{name}, {norm_sign(norm)}"
            single.append(Chart(title, x_title, _ROBUST, x_max, 100.0, drawn, marks))
        if len(names) > 1:
            title = f"All shields, {norm_sign(norm)}: lowest value of each"
            across.append(Chart(title, x_title, _ROBUST, x_max, 100.0, tuple(lines), marks))
    return across, single


def _marks(summary: RunSummary, norm: str, x_max: float) -> tuple[tuple[float, str], ...]:
    radii = dict.fromkeys(cell.eps for cell in summary.cells if cell.norm == norm)
    inside = sorted(eps for eps in radii if eps is not None and 0 < eps <= x_max)
    return tuple((eps, threat_sign(norm, eps)) for eps in inside[:3])


def reliability_charts(summary: RunSummary) -> list[tuple[Chart, bool]]:
    """Return accuracy against confidence per shield: (chart, is it the shield's strongest spear) pairs.

    Each chart shows the clean predictions beside those under one spear; the next chart shows the same after the
    temperature that suits the clean ones. Marker areas grow with the share of samples in a bin, and empty bins are left
    out.
    """
    found = []
    for shield in dict.fromkeys(each.shield for each in summary.reliability):
        own = [each for each in summary.reliability if each.shield == shield]
        attacked = [each for each in own if each.kind != "clean"]
        threats = len({(each.norm, each.eps, each.targeted) for each in attacked})
        chosen = [each for each in attacked if _is_strongest(summary, each)] or attacked[:1]
        strongest = {(each.spear, each.norm, each.eps, each.targeted) for each in chosen}
        clean = [each for each in own if each.kind == "clean"]
        if not attacked:
            found += [(_reliability(_warm(shield, each), [("clean", each)]), True) for each in clean]
        for each in attacked:
            title = f"{shield}, {each.spear}"
            if threats > 1:
                title += f", {threat_sign(each.norm, each.eps, targeted=each.targeted)}"
            same = [one for one in clean if (one.temperature is None) == (each.temperature is None)]
            pairs = [*(("clean", one) for one in same[:1]), ("under attack", each)]
            main = (each.spear, each.norm, each.eps, each.targeted) in strongest
            found.append((_reliability(_warm(title, each), pairs), main))
    return found


def _warm(title: str, each: Reliability) -> str:
    """Return the title with the temperature, where there is one."""
    return title if each.temperature is None else f"{title}, after T = {each.temperature:.3g}"


def _is_strongest(summary: RunSummary, each: Reliability) -> bool:
    place = (each.shield, each.spear, each.norm, each.eps, each.targeted)
    return any(place == (one.shield, one.strongest, one.norm, one.eps, one.targeted) for one in summary.worst)


def _reliability(title: str, pairs: Sequence[tuple[str, Reliability]]) -> Chart:
    lines = []
    for name, each in pairs:
        total = max(sum(each.count), 1)
        bins = [
            (x, y, n)
            for x, y, n in zip(each.confidence, each.accuracy, each.count, strict=True)
            if n > 0 and math.isfinite(x) and math.isfinite(y)
        ]
        lines.append(
            Line(
                name,
                tuple(100 * x for x, _, _ in bins),
                tuple(100 * y for _, y, _ in bins),
                style(0 if name == "clean" else 1),
                tuple(5 + 13 * math.sqrt(n / total) for _, _, n in bins),
                tuple(f"{n} of {total} samples" for _, _, n in bins),
            )
        )
    return Chart(title, "confidence, %", "accuracy, %", 100.0, 100.0, tuple(lines), diagonal=True)


def to_plotly(chart: Chart) -> dict[str, Any]:
    """Return the data and layout that Plotly draws the chart from; user text is escaped for its pseudo-HTML."""
    data: list[dict[str, Any]] = []
    if chart.diagonal:
        ends = {"x": [0, chart.x_max], "y": [0, chart.y_max]}
        data.append({"type": "scatter", "mode": "lines", **ends, "line": _THIN, "hoverinfo": "skip"})
    data += [_trace(each) for each in chart.lines]
    return {"data": data, "layout": _layout(chart)}


def _trace(line: Line) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(line.name),
        "x": list(line.x),
        "y": list(line.y),
        "text": list(line.texts),
        "line": {
            "color": line.style.colour,
            "dash": line.style.dash,
            "width": 2,
            "shape": "hv" if line.steps else "linear",
        },
        "marker": {
            "symbol": line.style.symbol,
            "size": list(line.sizes) or 7,
            "opacity": 0.85,
            "maxdisplayed": 0 if line.sizes else MARKERS,
        },
        "hovertemplate": "%{x:.4g} → %{y:.1f} %" + ("<br>%{text}" if line.texts else ""),
        "hoverlabel": {"namelength": 40},
    }


def _layout(chart: Chart) -> dict[str, Any]:
    axis = {"gridcolor": "#e4e8ee", "zerolinecolor": "#c3cad5", "linecolor": "#c3cad5", "fixedrange": False}
    return {
        "margin": {"l": 52, "r": 14, "t": 22, "b": 46},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#26303e"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "modebar": {"bgcolor": "rgba(255,255,255,0.85)", "color": "#8a94a6", "activecolor": "#0b5c9e"},
        "showlegend": False,
        "dragmode": False,
        "hovermode": "closest",
        "xaxis": {**axis, "title": {"text": html.escape(chart.x_title)}, "range": [0, chart.x_max * 1.02]},
        "yaxis": {**axis, "title": {"text": html.escape(chart.y_title)}, "range": [-2, chart.y_max * 1.03]},
        "shapes": [
            {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": _THIN} for x, _ in chart.marks
        ],
        "annotations": [{"x": x, "y": 1, "text": html.escape(label), **_ABOVE} for x, label in chart.marks],
    }
