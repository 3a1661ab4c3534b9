"""Errors a person can act on: what is wrong, why, and what to do instead."""

from __future__ import annotations


class MaodunError(Exception):
    """Base of every error this package raises on purpose.

    `thing` names what is wrong, `reason` says why, `remedy` what to do; `str()` is one line of the three.
    """

    def __init__(self, thing: str, reason: str, remedy: str) -> None:
        self.thing, self.reason, self.remedy = thing, reason, remedy
        super().__init__(f"{thing}: {reason}; {remedy}")


class InputError(MaodunError):
    """What the user gave cannot be used (command line: exit code 2, before any long work starts)."""


class UnsupportedError(MaodunError):
    """The combination asked for is not offered, for example an attack under a norm it does not know."""


class TargetError(MaodunError):
    """A target outside of this process fails for good, or answers what cannot be read."""


class StoreError(MaodunError):
    """A run folder cannot be written, read or continued."""


def nearest(name: str, known: list[str]) -> str:
    """Return a hint naming the known word closest to `name`, or the whole list when none is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(sorted(known))
