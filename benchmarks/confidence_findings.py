"""Over-confident under attack, risk-averse after adversarial training: the two findings, as a picture and a table.

    for d in digits mnist cifar10; do maodun arena recipes/tables/confidence-$d.yaml --out runs/confidence-$d; done
    python -m benchmarks.confidence_findings runs/confidence-* --out docs/images/confidence.svg

One panel per shield, the undefended ones above: accuracy against confidence on clean inputs and under the spears named
by --show. Above the diagonal a network is less sure than it should be, below it surer; the area of a mark grows with
the share of samples in it. The table on standard output has the numbers with their intervals.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

from maodun.arena.summary import Reliability, RunSummary, summarise
from maodun.report import calibration, svg
from maodun.report.charts import Chart, Line, style
from maodun.report.exports import markdown_table
from maodun.report.words import percent

GAP, HEAD, FOOT = 14, 26, 30
STYLE = """<style>text{font:12px system-ui,sans-serif;fill:#26303e}.title{font-weight:600}.middle{text-anchor:middle}
.end{text-anchor:end}.grid{stroke:#e4e8ee}.mark{stroke:#8a94a6;stroke-dasharray:2 3}</style>"""


def panel(run: RunSummary, shield: str, show: Sequence[str]) -> Chart:
    """Return accuracy against confidence of one shield, clean and under the spears to show."""
    lines = []
    for place, name in enumerate(("clean", *show)):
        found = next((each for each in run.reliability if _is(each, shield, name)), None)
        if found is not None:
            lines.append(_line(found, name, place))
    return Chart(shield, "confidence, %", "accuracy, %", 100.0, 100.0, tuple(lines), diagonal=True)


def _is(each: Reliability, shield: str, name: str) -> bool:
    kind = "clean" if name == "clean" else "adversarial"
    return (each.shield, each.kind) == (shield, kind) and each.temperature is None and each.spear in (name, "")


def _line(each: Reliability, name: str, place: int) -> Line:
    total = max(1, sum(each.count))
    bins = [b for b in zip(each.confidence, each.accuracy, each.count, strict=True) if b[2] > 0]
    x, y = tuple(100 * b[0] for b in bins), tuple(100 * b[1] for b in bins)
    return Line(name, x, y, style(place), tuple(5 + 13 * (b[2] / total) ** 0.5 for b in bins))


def picture(rows: Sequence[Sequence[Chart]], show: Sequence[str]) -> str:
    """Return the panels as one SVG image with a legend below."""
    wide = max(len(row) for row in rows) * (svg.WIDTH + GAP)
    high = len(rows) * (svg.HEIGHT + HEAD) + FOOT
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" width="{wide}" height="{high}">']
    parts += [STYLE, f'<rect width="{wide}" height="{high}" fill="#ffffff"/>']
    for down, row in enumerate(rows):
        for across, chart in enumerate(row):
            x, y = across * (svg.WIDTH + GAP), down * (svg.HEIGHT + HEAD)
            parts.append(f'<text class="title" x="{x + 50}" y="{y + 24}">{escape(chart.title)}</text>')
            box = f'<svg x="{x}" y="{y + HEAD - 8}" width="{svg.WIDTH}" height="{svg.HEIGHT}" '
            parts.append(svg.to_svg(chart).replace("<svg ", box, 1))
    for place, name in enumerate(("clean", *show)):
        x = 50 + 170 * place
        parts.append(svg.sample(style(place)).replace("<svg ", f'<svg x="{x}" y="{high - 24}" ', 1))
        parts.append(f'<text x="{x + 38}" y="{high - 12}">{escape(name)}</text>')
    return "".join([*parts, "</svg>"]) + "\n"


def table(runs: Sequence[RunSummary]) -> str:
    """Return the numbers of all shields and inputs as Markdown."""
    headers = ("shield", "inputs", "n", "accuracy %", "confidence %", "over", "under", "AUROC", "under after best T")
    body = []
    for run in runs:
        for line in calibration.lines(run):
            what, after = line.what, line.what.after("clean")
            body.append(
                (
                    line.shield,
                    line.inputs,
                    str(what.n),
                    *(percent(value) if value is not None else "" for value in (what.accuracy, what.confidence)),
                    *(calibration.spanned(what, key) for key in ("over", "under")),
                    f"{what.auroc:.2f}" if what.auroc is not None else "",
                    f"{after.under:.3f} (T = {after.temperature:.2f})" if after is not None else "",
                )
            )
    return markdown_table(headers, body, 2)


def main() -> None:
    """Draw the picture and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of finished runs")
    parser.add_argument("--out", default="docs/images/confidence.svg")
    parser.add_argument("--show", default="PGD-20,maximal confidence")
    words = parser.parse_args()
    runs, show = [summarise(folder) for folder in words.runs], words.show.split(",")
    columns = [[panel(run, shield, show) for shield in run.shields] for run in runs]
    rows = [[column[place] for column in columns if place < len(column)] for place in range(max(map(len, columns)))]
    Path(words.out).write_text(picture(rows, show), encoding="utf-8")
    print(table(runs))


if __name__ == "__main__":
    main()
