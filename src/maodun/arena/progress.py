"""What a person watching a run is shown: nothing, a bar, or a line per finished piece of work."""

from __future__ import annotations

import time
from typing import Any, Protocol, Self

from maodun.core.errors import InputError, nearest

MODES = ("quiet", "bar", "log")


class Watcher(Protocol):
    """Told about a run as it happens; used as a context manager around it."""

    def __enter__(self) -> Self:
        """Begin to show."""

    def __exit__(self, *problem: object) -> None:
        """Stop showing, also after an error."""

    def begin(self, total: int, done: int) -> None:
        """Hear how many samples of work there are, and how many were finished by an earlier start."""

    def unit(self, title: str, samples: int) -> None:
        """Hear which piece of work starts now."""

    def step(self, attack: str, done: int, steps: int, left: int) -> None:
        """Hear from inside an attack: steps done of all, samples still searched."""

    def finished(self, title: str, samples: int, note: str) -> None:
        """Hear that a piece of work is in the store."""


class Quiet:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *problem: object) -> None:
        pass

    def begin(self, total: int, done: int) -> None:
        """Show nothing."""

    def unit(self, title: str, samples: int) -> None:
        """Show nothing."""

    def step(self, attack: str, done: int, steps: int, left: int) -> None:
        """Show nothing."""

    def finished(self, title: str, samples: int, note: str) -> None:
        """Show nothing."""


class Log(Quiet):
    """Writes a line to standard error for every finished piece of work."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._total, self._done, self._started = 0, 0, time.perf_counter()

    def begin(self, total: int, done: int) -> None:
        """Say how much there is to do."""
        self._total, self._done = total, done
        self._console.print(f"{total} samples of work, {done} finished before")

    def finished(self, title: str, samples: int, note: str) -> None:
        """Say what was finished, when and how it went."""
        self._done += samples
        seconds = time.perf_counter() - self._started
        self._console.print(f"[{self._done}/{self._total}] {seconds:8.1f} s  {title}  {note}", markup=False)


class Bar(Quiet):
    """Draws one bar for the whole run and one for the current attack on standard error, with Rich."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._whole: Any = None
        self._part: Any = None

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._bar.stop()

    def begin(self, total: int, done: int) -> None:
        """Start the bar of the whole run."""
        self._whole = self._bar.add_task("all samples", total=total, completed=done, note="")
        self._part = self._bar.add_task("", total=1, visible=False, note="")

    def unit(self, title: str, samples: int) -> None:
        """Name the current piece of work."""
        self._bar.reset(self._part, total=1, visible=True, description=title, note=f"{samples} samples")

    def step(self, attack: str, done: int, steps: int, left: int) -> None:
        """Move the bar of the current attack."""
        self._bar.update(self._part, total=steps, completed=done, note=f"{attack}: {left} left")

    def finished(self, title: str, samples: int, note: str) -> None:  # noqa: ARG002 - the bar shows no titles
        """Move the bar of the whole run."""
        self._bar.update(self._whole, advance=samples, note=note)


def watcher(mode: str | Watcher) -> Watcher:
    """Return the watcher called quiet, bar or log, or the given one itself; InputError for another word."""
    if not isinstance(mode, str):
        return mode
    if mode not in MODES:
        raise InputError(f"progress '{mode}'", "is not a way to show progress", nearest(mode, list(MODES)))
    kinds: dict[str, type[Quiet]] = {"quiet": Quiet, "bar": Bar, "log": Log}
    return kinds[mode]()
