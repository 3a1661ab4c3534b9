"""A run's cells as CSV, JSON, Markdown or LaTeX: the same rows, the same numbers, four spellings."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from maodun.core.errors import InputError, nearest
from maodun.report.files import write_text
from maodun.report.words import NOTHING, members, number, percent, rule, threat

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from maodun.arena.summary import CellSummary, LadderRow, RunSummary

WORST = "worst case"


@dataclass(frozen=True)
class Row:
    """One line of an export: shares in [0, 1], distances in the norm's units, calls as means per sample.

    `eps` None is any radius. Cells of a ladder also have its rung, rules and costs per image. A worst-case row (spear
    "worst case") names the strongest spear and has no costs.
    """

    shield: str
    spear: str
    norm: str
    eps: float | None
    targeted: bool
    rule: str
    draws: int | None
    n: int
    seed: int
    clean: float
    clean_low: float
    clean_high: float
    robust: float
    robust_low: float
    robust_high: float
    asr_all: float | None = None
    asr_correct: float | None = None
    median_distance: float | None = None
    rho: float | None = None
    forwards: float | None = None
    backwards: float | None = None
    queries: float | None = None
    seconds: float | None = None
    ece_clean: float | None = None
    ece_adversarial: float | None = None
    over_clean: float | None = None
    over_adversarial: float | None = None
    under_clean: float | None = None
    under_adversarial: float | None = None
    reference: bool = True
    strongest: str = ""
    command: str = ""
    rung: int | None = None
    single: float | None = None
    mean: float | None = None
    majority: float | None = None
    worst: float | None = None
    nfe: float | None = None
    seconds_per_image: float | None = None
    memory: float | None = None


def rows(summary: RunSummary) -> list[Row]:
    """Return a row per cell, then a row per worst case, in the run's order."""
    return [*(_cell_row(summary, cell) for cell in summary.cells), *_worst_rows(summary)]


def _cell_row(summary: RunSummary, cell: CellSummary) -> Row:
    clean, attacked = cell.calibration_clean, cell.calibration_adversarial
    rung = next((row for ladder in summary.ladders for row in ladder.rows if row.cell == cell.cell), None)
    extra = {} if rung is None else _rung(rung)
    return Row(
        shield=cell.shield,
        spear=cell.spear,
        norm=cell.norm,
        eps=cell.eps,
        targeted=cell.targeted,
        rule=cell.rule,
        draws=cell.draws,
        n=cell.robust.n,
        seed=summary.seed,
        clean=cell.clean.value,
        clean_low=cell.clean.low,
        clean_high=cell.clean.high,
        robust=cell.robust.value,
        robust_low=cell.robust.low,
        robust_high=cell.robust.high,
        asr_all=cell.asr_all.value,
        asr_correct=cell.asr_correct.value,
        median_distance=cell.median_distance,
        rho=cell.rho,
        forwards=cell.forwards,
        backwards=cell.backwards,
        queries=cell.queries,
        seconds=cell.seconds,
        ece_clean=clean.ece if clean else None,
        ece_adversarial=attacked.ece if attacked else None,
        over_clean=clean.over if clean else None,
        over_adversarial=attacked.over if attacked else None,
        under_clean=clean.under if clean else None,
        under_adversarial=attacked.under if attacked else None,
        reference=cell.reference,
        strongest="",
        command=cell.command,
        **extra,
    )


def _rung(row: LadderRow) -> dict[str, Any]:
    """Return what a ladder adds to a cell: every rule, and costs per image (memory in MiB)."""
    shares = {rule: getattr(row, rule).value for rule in ("single", "mean", "majority", "worst")}
    return {"rung": row.rung, **shares, "nfe": row.nfe, "seconds_per_image": row.seconds, "memory": row.memory}


def _worst_rows(summary: RunSummary) -> list[Row]:
    made = []
    for worst in summary.worst:
        cells = members(summary, worst)
        made.append(
            Row(
                shield=worst.shield,
                spear=WORST,
                norm=worst.norm,
                eps=worst.eps,
                targeted=worst.targeted,
                rule=cells[0].rule if cells else "",
                draws=cells[0].draws if cells else None,
                n=worst.robust.n,
                seed=summary.seed,
                clean=worst.clean.value,
                clean_low=worst.clean.low,
                clean_high=worst.clean.high,
                robust=worst.robust.value,
                robust_low=worst.robust.low,
                robust_high=worst.robust.high,
                reference=all(cell.reference for cell in cells),
                strongest=worst.strongest,
                command=summary.command,
            )
        )
    return made


def to_csv(summary: RunSummary) -> str:
    """Return the rows as CSV with a header; numbers with all their digits, nothing where there is no number."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    for row in rows(summary):
        writer.writerow({key: _plain(value) for key, value in asdict(row).items()})
    return buffer.getvalue()


def _plain(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def to_json(summary: RunSummary) -> str:
    """Return the whole summary as JSON, which `RunSummary.model_validate_json` reads back.

    NaN and infinity are null, as JSON has neither.
    """
    return summary.model_dump_json(indent=2) + "\n"


_HEADERS = (
    *("shield", "spear", "threat", "clean %", "robust %", "95 %"),
    *("median distance", "forwards", "backwards", "queries", "seconds"),
)
_RIGHT = 3


def _spelled(row: Row) -> tuple[str, ...]:
    ends = f"[{percent(row.robust_low)}, {percent(row.robust_high)}]"
    costs = (row.median_distance, row.forwards, row.backwards, row.queries, row.seconds)
    spear = row.spear if not row.strongest else f"{row.spear} ({row.strongest})"
    return (
        row.shield,
        spear if row.reference else f"{spear} *",
        threat(row.norm, row.eps, targeted=row.targeted),
        percent(row.clean),
        percent(row.robust),
        ends,
        *(number(value) if value is not None else NOTHING for value in costs),
    )


def spelled(summary: RunSummary) -> list[tuple[str, ...]]:
    """Return the rows as the words of the Markdown and LaTeX tables, one tuple of 11 per row."""
    return [_spelled(row) for row in rows(summary)]


def _notes(summary: RunSummary) -> list[str]:
    n = sorted({cell.robust.n for cell in summary.cells})
    rules = ", ".join(dict.fromkeys(rule(cell) for cell in summary.cells))
    sizes = f"n = {n[0]}" if len(n) == 1 else f"n = {n[0]} to {n[-1]}" if n else "n = 0"
    notes = [f"{summary.name}: {sizes}, seed {summary.seed}, rule {rules or 'none'}; command: {summary.command}"]
    if any(not cell.reference for cell in summary.cells):
        notes.append("* searched in reduced precision: not a reference result")
    if not summary.complete:
        notes.append("The run is not complete: the numbers cover what has been stored.")
    return notes


def markdown_escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, inside a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def markdown_table(headers: Sequence[str], body: Sequence[Sequence[str]], right: int) -> str:
    """Return a Markdown table; the columns from number `right` on are aligned right."""
    lines = [
        "| " + " | ".join(markdown_escape(word) for word in headers) + " |",
        "|" + "|".join("---" if place < right else "---:" for place in range(len(headers))) + "|",
    ]
    lines += ["| " + " | ".join(markdown_escape(word) for word in row) + " |" for row in body]
    return "\n".join(lines) + "\n"


def to_markdown(summary: RunSummary) -> str:
    """Return the rows as a Markdown table with the run's provenance below."""
    table = markdown_table(_HEADERS, spelled(summary), _RIGHT)
    return table + "\n" + "\n\n".join(markdown_escape(note) for note in _notes(summary)) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "_": r"\_",
    "%": r"\%",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    # A row that begins with a bracket would be read as the option of the line break before it.
    "[": r"{[}",
    "]": r"{]}",
    "–": "--",
    "≤": r"$\leq$",
    "∞": r"$\infty$",
    "×": r"$\times$",
    "ε": r"$\varepsilon$",
    "ρ": r"$\rho$",
}


def latex_escape(text: str) -> str:
    """Return text that LaTeX typesets as it is, on one line, in any font encoding."""
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))


def to_latex(summary: RunSummary) -> str:
    """Return the rows as a booktabs table: needs `\\usepackage{booktabs}`; a rule sets shields apart."""
    body, last = [], None
    for words in spelled(summary):
        shield = words[0]
        if last is not None and shield != last:
            body.append(r"\midrule")
        last = shield
        body.append(" & ".join(latex_escape(word) for word in words) + r" \\")
    lines = [
        r"\begin{table}",
        r"\centering",
        r"\begin{tabular}{" + "l" * _RIGHT + "r" * (len(_HEADERS) - _RIGHT) + "}",
        r"\toprule",
        " & ".join(latex_escape(word) for word in _HEADERS) + r" \\",
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        r"\caption{" + latex_escape(". ".join(_notes(summary))) + "}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[RunSummary], str]] = {
    ".csv": to_csv,
    ".json": to_json,
    ".md": to_markdown,
    ".tex": to_latex,
}


def export(summary: RunSummary, out_path: str | Path) -> Path | str:
    """Write the run in the format that the suffix names (.csv, .json, .md, .tex) and return the path.

    Raises InputError for another suffix and for a place that cannot be written.
    """
    suffix = PurePosixPath(str(out_path)).suffix.lower()
    if suffix not in FORMATS:
        reason = f"the suffix '{suffix}' names no format"
        raise InputError(f"export '{out_path}'", reason, nearest(suffix, list(FORMATS)))
    return write_text(out_path, FORMATS[suffix](summary))
