"""Two runs compared: numbers known by hand, pairing by sample id, and every reason for not pairing said."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import report_data as made
from rich.console import Console

from maodun.core.errors import StoreError
from maodun.report import compare as c
from maodun.report import compare_views as views


@pytest.mark.parametrize(
    ("gained", "lost", "wanted"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (0, 5, 2 / 2**5),
        (1, 9, 2 * (1 + 10) / 2**10),
        (2, 10, 2 * (1 + 12 + 66) / 2**12),
        (10, 2, 2 * (1 + 12 + 66) / 2**12),
    ],
)
def test_mcnemar_is_the_exact_binomial_by_hand(gained, lost, wanted):
    assert c.mcnemar(gained, lost) == pytest.approx(wanted, rel=1e-12)


def test_mcnemar_agrees_with_statsmodels():
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    for gained, lost in [(3, 17), (40, 41), (0, 1), (120, 80)]:
        peer = tables.mcnemar([[500, lost], [gained, 20]], exact=True).pvalue
        assert c.mcnemar(gained, lost) == pytest.approx(peer, rel=1e-9)


def test_interval_of_a_degenerate_difference_has_no_width():
    assert c.paired_interval(0, 0, 50) == (0.0, 0.0)
    assert c.paired_interval(50, 0, 50) == (1.0, 1.0)
    assert c.paired_interval(0, 50, 50) == (-1.0, -1.0)


def test_interval_is_that_of_resampled_pairs():
    gained, lost, n = 30, 12, 400
    pairs = np.repeat([1, -1, 0], [gained, lost, n - gained - lost])
    picks = np.random.default_rng(5).integers(0, n, (20_000, n))
    wanted = np.quantile(pairs[picks].mean(1), [0.025, 0.975])
    assert c.paired_interval(gained, lost, n, draws=20_000) == pytest.approx(tuple(wanted), abs=0.0026)


def test_interval_has_the_width_of_the_normal_law_and_depends_on_the_seed_only():
    gained, lost, n = 300, 200, 5000
    share, difference = (gained + lost) / n, (gained - lost) / n
    half = 1.96 * math.sqrt((share - difference**2) / n)
    low, high = c.paired_interval(gained, lost, n)
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=0.0008)
    assert c.paired_interval(gained, lost, n) == (low, high)
    assert c.paired_interval(gained, lost, n, seed=1) != (low, high)


def test_holm_by_hand_and_by_statsmodels():
    assert c.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert c.holm([]) == []
    peer = pytest.importorskip("statsmodels.stats.multitest")
    values = np.random.default_rng(0).random(20) ** 3
    assert c.holm(list(values)) == pytest.approx(list(peer.multipletests(values, method="holm")[1]))


def one_cell(shield="none", spear="pgd", **changes):
    cell = made.cell(shield, spear, **changes)
    return made.summary(cells=[cell], worst=[], curves=[], reliability=[], findings=[])


@pytest.fixture
def places(tmp_path):
    return tmp_path / "a", tmp_path / "b"


def by_spear(comparison):
    return {pair.spear: pair for pair in comparison.pairs}


def test_pairs_go_by_sample_id_and_not_by_place(places):
    run, name = one_cell(), one_cell().cells[0].cell
    ids = list(range(20))
    fallen = [each < 12 for each in ids]
    later = [each < 4 for each in ids]
    made.store_records(places[0], name, ids, fallen)
    made.store_records(places[1], name, ids[::-1], later[::-1])
    pair = by_spear(c.compare(run, places[0], run, places[1]))["pgd"]
    assert (pair.n, pair.gained, pair.lost) == (20, 8, 0)
    assert (pair.first, pair.second, pair.difference) == pytest.approx((0.4, 0.8, 0.4))
    assert pair.p_value == pytest.approx(2 / 2**8)
    assert pair.note == ""
    assert pair.low <= 0.4 <= pair.high


def test_samples_of_one_run_only_are_left_out_and_said(places):
    run, name = one_cell(), one_cell().cells[0].cell
    made.store_records(places[0], name, list(range(30)), [True] * 30)
    made.store_records(places[1], name, list(range(10, 35)), [False] * 25)
    pair = by_spear(c.compare(run, places[0], run, places[1]))["pgd"]
    assert (pair.n, pair.gained) == (20, 20)
    assert pair.note == "sample ids differ: 10 only in the first run, 5 only in the second"


def test_disjoint_samples_other_labels_and_absent_records_are_not_paired(places):
    run, name = one_cell(), one_cell().cells[0].cell
    made.store_records(places[0], name, [0, 1, 2, 3], [True] * 4)
    pair = by_spear(c.compare(run, places[0], run, places[1]))["pgd"]
    assert (pair.difference, pair.p_value, pair.note) == (None, None, "no records in the second run")
    made.store_records(places[1], name, [5, 6, 7, 8], [True] * 4)
    assert "no sample in common" in by_spear(c.compare(run, places[0], run, places[1]))["pgd"].note
    made.store_records(places[1], name, [0, 1, 2, 3], [True] * 4, labels=[0, 1, 2, 9])
    comparison = c.compare(run, places[0], run, places[1])
    assert "different labels" in by_spear(comparison)["pgd"].note
    assert "Nothing could be paired" in comparison.notes[-1]


def test_cells_of_one_run_only_are_listed(places):
    first, second = made.summary(), made.summary()
    first = first.model_copy(update={"cells": [first.cells[0], first.cells[1]]})
    second = second.model_copy(update={"cells": [second.cells[0], second.cells[2], second.cells[6]]})
    for place, run in zip(places, (first, second), strict=True):
        for cell in run.cells:
            made.store_records(place, cell.cell, [1, 2, 3, 4], [True, False, True, False])
    comparison = c.compare(first, places[0], second, places[1])
    notes = {(pair.shield, pair.spear): pair.note for pair in comparison.pairs}
    assert notes["none", "pgd"] == "only in the first run"
    assert notes["none", "pgd (bpda, eot 8)"] == notes["adversarial training", "fgsm"] == "only in the second run"
    assert notes["none", "fgsm"] == ""


def test_single_shields_are_compared_under_different_names(places):
    first, second = one_cell("none"), one_cell("bit depth 3")
    for place, run in zip(places, (first, second), strict=True):
        made.store_records(place, run.cells[0].cell, list(range(8)), [True] * 8)
    comparison = c.compare(first, places[0], second, places[1])
    assert by_spear(comparison)["pgd"].difference == 0.0
    assert "'none' of the first is compared with 'bit depth 3' of the second" in comparison.notes[0]


def test_worst_case_counts_a_sample_that_any_spear_felled(places):
    cells = [made.cell("none", "pgd"), made.cell("none", "square"), made.cell("adversarial training", "pgd")]
    run = made.summary(cells=cells, worst=[])
    ids = list(range(8))
    for cell in cells:
        made.store_records(places[0], cell.cell, ids, [False] * 8)
    made.store_records(places[1], cells[0].cell, ids, [each < 2 for each in ids])
    made.store_records(places[1], cells[1].cell, ids, [1 <= each < 4 for each in ids])
    made.store_records(places[1], cells[2].cell, ids, [False] * 8)
    comparison = c.compare(run, places[0], run, places[1])
    worst = [pair for pair in comparison.pairs if pair.spear == c.WORST]
    assert [(pair.shield, pair.lost, pair.gained) for pair in worst] == [("none", 4, 0)]
    clean = [pair for pair in comparison.pairs if pair.spear == c.CLEAN]
    assert [pair.difference for pair in clean] == [0.0, 0.0]


def test_differing_data_rules_and_precision_are_said(places):
    first = one_cell()
    second = one_cell(rule="majority", draws=10, reference=False)
    second = second.model_copy(update={"data": {**second.data, "sha256": "ff"}, "complete": False})
    for place in places:
        made.store_records(place, first.cells[0].cell, [1, 2], [True, False])
    comparison = c.compare(first, places[0], second, places[1])
    notes = " ".join(comparison.notes)
    assert "data differ in sha256" in notes
    assert "second run is not complete" in notes
    assert "not a reference" in notes
    assert "verdict rules differ (single of 1, majority of 10)" in by_spear(comparison)["pgd"].note


def test_a_broken_part_is_an_error_with_its_name(places):
    run, name = one_cell(), one_cell().cells[0].cell
    for place in places:
        made.store_records(place, name, [1, 2], [True, False])
    (places[1] / "records" / name / "part-00001.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(StoreError, match="part-00001"):
        c.compare(run, places[0], run, places[1])


@pytest.fixture
def comparison(places):
    run = made.summary()
    rng = np.random.default_rng(2)
    for number, place in enumerate(places):
        for cell in run.cells[: 30 - number]:
            made.store_records(place, cell.cell, list(range(60)), list(rng.random(60) < 0.3 + 0.3 * number))
    return c.compare(run, places[0], run, places[1])


def test_terminal_markdown_and_page_show_the_same_words(comparison, tmp_path):
    pytest.importorskip("jinja2", reason="the page needs Jinja2")
    console = Console(record=True, width=220, file=io.StringIO())
    console.print(comparison)
    text, markdown = console.export_text(), views.to_markdown(comparison)
    page = views.write_comparison(comparison, tmp_path / "c.html").read_text(encoding="utf-8")
    notes = views.footnotes(comparison)
    for pair in comparison.pairs:
        words = views.spelled(pair, notes)
        assert words[6] in text
        assert words[6] in page
        assert words[6].replace("[", "\\[").replace("]", "\\]") in markdown
    assert "no records in the second run" in text
    assert "no records in the second run" in page
    assert views.write_comparison(comparison, tmp_path / "c.md").read_text(encoding="utf-8") == markdown
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_names_cannot_break_the_page(places):
    pytest.importorskip("jinja2", reason="the page needs Jinja2")
    first, second = one_cell(made.NASTY, made.NASTY), one_cell(made.NASTY, made.NASTY)
    first = first.model_copy(update={"name": made.NASTY})
    page = views.comparison_html(c.compare(first, places[0], second, places[1]))
    assert made.NASTY not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("value", "wanted"), [(0.0, "0.0"), (-0.0001, "0.0"), (0.032, "+3.2"), (-0.5, "−50.0"), (None, "–")]
)
def test_differences_are_signed_points(value, wanted):
    assert views.points(value) == wanted


@pytest.mark.parametrize(("value", "wanted"), [(1.0, "1"), (0.0004, "< 0.001"), (0.0132, "0.013"), (0.42, "0.42")])
def test_chances_are_written_for_people(value, wanted):
    assert views.chance(value) == wanted
