"""Recipes of the multi-task experiment: one set of images, all tasks at once, one row per attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maodun.arena.recipe import Radius
from maodun.core.errors import InputError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ImagesSpec(_Part):
    """How many test images of each source: CamVid street scenes, Penn-Fudan people, CIFAR-10 things."""

    street: int = Field(default=40, ge=2)
    people: int = Field(default=40, ge=2)
    things: int = Field(default=200, ge=2)
    gallery: int = Field(default=1000, ge=10)


class RowSpec(_Part):
    """One attack: `attack` is a registered name, "noise", "uap", "relation-generator", "ltp" or "oracle".

    `space` is what it searches in: the surrogate classifier or a relation module (of texture or of views, or a
    control). `options` are the attack's.
    """

    name: str
    attack: str
    space: Literal["surrogate", "relation", "relation-pca", "relation-random", "views", "views-random"] = "surrogate"
    options: dict[str, Any] = Field(default_factory=dict)


class MultitaskRecipe(_Part):
    """Images, networks, attacks. `weights` is the folder of the task networks: what is missing there is trained.

    `eps` is the linf radius in input units; `reference` names the row that is compared with every other one by a
    paired bootstrap of `resamples` draws.
    """

    name: str
    seed: int = 0
    eps: Radius = 16 / 255
    images: ImagesSpec = ImagesSpec()
    surrogate: str = "zoo:cifar10-vgg"
    classifier: str = "zoo:cifar10-resnet8"
    embedder: str = "zoo:cifar10-inception"
    weights: str = "weights/multitask"
    relation_steps: int = Field(default=260, ge=1)
    view_steps: int = Field(default=350, ge=1)
    generator_steps: int = Field(default=150, ge=1)
    reference: str
    resamples: int = Field(default=2000, ge=100)
    rows: tuple[RowSpec, ...]


def load_multitask_recipe(path: str | Path) -> MultitaskRecipe:
    """Return the recipe in a YAML file; InputError when it cannot be read, or names a row twice or not at all."""
    thing = f"recipe '{path}'"
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        recipe = MultitaskRecipe.model_validate(content)
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(thing, f"it cannot be read ({type(error).__name__})", "check the path and the file") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(thing, f"{place}: {first['msg']}", "see recipes/multi-task.yaml") from error
    names = [row.name for row in recipe.rows]
    if len(set(names)) < len(names):
        raise InputError(thing, "two rows have the same name", "give each its own")
    if recipe.reference not in names:
        raise InputError(thing, f"there is no row '{recipe.reference}' to refer to", "name one of the rows")
    return recipe
