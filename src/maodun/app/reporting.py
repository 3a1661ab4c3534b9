"""From a run's folder to a page, tables for a paper, and a comparison with another run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from maodun.app.consoles import console
from maodun.arena.certified import is_certificate, summarise_certificates
from maodun.arena.summary import summarise
from maodun.report.certified import write_certified
from maodun.report.compare import compare as paired
from maodun.report.compare_views import to_table, write_comparison
from maodun.report.exports import export
from maodun.report.html import write_report


def report(folder: str, outs: Sequence[str], *, light: bool, quiet: bool) -> None:
    """Write the run in `folder` to each of `outs` (by suffix), or to report.html beside its records."""
    if is_certificate(folder):
        certificates = summarise_certificates(folder)
        for out in outs or [f"{folder.rstrip('/')}/report.html"]:
            written = write_certified(certificates, folder, out, light=light)
            if not quiet:
                console().print(str(written), soft_wrap=True)
        return
    summary = summarise(folder)
    for out in outs or [f"{folder.rstrip('/')}/report.html"]:
        page = PurePosixPath(out).suffix.lower() in (".html", ".htm")
        written = write_report(summary, folder, out, light=light) if page else export(summary, out)
        if not quiet:
            console().print(str(written), soft_wrap=True)


def compare(first: str, second: str, outs: Sequence[str], *, seed: int, quiet: bool) -> None:
    """Print the paired differences of two runs, second minus first, and write them to each of `outs`."""
    comparison = paired(summarise(first), first, summarise(second), second, seed=seed)
    for out in outs:
        write_comparison(comparison, out)
    if not quiet:
        console().print(to_table(comparison))
