"""What is typed after a command, turned into the recipe that the arena runs."""

from __future__ import annotations

import functools
import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from maodun.app import options as o

if TYPE_CHECKING:
    from maodun.arena.recipe import Recipe
    from maodun.core.errors import InputError


def wrong(thing: str, reason: str, remedy: str) -> InputError:
    """Return the error of an unusable word; its class comes with torch, which help should not wait for."""
    from maodun.core.errors import InputError

    return InputError(thing, reason, remedy)


def parse_value(text: str) -> Any:
    """Return `text` as the number, boolean, null or word that YAML reads it as."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def parse_options(pairs: Sequence[str], *, thing: str) -> dict[str, Any]:
    """Return {key: value} from "key=value" words; `thing` names the flag in the error for any other word."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key.strip() or not equals:
            raise wrong(f"{thing} '{pair}'", "is not of the form key=value", f"write {thing} steps=40, for example")
        options[key.strip().replace("-", "_")] = parse_value(value)
    return options


def parse_named(text: str, *, thing: str) -> tuple[str, dict[str, Any]]:
    """Return name and options of "name:key=value:key=value", as in "pgd:steps=10:restarts=2" or "file:PATH:draws=3"."""
    # The colon of a name such as score=zoo:score-mnist separates nothing, nor does that of scores=zoo:a+zoo:b.
    name, *pairs = re.split(r"(?<![=+]zoo)(?<![=+]witness):", text)
    if name.strip() == "file" and pairs:
        name, pairs = f"file:{pairs[0]}", pairs[1:]
    if not name.strip():
        raise wrong(f"{thing} '{text}'", "has no name", f"write {thing} pgd:steps=10, for example")
    return name.strip(), parse_options(pairs, thing=thing)


def parse_attacks(text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, options) for each attack in a comma-separated list, as in "pgd:steps=10,deepfool"."""
    return [parse_named(part, thing="--attack") for part in text.split(",") if part.strip()]


def parse_defenses(text: str) -> dict[str, Any]:
    """Return a shield's defence: one with its options, or a list where `text` names several, separated by commas."""
    parts = [parse_named(part, thing="--defense") for part in text.split(",") if part.strip()]
    if not parts:
        raise wrong("--defense", "names no defence", "choose from 'maodun list defenses', or leave it out")
    if len(parts) == 1:
        return {"defense": parts[0][0], "options": parts[0][1]}
    return {"defense": [{"name": name, "options": options} for name, options in parts]}


def parse_radii(text: str | None) -> list[float]:
    """Return the radii in a comma-separated list such as "4/255,8/255"; None is any radius."""
    from maodun.arena.recipe import parse_radius

    if text is None:
        return [parse_radius(None)]
    radii = []
    for part in text.split(","):
        try:
            radii.append(parse_radius(part.strip()))
        except ValueError as error:
            raise wrong(
                f"eps '{part.strip()}'", str(error), "give a radius >= 0 in [0, 1] input units, as 8/255"
            ) from None
    return radii


def parse_batch_size(text: str) -> int | None:
    """Return None for "auto", else the positive number of samples per batch."""
    if text.strip().lower() == "auto":
        return None
    try:
        size = int(text)
    except ValueError:
        size = 0
    if size < 1:
        raise wrong(f"--batch-size '{text}'", "is neither 'auto' nor a positive number", "leave it out for auto")
    return size


@dataclass(frozen=True, kw_only=True)
class Flags:
    """The flags that say what is run: with the code and the data they decide every number of the result."""

    model: o.Model
    data: o.Data
    norm: o.Norm = "linf"
    eps: o.Eps = None
    attack: o.Attack = "autoattack"
    weights: o.Weights = None
    model_option: o.ModelOption = None
    allow_remote: o.AllowRemote = False
    defense: o.Defense = "none"
    split: o.Split = "test"
    limit: o.Limit = None
    targeted: o.Targeted = False
    gradient: o.Gradient = None
    eot: o.Eot = 1
    surrogate: o.Surrogate = None
    fusion: o.Fusion = "logits"
    access: o.Access = None
    query_budget: o.Budget = None
    rule: o.Rule = "auto"
    draws: o.Draws = 10
    seed: o.Seed = 0
    batch_size: o.BatchSize = "auto"
    precision: o.Precision = "float32"
    channels_last: o.ChannelsLast = True
    compile: o.Compile = False

    def recipe(self, *, diagnostics: bool = False, adversarials: bool = True) -> Recipe:
        """Return the one-shield recipe these flags mean; raises InputError for what cannot be run.

        `diagnostics` runs the suspicion checks, `adversarials` keeps the adversarial inputs in the store.
        """
        from maodun.arena.recipe import make_recipe
        from maodun.arena.shield_recipe import usual_gradient

        attacks = parse_attacks(self.attack)
        if not attacks:
            raise wrong("--attack", "names no attack", "choose from 'maodun list attacks'")
        repeated = len({name for name, _ in attacks}) < len(attacks)
        defense = parse_defenses(self.defense)
        defended = defense["defense"] != "none" and not self.surrogate
        spears = [
            {
                "attack": name,
                "options": chosen,
                "gradient": self.gradient or usual_gradient(self.model, defended=defended),
                "eot": self.eot,
                "surrogate": [spec.strip() for spec in (self.surrogate or "").split(",") if spec.strip()],
                "fusion": self.fusion,
                "access": self.access,
                "budget": {"queries": self.query_budget},
                "name": _spell(name, chosen) if repeated else "",
            }
            for name, chosen in attacks
        ]
        shield = {
            "model": self.model,
            "weights": self.weights,
            "model_options": self._model_options(),
            **defense,
        }
        threats = [{"norm": self.norm, "eps": eps, "targeted": self.targeted} for eps in parse_radii(self.eps)]
        return make_recipe(
            {
                "name": f"{self.model} on {self.data}",
                "seed": self.seed,
                "data": {"spec": self.data, "split": self.split, "limit": self.limit},
                "threats": threats,
                "shields": [shield],
                "spears": spears,
                "verdict": {"rule": self.rule, "draws": self.draws},
                "adversarials": adversarials,
                "diagnostics": diagnostics,
                "compute": {
                    "precision": self.precision,
                    "batch_size": parse_batch_size(self.batch_size),
                    "channels_last": self.channels_last,
                    "compile": self.compile,
                },
            },
            source="command line",
        )

    def _model_options(self) -> dict[str, Any]:
        options = parse_options(self.model_option or (), thing="--model-option")
        if not self.allow_remote:
            return options
        if not is_service(self.model):
            raise wrong("--allow-remote", f"is of no use for '{self.model}'", "leave it out: nothing is sent anywhere")
        return {**options, "allow_remote": True}


def is_service(model: str) -> bool:
    """Say whether a specification names a service, every answer of which may cost somebody something."""
    return model.startswith(("http:", "https:"))


def _spell(name: str, options: dict[str, Any]) -> str:
    return ":".join([name, *(f"{key}={value}" for key, value in options.items())])


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(Flags):
    """The flags of `evaluate`: those of every run, and whether its result is doubted."""

    diagnostics: o.Diagnostics = True


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The flags that say how a run is carried out: they change no number of it."""

    out: o.Out = None
    save: o.Save = None
    device: o.Device = "cpu"
    calibration: o.Calibration = False
    progress: o.Show = o.Progress.bar
    quiet: o.Quiet = False


def spell(command: str, *given: object) -> str:
    """Return the command line that gives these flags again, without those left at their defaults."""
    words = ["maodun", command]
    for flags in given:
        for field in fields(flags):  # type: ignore[arg-type]
            value, name = getattr(flags, field.name), "--" + field.name.replace("_", "-")
            if value == field.default or value is None:
                continue
            if isinstance(value, bool):
                words.append(name if value else name.replace("--", "--no-", 1))
                continue
            for item in value if isinstance(value, list | tuple) else [value]:
                words += [name, str(item)]
    return shlex.join(words)


def flags_of(function: Callable[..., None]) -> Callable[..., None]:
    """Give `function`, which takes dataclasses of flags, a flag per field: so no flag is written twice.

    The result takes the fields as keyword arguments, which is the form Typer reads flags from.
    """
    kinds = [kind for name, kind in get_type_hints(function).items() if name != "return"]

    @functools.wraps(function)
    def command(**words: Any) -> None:
        function(*(kind(**{field.name: words[field.name] for field in fields(kind)}) for kind in kinds))

    parameters = []
    for kind in kinds:
        hints = get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            word = inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
            )
            parameters.append(word)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {word.name: word.annotation for word in parameters}
    del command.__wrapped__
    return command
