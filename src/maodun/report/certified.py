"""Certificates for a terminal, as CSV, and as a page that shows certified and attacked accuracy in one chart."""

from __future__ import annotations

import csv
import io
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maodun.arena.certified import certificates
from maodun.core.errors import InputError
from maodun.report.charts import Chart, Line, styles
from maodun.report.files import write_text
from maodun.report.html import Figures, package_version, page, plotly_js, resource
from maodun.report.svg import sample
from maodun.report.words import count, number, percent, rate

if TYPE_CHECKING:
    from pathlib import Path

    from maodun.arena.certified import Beside, Certified

CERTIFIED = "certified, against any attack"


def sentence(found: Certified) -> str:
    """Return what was certified and how, in one sentence."""
    return (
        f"{found.model} under noise of sigma {found.sigma:g} on {count(found.samples, 'sample')} of {found.data}: "
        f"{found.draws} draws after {found.guesses} to choose the class, alpha {found.alpha:g} per sample, "
        f"seed {found.seed}; no radius beyond {found.largest:.3f} can be proved with so many draws."
    )


def cost(found: Certified) -> str:
    """Return what certifying one sample cost, in one sentence."""
    inner = f" and {found.nfe * found.evaluations} network evaluations of the denoiser" if found.nfe else ""
    return (
        f"Per sample {found.evaluations} classifier evaluations{inner}, {number(found.seconds, digits=3)} s; "
        f"peak memory {number(found.memory, digits=3)} MiB."
    )


def warnings(found: Certified) -> list[str]:
    """Return what speaks against the certificates: attacks that felled what was certified to stand."""
    return [
        f"{one.shield} fell to {one.spear} on {count(one.contradictions, 'sample')} of {one.compared} inside the "
        "certified radius. A certificate is about the smoothed classifier: compare with the same model, sigma and "
        "enough verdict draws, else one of the two is wrong."
        for one in found.beside
        if one.contradictions
    ]


def certified_view(found: Certified) -> Group:
    """Return everything a terminal shows about certificates, ready for `Console.print`."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold")
    table.add_column("radius", justify="right")
    table.add_column("certified [95 %]", justify="right")
    for row in found.rows:
        table.add_row(f"{row.radius:g}", Text(rate(row.accuracy)))
    title = f"{found.model}: certified accuracy, l2, sigma {found.sigma:g}"
    parts: list[RenderableType] = [Text(title, style="bold"), table]
    parts.append(Text(f"abstained {rate(found.abstained)}; mean certified radius {found.mean_radius:.3f}"))
    parts += [Text(sentence(found), style="dim"), Text(cost(found), style="dim")]
    for one in found.beside:
        points = ", ".join(
            f"{percent(rob.value)} % at {eps:g}" for eps, rob in zip(one.radius, one.robust, strict=True)
        )
        parts.append(Text(f"{one.spear} against {one.shield} leaves {points}"))
    parts += [Text(f"warning: {each}", style="yellow") for each in warnings(found)]
    if not found.complete:
        parts.append(Text("not complete: the same command line goes on with it", style="yellow"))
    return Group(*parts)


def chart(found: Certified) -> Chart:
    """Return certified accuracy against radius, with every attack beside it; a sound attack's points lie above."""
    names = [CERTIFIED, *(_name(one) for one in found.beside)]
    looks = styles(names)
    lines = [Line(CERTIFIED, *_percents(found.curve), looks[CERTIFIED], steps=True)]
    for one in found.beside:
        points = [(eps, robust.value) for eps, robust in zip(one.radius, one.robust, strict=True)]
        lines.append(Line(_name(one), *_percents(points), looks[_name(one)]))
    top = max([found.largest, *(eps for one in found.beside for eps in one.radius)])
    return Chart(f"{found.model}, sigma {found.sigma:g}", "radius (L2)", "accuracy, %", top, 100.0, tuple(lines))


def _name(one: Beside) -> str:
    return f"{one.shield}, {one.spear}"


def _percents(points: list[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(100 * y for _, y in points)


def certified_html(found: Certified, *, light: bool = False) -> str:
    """Return the page of certificates as one self-contained HTML text; `light` leaves scripts out."""
    figures, drawn = Figures(), chart(found)
    content = {
        "found": found,
        "figure": figures.add(drawn),
        "legend": [(line.name, sample(line.style)) for line in drawn.lines],
        "sentence_": sentence(found),
        "cost": cost(found),
        "warnings": warnings(found),
        "version": package_version(),
    }
    scripts = [] if light else [plotly_js(), resource("report.js")]
    return page("certified.html.j2", content, scripts, None if light else figures.plain())


def curve_csv(found: Certified) -> str:
    """Return the lines of the chart as CSV: line, radius, accuracy, low, high (intervals where there are counts)."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["line", "radius", "accuracy", "low", "high", "n"])
    for row in found.rows:
        one = row.accuracy
        writer.writerow(["certified", row.radius, one.value, one.low, one.high, one.n])
    for radius, accuracy in found.curve:
        writer.writerow(["certified curve", radius, accuracy, "", "", found.samples])
    for each in found.beside:
        for eps, robust in zip(each.radius, each.robust, strict=True):
            writer.writerow([_name(each), eps, robust.value, robust.low, robust.high, robust.n])
    return buffer.getvalue()


def samples_csv(folder: str) -> str:
    """Return one line per sample of a folder of certificates as CSV."""
    _, columns = certificates(folder)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ["sample_id", "label", "prediction", "radius", "share", "votes"]
    writer.writerow(names)
    writer.writerows(zip(*(columns[name].tolist() for name in names), strict=True))
    return buffer.getvalue()


def write_certified(found: Certified, folder: str, out: str, *, light: bool = False) -> Path | str:
    """Write certificates by suffix: .html the page, .csv the chart's lines, .json everything, .samples.csv the samples.

    Raises InputError for another suffix, and when the file cannot be written.
    """
    name = PurePosixPath(out).name.lower()
    if name.endswith((".html", ".htm")):
        return write_text(out, certified_html(found, light=light))
    if name.endswith("samples.csv"):
        return write_text(out, samples_csv(folder))
    if name.endswith(".csv"):
        return write_text(out, curve_csv(found))
    if name.endswith(".json"):
        return write_text(out, found.model_dump_json(indent=2) + "\n")
    raise InputError(f"export '{out}'", "certificates are not written so", "use .html, .csv, .samples.csv or .json")
