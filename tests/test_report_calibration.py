"""The calibration of a run on its page, in the terminal, in its exports and its diagrams."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from tests import report_data as made

from maodun.arena.calibrated import profile
from maodun.report import calibration, charts, exports
from maodun.report.html import report_html
from maodun.report.terminal import summary_view


def _run():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(5, 0.3), 400)
    labels = np.array([rng.choice(5, p=row) for row in probs])
    clean, attacked = profile(probs, labels), profile(np.roll(probs, 1, axis=1), labels, probs)
    cells = [
        made.cell("none", spear, calibration_clean=clean, calibration_adversarial=attacked) for spear in ("fgsm", "pgd")
    ]
    return made.summary(cells=cells), clean, attacked


def test_lines_are_the_clean_inputs_once_and_every_spear():
    run, clean, attacked = _run()
    found = calibration.lines(run)
    assert [(line.shield, line.inputs, line.threat) for line in found] == [
        ("none", "clean", ""),
        ("none", "fgsm", "linf 0.15"),
        ("none", "pgd", "linf 0.15"),
    ]
    assert found[0].what == clean and found[2].what == attacked
    words = calibration.spelled(found[2])
    assert len(words) == len(calibration.HEADERS)
    assert words[3] == f"{attacked.over:.3f}"[1:] + " [{}, {}]".format(
        *(f"{end:.3f}"[1:] for end in attacked.intervals["over"])
    )


def test_what_an_old_run_does_not_know_is_a_dash():
    line = calibration.lines(made.summary())[0]
    words = calibration.spelled(line)
    assert words[2] == ".021" and words.count("–") == len(words) - 2


@pytest.mark.parametrize("light", [True, False])
def test_the_page_shows_before_and_after(tmp_path, light):
    run, _, attacked = _run()
    text = report_html(run, tmp_path, light=light)
    assert "Calibration numbers" in text and calibration.spanned(attacked, "over") in text
    assert f"{attacked.after('attacked').temperature:.3g}" in text
    assert report_html(made.summary(), tmp_path, light=True).count("Calibration numbers") == 1


def test_the_terminal_shows_it_when_asked():
    run, clean, _ = _run()
    shown = []
    for calibrated in (False, True):
        console = Console(file=io.StringIO(), width=250)
        console.print(summary_view(run, calibrated=calibrated))
        shown.append(console.file.getvalue())
    assert "calibration," not in shown[0]
    assert "calibration," in shown[1] and calibration.spanned(clean, "under") in shown[1]


def test_csv_tells_over_and_under_confidence_apart():
    run, clean, attacked = _run()
    row = exports.rows(run)[0]
    assert (row.over_clean, row.under_adversarial) == (clean.over, attacked.under)
    assert f"{attacked.over}" in exports.to_csv(run)


def test_diagrams_after_the_temperature_stand_beside_those_before():
    run = made.summary()
    warm = [each.model_copy(update={"temperature": 2.5}) for each in run.reliability]
    both = run.model_copy(update={"reliability": [*run.reliability, *warm]})
    found = [(chart.title, len(chart.lines)) for chart, main in charts.reliability_charts(both) if main]
    assert found[:2] == [("none, autoattack", 2), ("none, autoattack, after T = 2.5", 2)]
    assert len(found) == 2 * len(made.SHIELDS)


def test_json_gives_it_back():
    run, _, attacked = _run()
    again = type(run).model_validate_json(exports.to_json(run))
    assert again.cells[0].calibration_adversarial == attacked
