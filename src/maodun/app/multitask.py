"""What `maodun multitask` prints while images are attacked, and the page it writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from maodun.app.consoles import console
from maodun.app.endings import Interrupted


def multitask(recipe: str, out: str, rows: Sequence[str], *, quiet: bool) -> None:
    """Run a multi-task recipe into the folder `out`, print the table, and write report.html beside it."""
    from maodun.arena.multitask import run_multitask
    from maodun.report.multitask import to_table, write_multitask

    watch = console(error=True)

    def say(line: str) -> None:
        if not quiet:
            watch.print(line)

    try:
        lines = run_multitask(recipe, out, rows=tuple(rows) or None, say=say)
    except KeyboardInterrupt:
        raise Interrupted(f"the rows that were made are kept in {out}, the same command line resumes") from None
    page = write_multitask(recipe, out, Path(out) / "report.html")
    if not quiet:
        say_out = console()
        say_out.print(to_table(lines))
        say_out.print(str(page), soft_wrap=True)
