"""What `maodun train` prints for a text experiment: a line per epoch and attack, then the table."""

from __future__ import annotations

from pathlib import Path

from maodun.app.consoles import console
from maodun.app.endings import Interrupted


def train_text(recipe: str, out: str, *, resume: bool, quiet: bool) -> None:
    """Run a text recipe into the folder `out`, print the table, and write it as results.md beside the rest."""
    from maodun.arena.text import train_text as room
    from maodun.core.files import write_whole
    from maodun.report.text import to_markdown, to_table

    watch = console(error=True)

    def say(line: dict[str, float | str]) -> None:
        if not quiet:
            parts = (f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in line.items())
            watch.print("  ".join(parts))

    try:
        lines = room(recipe, out, say=say, resume=resume)
    except KeyboardInterrupt:
        raise Interrupted(f"what was done is kept in {out}, the same command line resumes") from None
    page = write_whole(Path(out) / "results.md", to_markdown(lines).encode())
    if not quiet:
        say_out = console()
        say_out.print(to_table(lines))
        say_out.print(str(page), soft_wrap=True)
