"""Training recipes: what to train, on what, and for how long, as data a person can write and read back."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from maodun.arena.objectives import InnerAttack, ObjectiveSpec
from maodun.arena.shield_recipe import DefensePart
from maodun.core.errors import InputError, nearest


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainData(_Part):
    """The training split of `spec`; `validation` in (0, 1) is the share of every class held out to choose the epoch."""

    spec: str
    split: str = "train"
    limit: int | None = Field(default=None, ge=1)
    validation: float = Field(default=0.1, gt=0, lt=1)


class AugmentSpec(_Part):
    """Random shifts by up to `shift` pixels, mirror images when `flip`, and CutMix with probability `cutmix`."""

    shift: int = Field(default=0, ge=0)
    flip: bool = False
    cutmix: float = Field(default=0.0, ge=0, le=1)


class FitSpec(_Part):
    """The arguments of maodun.defenses.training.FitSettings."""

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=1)
    rate: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.2, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1)
    schedule: Literal["one-cycle", "cosine", "piecewise"] = "one-cycle"
    milestones: tuple[int, ...] = ()
    factor: float = Field(default=0.1, gt=0)
    accumulate: int = Field(default=1, ge=1)
    guard: float = Field(default=0.0, ge=0, lt=1)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    channels_last: bool = False
    swa: float = Field(default=0.0, ge=0, lt=1)
    compile: str | None = None


class CardSpec(_Part):
    """What the model card says beyond what the recipe and the measurements say; `kind` is where the weights lie."""

    kind: Literal["shipped", "checkout"] = "shipped"
    summary: str
    provenance: str
    licence: str = "MIT"
    data: str


class MeasureSpec(_Part):
    """What is measured on the test split when training is over: clean accuracy, and robust accuracy against `inner`."""

    limit: int | None = Field(default=1000, ge=1)
    inner: InnerAttack | None = None


def _named(value: object) -> object:
    """Return the name of a defence as one without options."""
    return {"name": value} if isinstance(value, str) else value


class TrainRecipe(_Part):
    """A whole training run; equal recipes give equal weights on the same machine with the same number of threads.

    The epoch is chosen on samples held out of the training split: by robust accuracy against `select` when given, by
    clean accuracy otherwise. The test split is only measured at the end. `weights` float16 rounds the finished weights
    to half precision, halving the file; what is measured is the rounded model.

    A `defense` (its name, or name and options) stands in front of the network, or in it, while it is trained, chosen
    and measured. The weights are the network's alone: whoever uses them puts the defence there again.

    `sweep` makes one file many recipes (`each`): a dotted key and the values it takes, as
    {objective.temperature: [1, 10, 100]}; the value replaces {temperature} in `name` and in the card's summary.
    """

    name: str
    seed: int = 0
    data: TrainData
    architecture: str
    options: dict[str, Any] = Field(default_factory=dict)
    defense: Annotated[DefensePart | None, BeforeValidator(_named)] = None
    objective: ObjectiveSpec = ObjectiveSpec()
    select: InnerAttack | None = None
    augment: AugmentSpec = AugmentSpec()
    fit: FitSpec = FitSpec()
    measure: MeasureSpec = MeasureSpec()
    weights: Literal["float32", "float16"] = "float32"
    sweep: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    card: CardSpec

    def each(self) -> list[TrainRecipe]:
        """Return a recipe for every combination of the sweep's values; the recipe itself when there is none.

        Raises InputError for a key that leads nowhere, a value that does not fit, or names that would be the same.
        """
        if not self.sweep:
            return [self]
        made = [self._with(dict(zip(self.sweep, values, strict=True))) for values in product(*self.sweep.values())]
        names = [recipe.name for recipe in made]
        if len(set(names)) < len(names):
            holes = ", ".join("{" + key.rpartition(".")[2] + "}" for key in self.sweep)
            raise InputError(f"sweep of '{self.name}'", "several of its recipes have one name", f"put {holes} into it")
        return made

    def _with(self, values: dict[str, Any]) -> TrainRecipe:
        content = self.model_dump(mode="json", exclude={"sweep"})
        for key, value in values.items():
            *parents, last = key.split(".")
            part: Any = content
            for parent in parents:
                part = part.get(parent) if isinstance(part, dict) else None
            if not isinstance(part, dict) or last not in part:
                raise InputError(f"sweep of '{self.name}'", f"'{key}' leads nowhere", "give a key of the recipe")
            part[last] = value
            for place, name in ((content, "name"), (content["card"], "summary")):
                place[name] = place[name].replace("{" + last + "}", f"{value}")
        try:
            return TrainRecipe.model_validate(content)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"sweep of '{self.name}'", f"{values} does not fit ({reason})", "correct it") from error


def load_train_recipe(path: str | Path) -> TrainRecipe:
    """Return the training recipe of a YAML file; InputError names the file, the line and what is wrong."""
    recipe = read_recipe(path, TrainRecipe)
    for each in recipe.each():
        each.objective.check(f"recipe '{path}'")
    return recipe


def trains_attack(path: str | Path) -> bool:
    """Tell whether the YAML file at `path` describes an attack to be trained: its top level names one."""
    content, _ = _yaml(path)
    return isinstance(content, dict) and "attack" in content


def _yaml(path: str | Path) -> tuple[Any, yaml.Node | None]:
    source = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
        return yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as error:
        raise InputError(f"recipe '{source}'", f"it cannot be read ({error.strerror})", "check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"recipe '{source}'" + (f", line {mark.line + 1}" if mark else "")
        raise InputError(where, "it is not valid YAML", "check indents, colons and quotes") from error


R = TypeVar("R", bound=BaseModel)


def read_recipe(path: str | Path, kind: type[R]) -> R:
    """Return the YAML file at `path` as a `kind`; InputError names the file, the line and what is wrong."""
    source = str(path)
    content, node = _yaml(path)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        where = f"recipe '{source}', line {_line(node, first['loc'])}"
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = _known(kind, first["loc"][:-1])
            raise InputError(where, f"unknown key '{name}'", nearest(str(first["loc"][-1]), known)) from error
        raise InputError(where, f"'{name}' is wrong ({first['msg']})", "correct the value") from error


def _line(node: yaml.Node | None, place: tuple[str | int, ...]) -> int:
    """Return the line (from 1) of the deepest key of `place` that the file has."""
    line = 1
    for part in place:
        if not isinstance(node, yaml.MappingNode):
            break
        pair = next(((key, value) for key, value in node.value if key.value == part), None)
        if pair is None:
            break
        line, node = pair[0].start_mark.line + 1, pair[1]
    return line


def _known(model: type[BaseModel], place: tuple[str | int, ...]) -> list[str]:
    """Return the keys allowed at `place` of a recipe."""
    for part in place:
        if isinstance(part, int):
            # One of a list: its kind is the list's.
            continue
        annotation = model.model_fields[part].annotation
        choices = [annotation, *getattr(annotation, "__args__", ())]
        model = next((each for each in choices if isinstance(each, type) and issubclass(each, BaseModel)), model)
    return list(model.model_fields)
