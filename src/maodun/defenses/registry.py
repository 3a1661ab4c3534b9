"""Defences in front of a classifier by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from maodun.core.errors import InputError, nearest
from maodun.defenses.preprocessing.base import Defense, NoDefense
from maodun.defenses.preprocessing.bit_depth import BitDepth
from maodun.defenses.preprocessing.jpeg import JPEG
from maodun.defenses.preprocessing.median import Median
from maodun.defenses.preprocessing.random_resize_pad import RandomResizePad

DEFENSES: dict[str, type[Defense]] = {each.name: each for each in (NoDefense, BitDepth, Median, JPEG, RandomResizePad)}


def build_defense(name: str, **options: Any) -> Defense:
    """Return the defence called `name` with its options.

    Errors: InputError for an unknown name (with the nearest one) and for unknown or impossible options.
    """
    if name not in DEFENSES:
        raise InputError(f"defence '{name}'", "there is none of that name", nearest(name, list(DEFENSES)))
    known = inspect.signature(DEFENSES[name].__init__).parameters
    for option, value in options.items():
        if option not in known or option == "self":
            takes = [each for each in known if each != "self"]
            remedy = nearest(option, takes) if takes else "leave it out"
            raise InputError(f"option '{option}'", f"'{name}' does not take it", remedy)
        default = known[option].default
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            kind = type(default).__name__
            raise InputError(f"option '{option}' of '{name}'", f"{value!r} is not of type {kind}", f"give a {kind}")
    build: Callable[..., Defense] = DEFENSES[name]
    return build(**options)
