"""A run's summary as Rich tables and sentences for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from maodun.report import calibration, refusals
from maodun.report.ladder import ladder_tables
from maodun.report.view import matrices
from maodun.report.words import NOTHING, by_urgency, count, interval, number, percent, rate, shorter, threat

if TYPE_CHECKING:
    from maodun.arena.summary import Finding, RunSummary

_STYLES = {"ok": "green", "note": "cyan", "warning": "yellow", "alarm": "bold red"}
_REDUCED = "* searched in reduced precision: not a reference result"


def _table(title: str, words: tuple[str, ...], numbers: tuple[str, ...], last: tuple[str, ...] = ()) -> Table:
    # User text goes in as Text throughout: as a string, "[red]" in a name would be taken for markup.
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for header in words:
        table.add_column(Text(header), overflow="fold")
    for header in numbers:
        table.add_column(Text(header), justify="right")
    for header in last:
        table.add_column(Text(header), overflow="fold")
    return table


def cells_table(summary: RunSummary) -> Table:
    """Return a row per cell: accuracies with intervals, median distance, mean calls per sample, seconds."""
    numbers = ("clean", "robust [95 %]", "median distance", "forwards", "backwards", "queries", "seconds")
    table = _table(f"{summary.name}: robust accuracy per spear", ("shield", "spear", "threat"), numbers)
    for cell in summary.cells:
        table.add_row(
            Text(cell.shield),
            Text(cell.spear if cell.reference else f"{cell.spear} *"),
            Text(threat(cell.norm, cell.eps, targeted=cell.targeted)),
            f"{percent(cell.clean.value)} %",
            Text(rate(cell.robust)),
            number(cell.median_distance),
            number(cell.forwards),
            number(cell.backwards),
            number(cell.queries),
            number(cell.seconds, digits=3),
        )
    if any(not cell.reference for cell in summary.cells):
        table.caption = _REDUCED
    return table


def matrix_tables(summary: RunSummary) -> list[Table]:
    """Return one spear x shield table of robust accuracies per threat; the strongest spear of a shield is bold."""
    made = []
    for matrix in matrices(summary):
        table = _table(f"robust accuracy, % [95 %], {matrix.title}", ("spear",), matrix.shields)
        bodies = [("clean, no attack", matrix.clean), *matrix.rows, ("worst case", matrix.worst)]
        for place, (name, entries) in enumerate(bodies):
            words = [Text(name, style="bold" if place == len(bodies) - 1 else "")]
            for entry in entries:
                if entry is None:
                    words.append(Text("not run", style="dim"))
                    continue
                text = f"{percent(entry.rate.value)} {interval(entry.rate)}" + ("" if entry.reference else " *")
                words.append(Text(text, style="bold" if entry.strongest or place == len(bodies) - 1 else ""))
            table.add_row(*words, end_section=place in (0, len(bodies) - 2))
        if not matrix.all_reference:
            table.caption = _REDUCED
        made.append(table)
    return made


def transfer_tables(summary: RunSummary) -> list[Table]:
    """Return a surrogate x target table per threat: attack success among what each target answers correctly."""
    made = []
    for matrix in summary.transfer:
        title = "transfer, ASR % [95 %] of correct samples, "
        title += threat(matrix.norm, matrix.eps, targeted=matrix.targeted)
        pairs = zip(matrix.targets, matrix.clean, strict=True)
        targets = [f"{name}\nclean error {percent(1 - clean.value)}" for name, clean in pairs]
        table = _table(title, ("attack", "searched on"), (*targets, "mean, black box"))
        for row in matrix.rows:
            words = [Text(row.hooks), Text(shorter(row.surrogates))]
            for cell in row.cells:
                if cell is None:
                    words.append(Text("not run", style="dim"))
                    continue
                text = f"{percent(cell.asr_correct.value)} {interval(cell.asr_correct)}"
                words.append(Text(f"({text})" if cell.white_box else text, style="dim" if cell.white_box else ""))
            table.add_row(*words, Text(NOTHING if row.mean is None else percent(row.mean), style="bold"))
        table.caption = "(in brackets) white box: the target is among the surrogates"
        made.append(table)
    return made


def worst_table(summary: RunSummary) -> Table:
    """Return a row per shield and threat: what is left standing when every spear counts."""
    numbers = ("clean", "worst case [95 %]", "n")
    table = _table("worst case over all spears", ("shield", "threat"), numbers, ("strongest",))
    for worst in summary.worst:
        table.add_row(
            Text(worst.shield),
            Text(threat(worst.norm, worst.eps, targeted=worst.targeted)),
            Text(rate(worst.clean)),
            Text(rate(worst.robust), style="bold"),
            str(worst.robust.n),
            Text(worst.strongest),
        )
    return table


def calibration_table(summary: RunSummary) -> Table:
    """Return a row per shield and set of inputs, clean and attacked: what confidence is worth."""
    table = _table("calibration, [95 % bootstrap]", ("shield", "inputs"), calibration.HEADERS)
    for line in calibration.lines(summary):
        inputs = f"{line.inputs} {line.threat}".rstrip()
        table.add_row(Text(line.shield), Text(inputs), *calibration.spelled(line))
    table.caption = "over + under = ECE; T is fitted on clean inputs, each half of the samples on the other"
    return table


def refusal_tables(summary: RunSummary) -> list[Table]:
    """Return a table with a row per cell of a shield that may refuse to answer; none where all always answer."""
    found = refusals.lines(summary)
    if not found:
        return []
    table = _table("refusals, [95 %]", ("shield", "spear"), refusals.HEADERS)
    for line in found:
        table.add_row(Text(line.shield), Text(f"{line.spear} {line.threat}"), *map(Text, refusals.spelled(line)))
    table.caption = "usable: answered rightly when clean and not fooled; AUROC: of doubt, changed against clean inputs"
    return [table]


def finding_line(finding: Finding) -> Text:
    """Return a finding as one line: level, where, the sentence and the next action."""
    where = finding.shield + (f" / {finding.spear}" if finding.spear else "")
    line = Text(f"{finding.level}: ", style=_STYLES.get(finding.level, ""))
    return line.append(f"{where}: {finding.sentence} {finding.action}".rstrip(), style="default")


def gradient_line(shield: str, why: str) -> Text:
    """Return the plan's reason for the gradient it chose against a shield."""
    return Text("gradient: ", style="cyan").append(f"{shield}: {why}", style="default")


def summary_view(
    summary: RunSummary, *, findings: bool = True, matrix: bool = False, calibrated: bool = False
) -> Group:
    """Return everything a terminal shows about a run, ready for `Console.print`.

    Cells (as a matrix per threat when `matrix`), calibration when `calibrated`, refusals, worst cases, why the plan
    chose its gradients, and, when `findings`, those that ask for something, alarms first, with a count of the checks
    that passed.
    """
    parts: list[RenderableType] = []
    if summary.cells:
        parts += matrix_tables(summary) if matrix else [cells_table(summary)]
    if calibrated:
        parts.append(calibration_table(summary))
    parts += ladder_tables(summary)
    parts += refusal_tables(summary)
    parts += transfer_tables(summary)
    if summary.worst:
        parts.append(worst_table(summary))
    parts += [gradient_line(name, about["gradient"]) for name, about in summary.shields.items() if "gradient" in about]
    if findings and summary.findings:
        wanted = [finding for finding in by_urgency(summary.findings) if finding.level != "ok"]
        parts += [finding_line(finding) for finding in wanted]
        passed = count(len(summary.findings) - len(wanted), "check")
        parts.append(Text(f"{passed} passed, {len(wanted)} worth a look", style="dim"))
    if not summary.complete:
        parts.append(Text("this run is not complete: the same command line resumes it", style="yellow"))
    return Group(*parts)
