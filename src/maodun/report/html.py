"""The report: one HTML file with everything inside, which asks the network for nothing."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import metadata, resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

from maodun.report import calibration, diagnosis, refusals, view, words
from maodun.report.charts import Chart, reliability_charts, security_charts, style, styles, to_plotly
from maodun.report.files import need, write_text
from maodun.report.ladder import resubmission_charts
from maodun.report.pictures import load_pictures
from maodun.report.svg import sample, to_svg

if TYPE_CHECKING:
    from pathlib import Path

    from maodun.arena.summary import RunSummary
    from maodun.report.pictures import Shown

_AT_ONCE = 8


def write_report(summary: RunSummary, run_dir: str | Path, out_path: str | Path, *, light: bool = False) -> Path | str:
    """Write the report of a run as one self-contained HTML file and return its path.

    `run_dir` is where the adversarial npz parts lie (absent parts leave the pictures out and say so). `light`
    draws static SVG charts only, without scripts: some 100 kB instead of 5 MB. Raises InputError when Jinja2
    or, unless `light`, Plotly is not installed, or when `out_path` cannot be written.
    """
    return write_text(out_path, report_html(summary, run_dir, light=light))


def report_html(summary: RunSummary, run_dir: str | Path, *, light: bool = False) -> str:
    """Return the report as text; arguments and errors as for `write_report`."""
    across, single = security_charts(summary)
    reliability = reliability_charts(summary)
    figures = Figures()
    pictures, missing = load_pictures(summary, run_dir)
    spears = styles([*(cell.spear for cell in summary.cells), *(curve.spear for curve in summary.curves)])
    shields = styles([*summary.shields, *(curve.shield for curve in summary.curves)])
    drawn = {curve.spear for curve in summary.curves}, {curve.shield for curve in summary.curves}
    content = {
        "run": summary,
        "verdicts": view.verdicts(summary),
        "matrices": view.matrices(summary),
        "transfers": view.transfers(summary),
        "groups": view.groups(summary),
        "ladders": summary.ladders,
        "diagnoses": diagnosis.shown(summary),
        "resubmission": [
            (figures.add(chart), [(line.name, sample(line.style)) for line in chart.lines])
            for chart in resubmission_charts(summary)
        ],
        "across": [figures.add(chart) for chart in across],
        "curves": [figures.add(chart) for chart in single],
        "spear_legend": [(name, sample(each)) for name, each in spears.items() if name in drawn[0]],
        "shield_legend": [(name, sample(each)) for name, each in shields.items() if name in drawn[1]],
        "reliability": [figures.add(chart) for chart, main in reliability if main],
        "reliability_more": [figures.add(chart) for chart, main in reliability if not main],
        "reliability_legend": [("clean", sample(style(0))), ("under attack", sample(style(1)))],
        "calibration": calibration.lines(summary),
        "calibration_headers": calibration.HEADERS,
        "calibration_words": calibration.spelled,
        "refusals": refusals.lines(summary),
        "refusal_headers": refusals.HEADERS,
        "refusal_words": refusals.spelled,
        "pictures": _albums(pictures),
        "pictures_missing": missing,
        "findings": words.merged(summary.findings),
        "version": package_version(),
        "ramp": [view.heat(place / 10)[0] for place in range(11)],
    }
    scripts = [] if light else [plotly_js(), resource("report.js")]
    return page("report.html.j2", content, scripts, figures.plain() if not light else None)


def _albums(shown: list[Shown]) -> list[tuple[str, list[Shown], list[Shown]]]:
    """Return per shield the pictures to show at once, one of each cell before any second one, and the rest."""
    found = []
    for shield, group in groupby(shown, key=lambda each: each.shield):
        own = list(group)
        first = sorted(own, key=lambda each: each.turn)[:_AT_ONCE]
        chosen = [each for each in own if any(each is one for one in first)]
        found.append((shield, chosen, [each for each in own if not any(each is one for one in first)]))
    return found


class Figures:
    """Collects the charts of a page: the SVG goes into the page, the Plotly description beside it."""

    def __init__(self) -> None:
        self._plain: dict[str, Any] = {}

    def add(self, chart: Chart) -> dict[str, str]:
        """Register a chart and return what the template needs: key, title and SVG."""
        key = f"figure-{len(self._plain) + 1}"
        self._plain[key] = to_plotly(chart)
        return {"key": key, "title": chart.title, "svg": to_svg(chart)}

    def plain(self) -> dict[str, Any]:
        """Return the Plotly descriptions by key."""
        return self._plain


def plotly_js() -> str:
    """Return Plotly's JavaScript bundle (the package ships the full one only)."""
    offline = need(
        "plotly.offline", "the interactive report", "pip install 'maodun[report]', or write the --light report"
    )
    return str(offline.get_plotlyjs())


def resource(name: str) -> str:
    """Return a text file that lies beside the templates."""
    return (resources.files("maodun.report") / "templates" / name).read_text(encoding="utf-8")


def package_version() -> str:
    """Return the version of the installed package, "unknown" in a bare source tree."""
    try:
        return metadata.version("maodun")
    except metadata.PackageNotFoundError:
        return "unknown"


def page(template: str, content: dict[str, Any], scripts: list[str], figures: dict[str, Any] | None = None) -> str:
    """Render a template with the house style and the given scripts inlined.

    A content security policy in the page forbids every network request, and every script but these (by hash):
    even text that slipped through escaping could not run. Raises InputError when Jinja2 is not installed.
    """
    jinja = need("jinja2", "the HTML report")
    environment = jinja.Environment(
        loader=jinja.FunctionLoader(resource),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        rate=words.rate,
        percent=words.percent,
        interval=words.interval,
        number=words.number,
        norm_sign=words.norm_sign,
        statuses=words.statuses,
        rule=words.rule,
    )
    environment.globals.update(
        count=words.count, sentence=view.sentence, threat_sign=words.threat_sign, key_number=view.key_number
    )
    inline = [_inline(script) for script in scripts]
    allowed = " ".join(_digest(script) for script in inline) or "'none'"
    policy = (
        f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed}; "
        "base-uri 'none'; form-action 'none'"
    )
    return str(
        environment.get_template(template).render(
            **content,
            policy=policy,
            css=_markup(resource("style.css")),
            scripts=[_markup(script) for script in inline],
            figures=_markup(_json(figures)) if figures is not None else None,
        )
    )


def _markup(text: str) -> Any:
    return need("markupsafe", "the HTML report").Markup(text)  # our own files and escaped JSON only


def _inline(script: str) -> str:
    # Inside a string literal, which is the only place these can occur, "<\/" means "</".
    return re.sub(r"</(?=script)", r"<\\/", script, flags=re.IGNORECASE).replace("<!--", r"<\!--")


def _digest(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _json(content: object) -> str:
    """Return JSON that cannot end the element it stands in."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
