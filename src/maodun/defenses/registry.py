"""Defences in front of a classifier by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from maodun.core.errors import InputError, nearest
from maodun.defenses.detection import DETECTORS
from maodun.defenses.masking import MASKS
from maodun.defenses.preprocessing import PREPROCESSORS
from maodun.defenses.preprocessing.base import Defense
from maodun.defenses.purification import PURIFIERS, DiffusionFilter
from maodun.defenses.smoothing import Denoise, GaussianNoise

_ALL: tuple[type[Defense], ...] = (
    *PREPROCESSORS,
    GaussianNoise,
    Denoise,
    DiffusionFilter,
    *PURIFIERS,
    *MASKS,
    *DETECTORS,
)
DEFENSES: dict[str, type[Defense]] = {each.name: each for each in _ALL}


def options_of(defense: type[Defense]) -> dict[str, Any]:
    """Return the options of a defence class with their defaults."""
    if "__init__" not in vars(defense):
        return {}
    parameters = inspect.signature(defense.__init__).parameters
    return {name: entry.default for name, entry in parameters.items() if name != "self"}


def build_defense(name: str, **options: Any) -> Defense:
    """Return the defence called `name` with its options.

    Errors: InputError for an unknown name (with the nearest one) and for unknown or impossible options.
    """
    if name not in DEFENSES:
        raise InputError(f"defence '{name}'", "there is none of that name", nearest(name, list(DEFENSES)))
    known = options_of(DEFENSES[name])
    for option, value in options.items():
        if option not in known:
            remedy = nearest(option, list(known)) if known else "leave it out"
            raise InputError(f"option '{option}'", f"'{name}' does not take it", remedy)
        default = known[option]
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            kind = type(default).__name__
            remedy = f"give {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
            raise InputError(f"option '{option}' of '{name}'", f"{value!r} is not of type {kind}", remedy)
    build: Callable[..., Defense] = DEFENSES[name]
    return build(**options)
