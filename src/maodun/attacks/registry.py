"""Every attack by name: what exists, what it offers, and how to build one from words."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Union

from maodun.attacks import artifacts
from maodun.core.engine import Attack
from maodun.core.errors import InputError, nearest

_ROOMS = {
    "gradient.pgd": ("fgsm", "bim", "pgd", "mifgsm", "nifgsm"),
    "gradient.lowfreq": ("lowfreq",),
    "gradient.apgd": ("apgd", "apgd-t"),
    "gradient.diffhammer": ("diffhammer", "diffattack"),
    "gradient.confident": ("maxconf",),
    "gradient.orthogonal": ("orthogonal",),
    "minimum.deepfool": ("deepfool",),
    "minimum.cw": ("cw",),
    "minimum.ddn": ("ddn",),
    "minimum.fmn": ("fmn",),
    "minimum.fab": ("fab",),
    "minimum.jsma": ("jsma",),
    "transfer.loop": ("transfer",),
    "universal.stadv": ("stadv",),
    "universal.lavan": ("lavan",),
    "query.square": ("square",),
    "query.rays": ("rays",),
    "query.simba": ("simba",),
    "query.bandits": ("bandits",),
    "query.differences": ("nes", "spsa"),
    "query.hopskipjump": ("hopskipjump",),
    "query.boundary": ("boundary",),
    "query.geoda": ("geoda",),
    "feature.distances": ("dr", "nrdm", "ssp"),
    "feature.fia": ("fia",),
    "feature.ila": ("ila",),
    "multitask.attack": ("relation",),
    "recipes": ("autoattack", "autoattack-plus", "autoattack-rand"),
    "sharp": ("sharp",),
}
# Any of these joined by dashes names a transfer attack of these hooks.
_TRANSFER_HOOKS = {"mi", "ni", "vmi", "di", "ti", "si", "ssm"}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


class _Attacks(Mapping[str, type[Attack[Any]]]):
    """The classes by name; a module is imported when one of its attacks is first asked for."""

    def __getitem__(self, name: str) -> type[Attack[Any]]:
        room = importlib.import_module(f"maodun.attacks.{_ROOM_OF[name]}")
        for thing in vars(room).values():
            if isinstance(thing, type) and issubclass(thing, Attack) and vars(thing).get("name") == name:
                return thing
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in _ROOM_OF

    def __iter__(self) -> Iterator[str]:
        return iter(_ROOM_OF)

    def __len__(self) -> int:
        return len(_ROOM_OF)


ATTACKS: Mapping[str, type[Attack[Any]]] = _Attacks()
"""The attack classes by name. Names cost nothing; a class is imported when it is looked up."""


@dataclass(frozen=True)
class Row:
    """One attack in words, for listings: norms, kind, access as the class declares them; `summary` is one sentence."""

    name: str
    norms: tuple[str, ...]
    kind: str
    targeted: bool
    access: str
    images_only: bool
    summary: str


def get_attack(name: str) -> type[Attack[Any]]:
    """Return the class called `name`; InputError with the nearest name when there is none."""
    if name in artifacts.KINDS:
        raise InputError(f"attack '{name}'", "is trained first", "maodun train RECIPE, then use file:PATH")
    if name not in ATTACKS:
        raise InputError(f"attack '{name}'", "is not an attack known here", nearest(name, list(ATTACKS)))
    return ATTACKS[name]


def build_attack(name: str, **options: Any) -> Attack[Any]:
    """Return the attack called `name` with `options`; those left out keep their defaults.

    Hooks joined by dashes, such as di-ti-mi, name the transfer attack with these.
    `file:PATH` is a trained attack (`maodun.attacks.artifacts`), whose options replace those it was saved with.
    Raises InputError for an unknown name (with the nearest one), an unknown option (with the known ones), an option of
    the wrong type, or a value that the attack itself refuses.
    """
    if name.startswith(artifacts.PREFIX):
        return artifacts.load_attack(name.removeprefix(artifacts.PREFIX), **options)
    if _TRANSFER_HOOKS.issuperset(name.split("-")):
        name, options = "transfer", {"hooks": name, **options}
    attack = get_attack(name)
    return attack(**checked(name, attack, options))


def checked(name: str, attack: type[Attack[Any]], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` of `attack` in the types it wants; InputError for one unknown or of the wrong type."""
    kinds = options_of(attack)
    return {option: _checked(name, kinds, option, value) for option, value in options.items()}


def options_of(attack: type[Attack[Any]]) -> dict[str, Any]:
    """Return the options of an attack class, name -> annotated type."""
    hints = typing.get_type_hints(attack)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(attack) if entry.init}


def describe() -> list[Row]:
    """Return one row per attack, in the order of the registry."""
    rows = []
    for name, attack in ATTACKS.items():
        summary = (inspect.getdoc(attack) or "").partition("\n")[0].rstrip(".")
        rows.append(Row(name, attack.norms, attack.kind, attack.can_target, attack.access, attack.images_only, summary))
    return rows


def _checked(name: str, kinds: dict[str, Any], option: str, value: Any) -> Any:
    if option not in kinds:
        known = ", ".join(sorted(kinds))
        raise InputError(f"option '{option}'", f"is not an option of {name}", f"known: {known}")
    kind = kinds[option]
    if not _fits(value, kind):
        reason = f"must be {_words(kind)}, got {type(value).__name__} {value!r}"
        raise InputError(f"option '{option}' of {name}", reason, "correct its value")
    choices = kind.__args__ if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)
    if float in choices and type(value) is int:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def _fits(value: Any, kind: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if origin is typing.Literal:
        return value in typing.get_args(kind)
    if origin is tuple:
        inner = [part for part in typing.get_args(kind) if part is not Ellipsis]
        return isinstance(value, tuple | list) and all(any(_fits(entry, part) for part in inner) for entry in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind is Any or not isinstance(kind, type) or isinstance(value, kind)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_words(choice) for choice in typing.get_args(kind))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "nothing"}
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in typing.get_args(kind))
    return names.get(kind, str(kind))
