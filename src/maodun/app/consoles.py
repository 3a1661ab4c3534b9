"""Where the command line prints."""

from __future__ import annotations

import sys

from rich.console import Console

# Wide enough for every table's row, so that a file or a pipe gets no folded cells.
_PIPE_WIDTH = 160


def console(*, error: bool = False) -> Console:
    """Return a console on standard output or error, as wide as the terminal, or wide when that is no terminal."""
    stream = sys.stderr if error else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _PIPE_WIDTH, highlight=False)
