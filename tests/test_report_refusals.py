"""What a shield refuses, counted from records and shown in the terminal and on the page."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console
from tests import report_data as made

from maodun.arena.refusals import rejection
from maodun.report import refusals
from maodun.report.html import report_html
from maodun.report.terminal import summary_view


def columns(n: int = 40) -> dict[str, np.ndarray]:
    """A quarter of the clean inputs is refused; of the rest those with doubt above -0.2 are answered wrongly."""
    doubt = np.linspace(-1.0, 1.0 / 3.0, n).astype(np.float32)
    right = doubt <= -0.2
    return {
        "clean_doubt": doubt,
        "adv_doubt": np.full(n, -0.5, np.float32),
        "clean_correct": right,
        "success": ~right,
        "distance_linf": np.where(np.arange(n) % 2 == 0, 0.1, 0.0),
    }


def test_counts_and_the_curve_up_to_where_it_works() -> None:
    found = rejection(columns())
    assert found is not None
    assert (found.coverage.value, found.coverage.n) == (0.75, 40)
    assert found.accuracy.value == pytest.approx(24 / 30)
    assert found.usable.value == pytest.approx(24 / 40)
    coverages, risks = zip(*found.risk, strict=True)
    assert coverages[0] == pytest.approx(1 / 40)
    assert coverages[-1] == pytest.approx(0.75)
    assert all(risk == 0 for coverage, risk in found.risk if coverage <= 24 / 40)
    assert risks[-1] == pytest.approx(6 / 30)
    assert list(risks) == sorted(risks)


def test_right_by_the_vote_and_doubted_on_average_is_no_answer() -> None:
    content = columns()
    content["clean_correct"] = np.ones(40, bool)
    found = rejection(content)
    assert found is not None
    assert found.accuracy.value == 1.0
    assert found.accuracy.n == 30


def test_nothing_is_answered_or_refused() -> None:
    content = columns()
    content["clean_doubt"] = np.ones(40, np.float32)
    found = rejection(content)
    assert found is not None
    assert found.coverage.value == 0.0
    assert found.risk == []
    content["clean_doubt"] = np.full(40, np.nan, np.float32)
    assert rejection(content) is None


def test_terminal_and_page_show_it_where_there_is_any(tmp_path) -> None:
    what = rejection(columns())
    guarded = made.summary(cells=[made.cell("none", "pgd", rejection=what), made.cell("none", "fgsm")])
    (line,) = refusals.lines(guarded)
    assert refusals.spelled(line)[2] == "0.0 %"
    assert len(refusals.spelled(line)) == len(refusals.HEADERS)
    out = io.StringIO()
    Console(file=out, width=240).print(summary_view(guarded))
    assert "refusals" in out.getvalue()
    assert "75.0 %" in out.getvalue()
    assert "What is refused" in report_html(guarded, tmp_path, light=True)
    plain = made.summary(cells=[made.cell("none", "pgd")])
    assert "What is refused" not in report_html(plain, tmp_path, light=True)
