"""The page is whole, silent towards the network, safe against its own words, and tells what it was told."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest
import report_data as made
from PIL import Image
from rich.console import Console

from maodun.arena.summary import Curve, Finding, Rate, WorstCase
from maodun.core.errors import InputError
from maodun.report import charts, files, pictures, svg, view, words
from maodun.report.html import plotly_js, report_html, write_report
from maodun.report.terminal import summary_view

pytest.importorskip("jinja2", reason="the report needs Jinja2")
pytest.importorskip("plotly", reason="the report needs Plotly")


class Page(HTMLParser):
    """Collects the elements, the attributes that load something, and the visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self._inside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag in {"script", "style"}:
            self._inside.append(tag)
        for key, value in attributes:
            if key in {"src", "srcset", "data", "poster", "action", "xlink:href"} or (key == "href" and tag != "a"):
                self.loads.append(value)
            if key == "href" and tag == "a":
                self.links.append(value)
            if key == "id":
                self.ids.append(value)
            if key.startswith("on"):
                self.handlers.append(key)

    def handle_endtag(self, tag):
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    images = np.random.default_rng(3).random((5, 1, 8, 8))
    return made.store_pictures(made.summary(), folder, images), folder


@pytest.fixture(scope="module")
def full(run):
    return report_html(*run)


@pytest.fixture(scope="module")
def light(run):
    return report_html(*run, light=True)


# --- one file, nothing from outside


def test_plotly_is_inlined_exactly_once_and_not_in_the_light_page(full, light):
    bundle = plotly_js()
    assert full.count(bundle[:400]) == 1
    assert len(re.findall(r"plotly\.js v\d", full)) == len(re.findall(r"plotly\.js v\d", bundle)) == 1
    assert "Plotly" not in light
    assert "<script" not in light
    assert len(light) < 500_000 < len(full)


@pytest.mark.parametrize("kind", ["full", "light"])
def test_nothing_is_loaded_from_outside(kind, request):
    text = request.getfixturevalue(kind)
    page = Page(text)
    assert page.loads, "the pictures are loaded from somewhere"
    assert all(load.startswith("data:") for load in page.loads)
    assert all(link.startswith("#") for link in page.links)
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL))
    assert "url(" not in styles
    assert "@import" not in styles
    own = text.replace(plotly_js(), "")
    assert not re.findall(r"https?://", own)


def test_the_policy_forbids_the_network_and_every_script_but_these(full, light):
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', full).group(1).replace("&#39;", "'")
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    scripts = re.findall(r"<script>(.*?)</script>", full, flags=re.DOTALL)
    assert len(scripts) == 2
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "script-src &#39;none&#39;" in light


def test_every_link_inside_the_page_has_its_target(full):
    page = Page(full)
    assert len(set(page.ids)) == len(page.ids)
    assert {link[1:] for link in page.links} <= set(page.ids)


# --- user words


def nasty_run(tmp_path):
    word = made.NASTY + '"><img src=x onerror=alert(1)>{{ 7 * 7 }}</script><svg onload=alert(2)>'
    cell = made.cell(word, word, cell="a", rule=word, command=word, statuses={word: 3})
    return made.summary(
        name=word,
        command=word,
        created=word,
        versions={word: word},
        data={word: word},
        shields={word: {word: word}},
        classes=[word] * 10,
        cells=[cell],
        worst=[WorstCase(shield=word, norm=word, eps=0.1, clean=cell.clean, robust=cell.robust, strongest=word)],
        curves=[Curve(shield=word, spear=word, norm=word, eps=[0, 1], robust=[1, 0])],
        findings=[Finding(name=word, level=word, shield=word, spear=word, sentence=word, action=word)],
        reliability=[],
        pictures=[],
    ), word


@pytest.mark.parametrize("light", [True, False])
def test_user_words_are_shown_and_never_run(tmp_path, light):
    summary, word = nasty_run(tmp_path)
    summary = made.store_pictures(summary, tmp_path, np.zeros((2, 1, 4, 4)))
    text = report_html(summary, tmp_path, light=light)
    page = Page(text)
    assert page.handlers == []
    assert page.tags.count("script") == (0 if light else 3)
    assert page.tags.count("img") == 6
    assert " ".join(word.split()) in page.text
    assert "49" not in page.text
    assert made.NASTY not in text
    if not light:
        plain = re.search(r'id="figures">(.*?)</script>', text, flags=re.DOTALL).group(1)
        assert "<" not in plain
        names = [line.get("name", "") for one in json.loads(plain).values() for line in one["data"]]
        assert all("<" not in name for name in names), "Plotly reads a little HTML in names"


def test_rich_markup_in_names_is_shown_as_it_is():
    word = "[red]x[/red]"
    cell = made.cell(word, word)
    summary = made.summary(name=word, cells=[cell], findings=[], curves=[], reliability=[], worst=[])
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(summary_view(summary))
    console.print(summary_view(summary, matrix=True))
    assert console.export_text().count(word) >= 4


# --- content


def test_the_headline_tells_the_worst_case(light):
    text = Page(light).text.replace(" .", ".").replace(" ;", ";")
    assert "adversarial training keeps 79.1 % [76.5, 81.5] under L∞ ≤ 0.15 against all 6 spears; " in text
    assert text.count("the strongest is autoattack.") == 5


def test_alarms_stand_first_and_mark_the_verdict(light):
    text = Page(light).text
    assert text.index("gradients are masked") < text.index("Square, which sees") < text.index("38 of 1000")
    assert text.index("38 of 1000") < text.index("At eps = 0 nothing falls")
    assert "1 alarm: do not quote yet" in text


def test_rows_searched_in_reduced_precision_are_flagged(run, light):
    assert "not a reference result" in light
    clean = made.summary(cells=[cell for cell in made.summary().cells if cell.reference])
    assert "not a reference" not in report_html(clean, run[1], light=True)


def test_every_cell_shows_its_command_seed_and_n(run, light):
    text = Page(light).text
    for cell in run[0].cells:
        assert cell.command in text
    assert text.count(" 1000 0 ") == len(run[0].cells)
    assert "7c2f" * 16 in text


def test_an_unfinished_and_an_empty_run_say_so(tmp_path):
    nothing = made.summary(complete=False, cells=[], worst=[], curves=[], reliability=[], findings=[])
    text = Page(report_html(nothing, tmp_path, light=True)).text
    assert "not complete" in text
    assert "No cell has finished yet" in text
    assert "No checks were run" in text


def test_values_without_a_number_do_not_break_the_page(tmp_path):
    nan = float("nan")
    none = Rate(value=nan, low=nan, high=nan, n=0)
    cell = made.cell("none", "pgd", robust=none, clean=none, asr_correct=none, eps=None, median_distance=math.inf)
    worst = WorstCase(shield="none", norm="linf", eps=None, clean=none, robust=none, strongest="")
    curve = Curve(shield="none", spear="pgd", norm="linf", eps=[0, math.inf, 0.1], robust=[1, 0, nan])
    summary = made.summary(cells=[cell], worst=[worst], curves=[curve], reliability=[])
    text = report_html(summary, tmp_path)
    assert "nan" not in Page(text).text.lower().split()
    assert "nothing was measured" in text


def test_write_report_writes_whole_files_and_names_what_it_cannot_write(run, tmp_path):
    place = write_report(*run, tmp_path / "new" / "r.html", light=True)
    assert place.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [each.name for each in place.parent.iterdir()] == ["r.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_report(*run, tmp_path / "file" / "r.html", light=True)


@pytest.mark.parametrize(("package", "light"), [("jinja2", True), ("plotly.offline", False)])
def test_a_missing_extra_is_named_with_the_remedy(run, monkeypatch, package, light):
    real = files.importlib.import_module

    def absent(name):
        if name == package:
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(files.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r"pip install 'maodun\[report\]'"):
        report_html(*run, light=light)


# --- the parts


def test_heat_gets_darker_with_the_share_and_stays_legible():
    shares = [place / 50 for place in range(51)]
    assert all(view.contrast(*view.heat(share)) >= 4.5 for share in shares)
    light = [view.contrast(view.heat(share)[0], "#000000") for share in shares]
    assert all(before > after for before, after in pairwise(light))


def test_contrast_agrees_with_its_definition():
    assert view.contrast("#000000", "#ffffff") == pytest.approx(21.0)
    assert view.contrast("#777777", "#777777") == 1.0


def test_matrix_has_a_field_per_cell_and_a_gap_where_nothing_ran():
    summary = made.summary()
    cells = summary.cells[1:]
    matrix = view.matrices(summary.model_copy(update={"cells": cells}))[0]
    entries = [entry for _, row in matrix.rows for entry in row]
    assert len(entries) == 30
    assert entries.count(None) == 1
    assert sorted(entry.link for entry in entries if entry) == list(range(29))
    assert sum(entry.strongest for entry in entries if entry) == 5


def test_threats_get_a_matrix_each():
    cells = [
        made.cell("none", "pgd", eps=eps, targeted=aim, cell=f"{eps}{aim}") for eps in (0.1, 0.2) for aim in (0, 1)
    ]
    titles = [matrix.title for matrix in view.matrices(made.summary(cells=cells, worst=[]))]
    assert titles == ["L∞ ≤ 0.1", "L∞ ≤ 0.1, targeted", "L∞ ≤ 0.2", "L∞ ≤ 0.2, targeted"]


def test_lowest_curve_never_rises_and_keeps_what_an_early_curve_showed():
    first = Curve(shield="s", spear="a", norm="l2", eps=[0.0, 1.0, 2.0], robust=[0.9, 0.5, 0.4])
    second = Curve(shield="s", spear="b", norm="l2", eps=[0.0, 0.5], robust=[0.9, 0.2])
    x, y = charts.lowest([first, second])
    assert x == [0.0, 0.5, 1.0, 2.0]
    assert y == pytest.approx([0.9, 0.2, 0.2, 0.2])


def test_lowest_curve_is_never_below_the_true_worst_case():
    # The truth falls at 0.9 only; a straight line from 0 to 1 would claim that half had fallen at 0.5.
    coarse = Curve(shield="s", spear="a", norm="l2", eps=[0.0, 1.0], robust=[1.0, 0.0])
    fine = Curve(shield="s", spear="b", norm="l2", eps=[0.0, 0.5, 1.0], robust=[1.0, 1.0, 0.1])
    assert charts.lowest([coarse, fine]) == ([0.0, 0.5, 1.0], [1.0, 1.0, 0.0])
    line = charts.Line("s", (0.0, 0.5, 1.0), (100.0, 100.0, 0.0), charts.style(0), steps=True)
    drawn = svg.to_svg(charts.Chart("t", "x", "y", 1.0, 100.0, (line,)))
    path = re.search(r'polyline points="([^"]*)"', drawn).group(1).split()
    heights = [float(point.partition(",")[2]) for point in path]
    assert len(path) == 5
    assert heights[:4] == [heights[0]] * 4
    assert heights[4] > heights[3]


def test_plotly_accepts_every_figure_we_describe():
    from plotly import graph_objects

    across, single = charts.security_charts(made.summary())
    drawn = [*across, *single, *(chart for chart, _ in charts.reliability_charts(made.summary()))]
    assert len(drawn) == 1 + 5 + 30
    for chart in drawn:
        graph_objects.Figure(charts.to_plotly(chart))


def test_each_shield_shows_one_reliability_diagram_first():
    found = charts.reliability_charts(made.summary())
    assert [chart.title for chart, main in found if main] == [f"{name}, autoattack" for name in made.SHIELDS]


@pytest.mark.parametrize(
    ("top", "wanted"),
    [(1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (100, [0, 20, 40, 60, 80, 100]), (0.031, [0, 0.01, 0.02, 0.03])],
)
def test_ticks_are_round_and_inside(top, wanted):
    assert svg.ticks(top) == pytest.approx(wanted)


def test_styles_differ_for_the_first_28_series():
    assert len({charts.style(place) for place in range(28)}) == 28


def decode(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_pictures_hold_the_pixels_at_their_own_size(run):
    shown, missing = pictures.load_pictures(*run)
    assert missing == []
    assert len(shown) == 20
    first = run[0].pictures[0]
    arrays = np.load(run[1] / "adversarials" / first.cell / "part-00000.npz")
    assert np.array_equal(decode(shown[0].clean), np.round(arrays["x"][0, 0] * 255).astype(np.uint8))
    assert np.array_equal(decode(shown[0].adversarial), np.round(arrays["x_adv"][0, 0] * 255).astype(np.uint8))
    assert (shown[0].clean_word, shown[0].adversarial_word, shown[0].fooled) == ("0", "3", True)


def test_difference_is_magnified_to_full_scale_and_signed():
    clean = np.full((2, 2), 0.5)
    attacked = clean + np.array([[0.1, -0.1], [0.0, 0.05]])
    shown, gain = pictures.difference(clean, attacked)
    assert gain == pytest.approx(10.0)
    assert shown[0, 0, 0] > shown[0, 0, 2], "lighter is orange"
    assert shown[0, 1, 2] > shown[0, 1, 0], "darker is blue"
    assert shown[1, 0] == pytest.approx(np.ones(3))
    assert pictures.difference(clean, clean)[1] == 1.0
    colour = np.zeros((2, 2, 3))
    assert pictures.difference(colour, colour)[0] == pytest.approx(np.full((2, 2, 3), 0.5))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [((3, 4, 5), (4, 5, 3)), ((1, 4, 5), (4, 5)), ((4, 5), (4, 5)), ((7,), (1, 7)), ((2, 4, 5), None)],
)
def test_shapes_that_are_pictures(shape, wanted):
    found = pictures.pixels(np.zeros(shape))
    assert (found is None and wanted is None) or found.shape == wanted


def test_pictures_that_are_not_there_are_accounted_for(run, tmp_path):
    summary, _ = run
    shown, missing = pictures.load_pictures(summary, tmp_path)
    assert shown == []
    assert missing == ["20 pictures: its adversarial inputs are not in the run's folder."]
    broken = [
        summary.pictures[0].model_copy(update={"row": 99}),
        summary.pictures[1].model_copy(update={"part": "../x"}),
    ]
    shown, missing = pictures.load_pictures(summary.model_copy(update={"pictures": broken}), run[1])
    assert shown == []
    assert len(missing) == 2


def test_a_pickled_part_is_not_unpickled(run, tmp_path):
    summary = run[0]
    place = tmp_path / "adversarials" / summary.pictures[0].cell
    place.mkdir(parents=True)
    np.savez(place / "part-00000.npz", x=np.array([{"a": 1}], dtype=object), x_adv=np.zeros(1))
    shown, missing = pictures.load_pictures(summary.model_copy(update={"pictures": summary.pictures[:1]}), tmp_path)
    assert shown == []
    assert "cannot be read" in missing[0]


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.0831, "0.0831"), (2210.4, "2,210"), (40.0, "40"), (0.0, "0"), (None, "–"), (math.nan, "–")]
)
def test_numbers_are_written_for_people(value, wanted):
    assert words.number(value) == wanted


@pytest.mark.parametrize(("eps", "wanted"), [(8 / 255, "linf 8/255"), (0.15, "linf 0.15"), (None, "linf any radius")])
def test_threats_are_written_as_in_recipes(eps, wanted):
    assert words.threat("linf", eps) == wanted


def test_findings_of_one_check_with_one_remedy_stand_together(tmp_path):
    same = {"name": "zero", "level": "alarm", "shield": "s", "action": "Use bpda."}
    found = [
        Finding(spear="a", sentence="One.", **same),
        Finding(name="other", level="ok", shield="s", spear=None, sentence="Fine.", action=""),
        Finding(spear="b", sentence="Two.", **same),
    ]
    assert [len(group) for group in words.merged(found)] == [2, 1]
    text = Page(report_html(made.summary(findings=found), tmp_path, light=True)).text
    assert text.count("Use bpda.") == 1
    assert text.index("One.") < text.index("Two.") < text.index("Fine.")


def test_many_pictures_show_each_cell_first_and_hide_the_rest(tmp_path):
    summary = made.summary(cells=[made.cell("none", "pgd")], worst=[])
    summary = made.store_pictures(summary, tmp_path, np.zeros((12, 1, 4, 4)), per_shield=12)
    text = report_html(summary, tmp_path, light=True)
    assert text.index("4 more examples") > text.index("sample 7")
    assert text.index("4 more examples") < text.index("sample 8")


def test_reliability_names_the_threat_when_there_are_several():
    run = made.summary()
    again = [each.model_copy(update={"eps": 0.3}) for each in run.reliability if each.kind != "clean"]
    worst = [*run.worst, *(each.model_copy(update={"eps": 0.3, "strongest": "pgd"}) for each in run.worst)]
    both = run.model_copy(update={"reliability": [*run.reliability, *again], "worst": worst})
    main = [chart.title for chart, main in charts.reliability_charts(both) if main]
    assert main[:2] == ["none, autoattack, L∞ ≤ 0.15", "none, pgd, L∞ ≤ 0.3"]
    assert len(main) == 10
