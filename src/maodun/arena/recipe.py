"""Arena recipes: what to run, as data a person can write, read back and hash."""

from __future__ import annotations

import hashlib
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from maodun.arena.shield_recipe import DefensePart, MemberSpec, ShieldSpec
from maodun.core.errors import InputError, nearest


def parse_radius(value: object) -> float:
    """Return a radius given as a number, as "8/255", as "inf" or as None (no radius: infinity).

    Raises ValueError for anything else, for NaN and for negative numbers.
    """
    if value is None:
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("a radius is a number or a fraction such as 8/255")
    try:
        number = float(Fraction(value.replace(" ", ""))) if isinstance(value, str) and "/" in value else float(value)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"'{value}' is not a number or a fraction such as 8/255") from error
    if math.isnan(number) or number < 0:
        raise ValueError(f"a radius cannot be {value}")
    return number


def format_radius(eps: float | None) -> str:
    """Return `eps` as people write it: "8/255" for whole numbers of 8-bit levels, else the short decimal."""
    if eps is None or math.isinf(eps):
        return "inf"
    levels = eps * 255
    if levels >= 0.5 and abs(levels - round(levels)) < 1e-6 and len(f"{eps:g}") > 5:
        return f"{round(levels)}/255"
    return f"{eps:g}"


# JSON has no infinity, so an absent radius is null there and in the recipe's hash.
Radius = Annotated[
    float,
    BeforeValidator(parse_radius),
    PlainSerializer(lambda eps: None if math.isinf(eps) else eps, return_type=float | None),
]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSpec(_Part):
    """Which samples: a data specification of the zoo, its split and at most `limit` samples (None: all)."""

    spec: str
    split: str = "test"
    limit: int | None = Field(default=None, ge=1)


class ThreatSpec(_Part):
    """What the adversary may change: norm, radius (None: unbounded; pixels for flow), whether it must reach a class.

    `goal` says how the class is chosen when `targeted`: at random among the wrong ones, or the least or
    most likely wrong class of the clean prediction.
    """

    norm: Literal["linf", "l2", "l1", "l0", "flow"]
    eps: Radius = math.inf
    targeted: bool = False
    goal: Literal["random", "least_likely", "most_likely"] = "random"

    @property
    def label(self) -> str:
        """A short name such as "linf 8/255" or "l2 0.5 targeted"."""
        return f"{self.norm} {format_radius(self.eps)}" + (" targeted" if self.targeted else "")


class BudgetSpec(_Part):
    """The most calls one sample may cost (None: no limit)."""

    forwards: int | None = Field(default=None, ge=0)
    backwards: int | None = Field(default=None, ge=0)
    queries: int | None = Field(default=None, ge=0)


def _several(value: object) -> object:
    """Return one text as a list of one."""
    return [value] if isinstance(value, str) else value


class SpearSpec(_Part):
    """How it is attacked: an attack with its options, its gradient estimator, EOT draws, access and budget.

    `gradient` auto leaves the estimator to the plan, which reads what every part of the shield declares.
    `eot` is the number of draws averaged per gradient (1: no averaging; with auto: as many as the plan thinks fit);
    `access` None means what the attack needs; `norms` restricts the spear to the threats of these norms. With
    `surrogate` (model specifications) the search sees these models instead of the shield, several as an ensemble of
    mean logits or probabilities (`fusion`), and what it ends with is judged on the shield. With `seed_known` the
    search knows the first draw that the verdict will make, and attacks that fixed function; all draws judge it.
    """

    attack: str
    name: str = ""
    options: dict[str, Any] = Field(default_factory=dict)
    gradient: Literal["auto", "exact", "bpda", "surrogate", "adjoint", "nes", "spsa"] = "exact"
    gradient_options: dict[str, Any] = Field(default_factory=dict)
    eot: int = Field(default=1, ge=1)
    access: Literal["gradient", "scores", "decision"] | None = None
    budget: BudgetSpec = BudgetSpec()
    norms: tuple[Literal["linf", "l2", "l1", "l0", "flow"], ...] | None = None
    surrogate: Annotated[tuple[str, ...], BeforeValidator(_several)] = ()
    fusion: Literal["logits", "probabilities"] = "logits"
    seed_known: bool = False

    @property
    def origin(self) -> str:
        """The surrogates in short, as "cifar10-vgg + cifar10-densenet"; empty without."""
        return " + ".join(spec.partition(":")[2] or spec for spec in self.surrogate)

    @property
    def label(self) -> str:
        """The given name, or the attack's with its estimator and surrogates."""
        extra: list[str] = [self.gradient] if self.gradient != "exact" else []
        extra += [f"eot {self.eot}"] if self.eot > 1 else []
        extra += [self.fusion] if self.fusion != "logits" else []
        extra += ["seed known"] if self.seed_known else []
        words = self.attack + (f" ({', '.join(extra)})" if extra else "")
        return self.name or (f"{words} from {self.origin}" if self.surrogate else words)


class VerdictSpec(_Part):
    """How success is decided: rule and number of fresh draws.

    "auto" is a single draw for deterministic shields and the majority of ten draws for stochastic ones.
    """

    rule: Literal["auto", "single", "mean", "majority", "worst"] = "auto"
    draws: int = Field(default=10, ge=1)


class ComputeSpec(_Part):
    """How the search is computed; only `precision` may change results, so it alone is in the identity."""

    precision: Literal["float32", "bf16"] = "float32"
    batch_size: int | None = Field(default=None, ge=1)
    channels_last: bool = True
    compile: bool = False


_CONDUCT = ("timeout", "retries", "backoff", "rate", "burst", "concurrency", "batch", "most", "allow_remote", "journal")


class Recipe(_Part):
    """A whole run: every spear against every shield under every threat on one set of samples.

    `shard_size` samples are one unit of resumable work. `adversarials` keeps the adversarial inputs in the
    store. `diagnostics` runs the cheap suspicion checks on a small fixed subset; "thorough"
    doubles it and tries every remedy.
    """

    name: str = "run"
    seed: int = 0
    data: DataSpec
    threats: tuple[ThreatSpec, ...] = Field(min_length=1)
    shields: tuple[ShieldSpec, ...] = Field(min_length=1)
    spears: tuple[SpearSpec, ...] = Field(min_length=1)
    verdict: VerdictSpec = VerdictSpec()
    shard_size: int = Field(default=256, ge=1)
    adversarials: bool = True
    diagnostics: bool | Literal["thorough"] = True
    compute: ComputeSpec = ComputeSpec()

    def identity(self) -> dict[str, Any]:
        """Return what decides the records: all but how they are computed and whether they are diagnosed."""
        plain: dict[str, Any] = self.model_dump(mode="json")
        plain["precision"] = plain.pop("compute")["precision"]
        for shield in plain["shields"]:
            for each in (shield, *shield["members"]):
                if each["model"].startswith(("http:", "https:")):
                    # How a service is treated changes no answer of it: a run may go on at another pace.
                    each["model_options"] = {k: v for k, v in each["model_options"].items() if k not in _CONDUCT}
            if not shield["members"]:
                # Runs of before there were ensembles keep their identity.
                del shield["members"], shield["fusion"], shield["subset"]
        for spear in plain["spears"]:
            if not spear["surrogate"]:
                # Runs of before there were surrogates keep their identity.
                del spear["surrogate"], spear["fusion"]
            if not spear["seed_known"]:
                del spear["seed_known"]
        del plain["diagnostics"]
        return plain

    def digest(self) -> str:
        """Return the SHA-256 of the identity as 64 hexadecimal digits."""
        text = json.dumps(self.identity(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()


# The model behind each top-level key, to name the nearest key a misspelt one could have meant.
_PARTS: dict[tuple[str, ...], type[BaseModel]] = {
    (): Recipe,
    ("data",): DataSpec,
    ("threats",): ThreatSpec,
    ("shields",): ShieldSpec,
    ("shields", "defense"): DefensePart,
    ("shields", "members"): MemberSpec,
    ("spears",): SpearSpec,
    ("spears", "budget"): BudgetSpec,
    ("verdict",): VerdictSpec,
    ("compute",): ComputeSpec,
}

_Place = tuple[str | int, ...]


def make_recipe(content: object, *, source: str = "recipe", lines: dict[_Place, int] | None = None) -> Recipe:
    """Return the recipe described by a mapping; `lines` gives the line of each place for the error message.

    Raises InputError naming the first wrong key or value, its line when known, and the nearest known key.
    """
    if not isinstance(content, dict):
        raise InputError(source, "is not a mapping of keys to values", "start from a file of recipes/")
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise _explained(error, source, lines or {}) from None
    for kind, labels in (
        ("threats", [threat.label for threat in recipe.threats]),
        ("shields", [shield.label for shield in recipe.shields]),
        ("spears", [spear.label for spear in recipe.spears]),
    ):
        for number, label in enumerate(labels):
            if label in labels[:number]:
                where = _where(source, (kind, number), lines or {})
                raise InputError(where, f"two {kind} are called '{label}'", "give one of them another name")
    return recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a YAML file (any fsspec path); raises InputError with the line number."""
    import fsspec

    source = str(path)
    try:
        with fsspec.open(source, "r", encoding="utf-8") as file:
            text = file.read()
    except (OSError, ValueError) as error:
        raise InputError(source, f"cannot be read ({error})", "give the path of a YAML recipe") from error
    return parse_recipe(text, source=source)


def parse_recipe(text: str, *, source: str = "recipe") -> Recipe:
    """Return the recipe written in YAML `text`; raises InputError with the line number."""
    lines: dict[_Place, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source} line {mark.line + 1}" if mark is not None else source
        reason = getattr(error, "problem", None) or "not valid YAML"
        raise InputError(where, f"is not valid YAML ({reason})", "check indents, colons and quotes") from None
    if node is not None:
        _index(node, (), lines, source)
    return make_recipe(content, source=source, lines=lines)


def _index(node: yaml.Node, place: _Place, lines: dict[_Place, int], source: str) -> None:
    """Note the line of every key and item below `node`; YAML itself silently keeps the last of two keys."""
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(key.value))
            line = key.start_mark.line + 1
            if inner in lines:
                reason = f"key '{key.value}' was already given on line {lines[inner]}"
                raise InputError(f"{source} line {line}", reason, "keep one of the two")
            lines[inner] = line
            _index(value, inner, lines, source)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _index(item, (*place, number), lines, source)


def _where(source: str, place: _Place, lines: dict[_Place, int]) -> str:
    while place and place not in lines:
        place = place[:-1]
    return f"{source} line {lines[place]}" if place in lines else source


def _explained(error: ValidationError, source: str, lines: dict[_Place, int]) -> InputError:
    """Turn the first complaint into one line; a misspelt key comes before the key it leaves missing."""
    first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
    place: _Place = first["loc"]
    where = _where(source, place, lines)
    parent = _PARTS.get(tuple(part for part in place[:-1] if isinstance(part, str)))
    known = list(parent.model_fields) if parent is not None else []
    name = ".".join(str(part) for part in place)
    if first["type"] == "extra_forbidden":
        return InputError(where, f"unknown key '{name}'", nearest(str(place[-1]), known))
    if first["type"] == "missing":
        return InputError(where, f"key '{name}' is missing", f"add it; {nearest('', known)}")
    if first["type"] == "literal_error":
        return InputError(where, f"'{name}' cannot be '{first['input']}'", f"use {first['ctx']['expected']}")
    reason = str(first["msg"]).removeprefix("Value error, ")
    return InputError(where, f"'{name}' is wrong ({reason})", "correct the value")
