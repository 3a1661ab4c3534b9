"""What `maodun list` and `maodun version` print."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.table import Table

from maodun.app.tables import console

# What a published number is printed with: these decide it, the rest only carries it.
_DECIDES = ("maodun", "torch", "numpy", "scipy", "scikit-learn", "pillow")


def _table(*headers: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def first_sentence(thing: object) -> str:
    """Return the first line of a docstring, without its full stop."""
    text = inspect.getdoc(thing) or ""
    return text.partition("\n")[0].rstrip(".")


def _yes(flag: object) -> str:
    return "yes" if flag else ""


def _attacks() -> Table:
    from maodun.attacks.registry import ATTACKS

    table = _table("attack", "norms", "kind", "access", "targeted", "what it does")
    for name, attack in sorted(ATTACKS.items()):
        norms = " ".join(getattr(attack, "norms", ()))
        kind, access = getattr(attack, "kind", ""), str(getattr(attack, "access", ""))
        targeted = _yes(getattr(attack, "supports_targeted", False))
        table.add_row(name, norms, kind, access, targeted, first_sentence(attack))
    return table


def _defenses() -> Table:
    from maodun.defenses import DEFENSES

    table = _table("defence", "what it does")
    for name, defense in sorted(DEFENSES.items()):
        table.add_row(name, first_sentence(defense))
    return table


def _cards(kind: str) -> Table:
    from maodun import zoo

    cards: list[Any] = list(zoo.list_models() if kind == "models" else zoo.list_data())
    table = _table(kind.rstrip("s"), "what it is")
    for card in cards:
        table.add_row(str(card.name), str(card.summary))
    return table


def recipe_files(folder: Path = Path("recipes")) -> list[Path]:
    """Return the recipes of the folder one stands in, or of the checkout this package runs from."""
    here = folder if folder.is_dir() else Path(__file__).parents[3] / "recipes"
    return sorted(here.rglob("*.yaml"))


def _recipes() -> Table:
    table = _table("recipe", "what it runs")
    for path in recipe_files():
        comment = [line[1:].strip() for line in path.read_text("utf-8").splitlines()[:1] if line.startswith("#")]
        table.add_row(str(path), "".join(comment))
    return table


def show(thing: str) -> None:
    """Print the table of attacks, defenses, models, data or recipes."""
    makers: dict[str, Callable[[], Table]] = {
        "attacks": _attacks,
        "defenses": _defenses,
        "models": lambda: _cards("models"),
        "data": lambda: _cards("data"),
        "recipes": _recipes,
    }
    console().print(makers[thing]())


def show_versions() -> None:
    """Print one line per package that decides a number, and the Python and machine it runs on."""
    table = _table("package", "version")
    for name in _DECIDES:
        try:
            table.add_row(name, version(name))
        except PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("python", platform.python_version())
    table.add_row("machine", f"{platform.system()} {platform.machine()}")
    console().print(table)
