"""How a command can end otherwise than well, and the exit code that says so."""

from __future__ import annotations

WRONG_INPUT = 2
INTERRUPTED = 130


class Interrupted(Exception):  # noqa: N818 - a wish, not an error
    """The person running a command wants it to stop; the text says what is kept of its work."""
