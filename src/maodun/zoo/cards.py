"""Model cards: where weights come from, how they were made, and what was measured on them."""

from __future__ import annotations

import hashlib
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Measured(BaseModel):
    """One number with everything needed to get it again.

    `value`, `low` and `high` are shares in [0, 1] (a 95 % interval) unless `unit` says otherwise; `n` samples, `seed`,
    and the `command` that printed it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    n: int
    seed: int = 0
    command: str
    unit: str = "share"


class ModelCard(BaseModel):
    """One entry of the zoo.

    `kind` is "shipped" (weights in the package), "checkout" (weights in the folder weights/ of the repository, which an
    installed package does not have) or "witness" (weights under $MAODUN_DATA/weights, trained by others).
    `weights` is the file's name and `sha256` its hash; `options` are arguments of the `architecture`; `data` the data
    set it belongs to; `recipe` the training recipe that remakes it; `measured` what was found with this software and
    `published` what others reported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["shipped", "checkout", "witness"]
    summary: str
    architecture: str
    options: dict[str, Any] = Field(default_factory=dict)
    weights: str
    sha256: str
    parameters: int
    data: str
    provenance: str
    licence: str
    recipe: str | None = None
    measured: tuple[Measured, ...] = ()
    published: tuple[str, ...] = ()

    @property
    def spec(self) -> str:
        """The text that load_model takes: zoo:NAME or witness:NAME."""
        return f"{'witness' if self.kind == 'witness' else 'zoo'}:{self.name}"

    @property
    def available(self) -> bool:
        """Whether the weights can be read now."""
        path = self.path()
        return path is not None and path.is_file()

    def path(self) -> Path | None:
        """Return where the weights are; None for a witness without MAODUN_DATA, and for "checkout" outside one."""
        if self.kind == "shipped":
            return Path(str(resources.files("maodun.zoo") / "weights" / self.weights))
        if self.kind == "checkout":
            home = checkout()
            return None if home is None else home / "weights" / self.weights
        root = os.environ.get("MAODUN_DATA")
        return Path(root).expanduser() / "weights" / self.weights if root else None


def checkout() -> Path | None:
    """Return the root of the repository this package is imported from, None when it is installed elsewhere."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "maodun").is_dir() else None


@cache
def all_cards() -> tuple[ModelCard, ...]:
    """Return every card of the package, sorted by spec."""
    folder = resources.files("maodun.zoo") / "cards"
    cards = [
        ModelCard.model_validate(yaml.safe_load(entry.read_text(encoding="utf-8")))
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    ]
    return tuple(sorted(cards, key=lambda card: card.spec))


def list_models() -> list[ModelCard]:
    """Return the cards of all models that can be loaded by name: the shipped ones and the witnesses."""
    return list(all_cards())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
