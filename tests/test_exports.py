"""CSV, JSON, Markdown and LaTeX: the same numbers four times, and every name as it was."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
import report_data as made

from maodun.arena.summary import RunSummary
from maodun.core.errors import InputError
from maodun.report import exports
from maodun.report.words import percent

NAMES = [
    "plain",
    "a|b",
    "a&b%c#d_e$f{g}h~i^j\\k",
    "<b>*x*</b>",
    'quo"te, comma',
    "two\nlines",
    "[x]",
    "[red]",
    "ε ≤ 8/255 × ∞",
]


@pytest.fixture
def run():
    return made.summary()


def test_csv_comes_back_as_it_went(run):
    back = list(csv.DictReader(io.StringIO(exports.to_csv(run))))
    rows = exports.rows(run)
    assert len(back) == len(rows) == 30 + 5
    for line, row in zip(back, rows, strict=True):
        assert (line["shield"], line["spear"], line["command"]) == (row.shield, row.spear, row.command)
        for key in ("eps", "clean", "robust", "robust_low", "robust_high"):
            assert float(line[key]) == getattr(row, key), "all digits"
        for key in ("median_distance", "rho", "seconds", "asr_correct"):
            assert (float(line[key]) if line[key] else None) == getattr(row, key)
        assert (line["reference"], line["targeted"]) == ("true" if row.reference else "false", "false")
        assert int(line["n"]) == 1000


@pytest.mark.parametrize("name", NAMES)
def test_csv_keeps_any_name(name):
    run = made.summary(cells=[made.cell(name, name)], worst=[])
    (line,) = csv.DictReader(io.StringIO(exports.to_csv(run)))
    assert (line["shield"], line["spear"]) == (name, name)


def test_json_is_the_whole_summary(run):
    assert RunSummary.model_validate_json(exports.to_json(run)) == run


def markdown_cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def latex_cells(text):
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    return [
        [re.sub(r"\{([\[\]])\}", r"\1", cell.strip(" \\")) for cell in re.split(r"(?<!\\)&", line)] for line in lines
    ]


def test_all_formats_carry_identical_numbers(run):
    lines = list(csv.DictReader(io.StringIO(exports.to_csv(run))))
    cells = json.loads(exports.to_json(run))["cells"]
    markdown, latex = markdown_cells(exports.to_markdown(run)), latex_cells(exports.to_latex(run))
    assert len(lines) == len(markdown) == len(latex) == 35
    for line, left, right in zip(lines, markdown, latex, strict=True):
        ends = f"[{percent(float(line['robust_low']))}, {percent(float(line['robust_high']))}]"
        wanted = [percent(float(line["clean"])), percent(float(line["robust"])), ends]
        assert left[3:6] == right[3:6] == wanted
        assert [word.replace("--", "–") for word in right[6:]] == left[6:]
    for line, cell in zip(lines, cells, strict=False):
        assert float(line["robust"]) == cell["robust"]["value"]
        assert float(line["seconds"]) == cell["seconds"]


@pytest.mark.parametrize("name", NAMES)
def test_markdown_keeps_its_columns_for_any_name(name):
    run = made.summary(cells=[made.cell(name, name)], worst=[])
    (cells,) = markdown_cells(exports.to_markdown(run))
    assert len(cells) == 11
    assert cells[:2] == [" ".join(name.split())] * 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a & b", r"a \& b"),
        ("50 %", r"50 \%"),
        ("x_1", r"x\_1"),
        ("#1", r"\#1"),
        ("$x$", r"\$x\$"),
        ("{x}", r"\{x\}"),
        ("a~b^c", r"a\textasciitilde{}b\textasciicircum{}c"),
        ("\\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("[x]", "{[}x{]}"),
        ("a\n\nb", "a b"),
    ],
)
def test_latex_specials_are_spelled_out(text, wanted):
    assert exports.latex_escape(text) == wanted


@pytest.mark.parametrize("name", NAMES)
def test_latex_keeps_its_columns_for_any_name(name):
    text = exports.to_latex(made.summary(cells=[made.cell(name, name)], worst=[]))
    (cells,) = latex_cells(text)
    assert len(cells) == 11
    bare = re.sub(r"\\[{}]", "", text)
    assert bare.count("{") == bare.count("}")


def test_worst_rows_and_reduced_precision_are_marked(run):
    text = exports.to_markdown(run)
    assert "worst case (autoattack) \\*" in text
    assert "not a reference result" in text
    assert "not a reference" not in exports.to_markdown(made.summary(cells=run.cells[:-1]))
    assert "not complete" in exports.to_latex(made.summary(complete=False))


@pytest.mark.parametrize("suffix", list(exports.FORMATS))
def test_the_suffix_chooses_the_format(run, tmp_path, suffix):
    place = exports.export(run, tmp_path / f"x{suffix}")
    assert place.read_text(encoding="utf-8") == exports.FORMATS[suffix](run)


def test_an_unknown_suffix_is_refused(run, tmp_path):
    with pytest.raises(InputError, match=r"'\.xlsx' names no format"):
        exports.export(run, tmp_path / "x.xlsx")
