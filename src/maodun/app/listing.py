"""What `maodun list` and `maodun version` print."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.table import Table

from maodun.app.consoles import console
from maodun.core.errors import InputError

# What a published number is printed with: these decide it, the rest only carries it.
_DECIDES = ("maodun", "torch", "numpy", "scipy", "scikit-learn", "pillow")


def _table(*headers: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold")
    return table


def _yes(flag: bool) -> str:
    return "yes" if flag else ""


def _attacks() -> Table:
    from maodun.attacks.registry import describe

    table = _table("attack", "norms", "kind", "access", "targeted", "images only", "what it does")
    for row in describe():
        flags = _yes(row.targeted), _yes(row.images_only)
        table.add_row(row.name, " ".join(row.norms), row.kind, row.access, *flags, row.summary)
    return table


def _defenses() -> Table:
    from maodun.defenses.registry import DEFENSES

    table = _table("defence", "what it does")
    for name, defense in DEFENSES.items():
        table.add_row(name, (inspect.getdoc(defense) or "").partition("\n")[0].rstrip("."))
    return table


def _models() -> Table:
    from maodun.zoo.cards import list_models

    table = _table("model", "data", "parameters", "here", "what it is")
    for card in list_models():
        here = "yes" if card.available else "needs MAODUN_DATA"
        table.add_row(card.spec, card.data, f"{card.parameters:,}", here, card.summary)
    table.caption_justify = "left"
    table.caption = (
        "Also: package.module:factory, file.py:factory, torchscript:FILE, exported:FILE, torchvision:NAME, timm:NAME, "
        "transformers:ID; and without gradients onnx:FILE, sklearn:file.py:factory, http://HOST/PATH."
    )
    return table


def _scores() -> Table:
    from maodun.zoo.scores import list_scores

    table = _table("score network", "data", "images", "parameters", "here", "what it is")
    for card in list_scores():
        path, shape = card.path(), " x ".join(str(side) for side in card.shape)
        here = "yes" if path is not None and path.is_file() else "no"
        table.add_row(card.spec, card.data, shape, f"{card.parameters:,}", here, card.summary)
    return table


def _data() -> Table:
    from maodun.zoo.data import list_data

    table = _table("data", "here", "what it is")
    for info in list_data():
        table.add_row(info.spec, "yes" if info.available else "no", info.summary)
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


def _trained(folder: str) -> Table:
    from maodun.attacks.artifacts import list_artifacts

    table = _table("file", "attack", "inputs", "norm", "eps", "trained as")
    for file, header in list_artifacts(folder):
        options = header["options"]
        shape = " x ".join(str(side) for side in options.get("shape", ()))
        row = str(file), header["kind"], shape, str(options.get("norm", "")), str(options.get("eps", ""))
        table.add_row(*row, str(header["about"].get("name", "")))
    return table


def show(thing: str, folder: str | None = None) -> None:
    """Print the table of attacks, defenses, models, data or recipes; with `folder`, of the attacks trained into it."""
    if folder is not None:
        if thing != "attacks":
            raise InputError("--from", f"does not go with {thing}", "maodun list attacks --from FOLDER")
        console().print(_trained(folder))
        return
    makers: dict[str, Callable[[], Table]] = {
        "attacks": _attacks,
        "defenses": _defenses,
        "models": _models,
        "scores": _scores,
        "data": _data,
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
