"""Score networks by name: where their weights lie, how they were made, and what was measured on them."""

from __future__ import annotations

import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict

from maodun.core.errors import InputError, nearest
from maodun.zoo.cards import Measured, checkout, file_sha256

PREFIXES = ("zoo:", "witness:")


class ScoreCard(BaseModel):
    """One score network of the zoo.

    `kind` is "checkout" (weights in the folder weights/ of the repository) or "witness" (weights under
    $MAODUN_DATA/weights, trained by others). `weights` is the file's name and `sha256` its hash; `shape` (C, H, W) the
    images it takes; `data` what it was trained on; `recipe` the training recipe that remakes it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    kind: Literal["checkout", "witness"] = "checkout"
    summary: str
    weights: str
    sha256: str
    parameters: int
    shape: tuple[int, int, int]
    data: str
    provenance: str
    licence: str
    recipe: str | None = None
    measured: tuple[Measured, ...] = ()

    @property
    def spec(self) -> str:
        """The text that names it: zoo:NAME or witness:NAME."""
        return f"{'witness' if self.kind == 'witness' else 'zoo'}:{self.name}"

    def path(self) -> Path | None:
        """Return where the weights are; None outside a checkout, and for a witness without MAODUN_DATA."""
        if self.kind == "checkout":
            home = checkout()
            return None if home is None else home / "weights" / self.weights
        root = os.environ.get("MAODUN_DATA")
        return Path(root).expanduser() / "weights" / self.weights if root else None


@cache
def list_scores() -> tuple[ScoreCard, ...]:
    """Return the cards of all score networks, sorted by spec."""
    folder = resources.files("maodun.zoo") / "score_cards"
    cards = [
        ScoreCard.model_validate(yaml.safe_load(entry.read_text(encoding="utf-8")))
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    ]
    return tuple(sorted(cards, key=lambda card: card.spec))


def find_score(text: str) -> str:
    """Return the file that `text` names: zoo:NAME or witness:NAME become a path, anything else stays as it is.

    Errors: InputError for an unknown name (with the nearest one), weights that are not there, and weights whose hash
    is not the card's.
    """
    if not text.startswith(PREFIXES):
        return text
    card = next((each for each in list_scores() if each.spec == text), None)
    if card is None:
        known = [each.spec for each in list_scores()]
        raise InputError(f"score network '{text}'", "there is none of that name", nearest(text, known))
    path = card.path()
    if path is None or not path.is_file():
        remedy = (
            f"export MAODUN_DATA=/path so that weights/{card.weights} is in it"
            if card.kind == "witness"
            else f"install from a checkout (pip install -e .), or train it: maodun train {card.recipe}"
        )
        raise InputError(f"score network '{text}'", "its weights are not on this machine", remedy)
    found = file_sha256(path)
    if found != card.sha256:
        reason = f"their SHA-256 begins {found[:12]}, the card says {card.sha256[:12]}"
        raise InputError(f"weights '{path}'", reason, "restore the original file")
    return str(path)
