"""The two doors for people who write Python: search adversarial inputs, or evaluate a model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maodun.arena.commands import GIVEN
from maodun.arena.fallback import falls_back, or_static
from maodun.arena.plan import access, build, estimator, refuse_unsupported
from maodun.arena.progress import Watcher
from maodun.arena.recipe import Recipe, ThreatSpec, make_recipe, parse_radius
from maodun.arena.run import run
from maodun.arena.shield_recipe import usual_gradient
from maodun.arena.store import Store
from maodun.arena.strategy import derive, resolved
from maodun.arena.summary import RunSummary
from maodun.arena.surrogates import fused, load_surrogate
from maodun.attacks.artifacts import TrainedAttack
from maodun.core.engine import Attack, Candidates, Progress
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat

if TYPE_CHECKING:
    from maodun.zoo import Dataset, LoadedModel

Spear = str | dict[str, Any] | Attack[Any]
Surrogates = str | nn.Module | Sequence[str | nn.Module]


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    name: str,
    *,
    norm: str,
    eps: float | str | None = None,
    targets: Tensor | None = None,
    gradient: str = "exact",
    eot: int = 1,
    surrogate: Surrogates | None = None,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    precision: str = "float32",
    progress: Progress | None = None,
    **options: Any,
) -> Candidates:
    """Search adversarial inputs for `x` (N x ..., [0, 1]) with labels `y` (N,), on the model's device.

    `name` is an attack of `maodun list attacks` and `options` are its own, as `steps=40`. `eps` may be a fraction in
    words, "8/255"; None leaves the radius open for least-distance attacks. `targets` (N,) ask for given classes.
    `gradient` is exact, bpda, surrogate, adjoint (these two for purifiers), nes or spsa, averaged over `eot` draws, or
    auto: what the model's parts call for. With `surrogate` (a model, a specification or several of them, which make an
    ensemble) the search sees these instead of `model` and always goes its whole way.
    The result's `x_adv` holds the clean input where nothing was found. What it says of its own success is the search's
    opinion; `evaluate` gives the verdict.
    Raises InputError or UnsupportedError with a reason for what cannot be meant.
    """
    threat = _threat(norm, eps, targets is not None)
    content = {"attack": name, "options": options, "gradient": gradient, "eot": eot}
    spear = _recipe({"spears": [content]}).spears[0]
    chosen = build(spear)
    refuse_unsupported(spear, chosen, threat, tuple(x.shape[1:]))
    place = _device_of(model, x)
    stand_ins = {} if surrogate is None else _stand_ins(surrogate)
    seen = model
    if stand_ins:
        few = x[:2].to(place)
        loaded = {spec: load_surrogate(spec, few, {"model": model}, place, each) for spec, each in stand_ins.items()}
        seen = fused(loaded, spear.model_copy(update={"surrogate": tuple(loaded)}))
    also = falls_back(spear, chosen, seen) and not stand_ins
    spear = resolved(spear, derive(seen, eot))
    oracle = Oracle(
        seen,
        access=access(spear, chosen),
        gradient=estimator(spear),
        batch_size=batch_size,
        precision=precision,
        surrogate=bool(stand_ins),
    )
    samples = (x.to(place), y.to(place), Threat(threat.norm, threat.eps, threat.targeted))
    aims = None if targets is None else targets.to(place)
    found = chosen.run(oracle, *samples, targets=aims, seed=seed, ids=ids, progress=progress)
    if not also:
        return found
    return or_static(chosen, oracle, *samples, found, targets=aims, seed=seed, ids=ids, progress=progress)


def evaluate(
    model: nn.Module | LoadedModel | str,
    data: Dataset | str | tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    *,
    norm: str,
    eps: float | str | Sequence[float | str] | None = None,
    attack: Spear | Sequence[Spear] = "autoattack",
    targeted: bool = False,
    defense: str | Sequence[str | dict[str, Any]] = "none",
    defense_options: dict[str, Any] | None = None,
    gradient: str | None = None,
    eot: int = 1,
    surrogate: Surrogates | None = None,
    rule: str = "auto",
    draws: int = 10,
    limit: int | None = None,
    seed: int = 0,
    diagnostics: bool = True,
    batch_size: int | None = None,
    precision: str = "float32",
    out: str | Path | None = None,
    progress: str | Watcher = "quiet",
) -> RunSummary:
    """Attack `model` on `data` and return what is left of its accuracy, judged with fresh draws.

    `model` is any module from [0, 1] inputs to logits, or a specification such as "zoo:digits-cnn". `data` is a pair
    (x, y), an iterable of such pairs (a DataLoader), a Dataset, or a specification such as "digits". `defense` is a
    name, or a list of names and {name: options}, the first nearest to the input; `gradient` as for `attack`, by default
    auto where there is a `defense`, else exact. `eps` is one radius or several. `attack` is "pgd,deepfool", a name, an
    Attack, a recipe's spear as a mapping, or a list of these. `surrogate` (a model, a specification, or several) is
    what the spears search on instead of the model, which then only passes the verdict. With `out` the run is kept
    there, with its adversarial inputs, and resumed by the same call. The result's `robust` is the worst case over all
    attacks, `cells` has each of them, `findings` the suspicions.
    Raises InputError, UnsupportedError or StoreError with a reason.
    """
    samples = _samples(data, limit)
    module, spec = _module(model)
    shield = {"model": spec, "defense": defense, "options": defense_options or {}}
    described = _recipe({"shields": [shield], "spears": [{"attack": "pgd"}]}).shields[0]
    label = described.title.removeprefix(GIVEN)
    gradient = gradient or usual_gradient(spec, defended=bool(described.parts) and surrogate is None)
    radii = list(eps) if isinstance(eps, Sequence) and not isinstance(eps, str) else [eps]
    stand_ins = {} if surrogate is None else _stand_ins(surrogate)
    recipe = _recipe(
        {
            "name": f"{label} on {samples.spec}",
            "seed": seed,
            "data": {"spec": samples.spec, "limit": limit},
            "threats": [_threat(norm, radius, targeted).model_dump(mode="json") for radius in radii],
            "shields": [{"name": label, **shield}],
            "spears": [{"surrogate": list(stand_ins), **spear} for spear in _spears(attack, gradient, eot)],
            "verdict": {"rule": rule, "draws": draws},
            "diagnostics": diagnostics,
            "adversarials": out is not None,
            "compute": {"batch_size": batch_size, "precision": precision},
        }
    )
    place = "cpu" if module is None else str(_device_of(module, samples.x))
    models = None if module is None else {label: module}
    given = {spec: each for spec, each in stand_ins.items() if each is not None}
    names = ",".join(spear.label for spear in recipe.spears)
    line = f'maodun.evaluate({label}, {samples.spec}, norm="{norm}", eps={eps!r}, attack="{names}", seed={seed})'
    start = functools.partial(
        run, recipe, progress=progress, command=line, device=place, models=models, surrogates=given, data=samples
    )
    return start(out) if out is not None else _passing(start)


def _passing(start: Callable[[str], RunSummary]) -> RunSummary:
    """Run in a folder in memory, and clear it away whatever happens."""
    folder = f"memory://maodun/{uuid.uuid4().hex}"
    try:
        return start(folder)
    finally:
        store = Store(folder)
        if store.fs.exists(store.root):
            store.fs.rm(store.root, recursive=True)


def _recipe(content: dict[str, Any]) -> Recipe:
    """Return a recipe from the parts at hand; what is not given is filled in for the checks' sake."""
    filler = {
        "data": {"spec": "given"},
        "threats": [{"norm": "linf"}],
        "shields": [{"model": GIVEN}],
    }
    return make_recipe({**filler, **content}, source="arguments")


def _threat(norm: str, eps: float | str | None, targeted: bool) -> ThreatSpec:
    try:
        radius = parse_radius(eps)
    except ValueError as error:
        raise InputError(f"eps '{eps}'", str(error), "give eps >= 0 in [0, 1] units, as 8/255") from None
    content = {"norm": norm, "eps": radius, "targeted": targeted}
    return _recipe({"threats": [content], "spears": [{"attack": "pgd"}]}).threats[0]


def _device_of(model: nn.Module, x: Tensor) -> torch.device:
    """Return where the model lives: inputs go to the model, never the model to the inputs."""
    held = itertools.chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in held), x.device)


def _stand_ins(surrogate: Surrogates) -> dict[str, nn.Module | None]:
    """Return the surrogates by specification; a module is given itself, with a specification made up for it."""
    several = [surrogate] if isinstance(surrogate, str | nn.Module) else list(surrogate)
    if not several:
        raise InputError("surrogate", "names no model", "give a module or a specification, or leave it out")
    found: dict[str, nn.Module | None] = {}
    for number, each in enumerate(several):
        module, spec = _module(each)
        found[spec if module is None else f"{spec}-{number + 1}"] = module
    return found


def _module(model: nn.Module | LoadedModel | str) -> tuple[nn.Module | None, str]:
    if isinstance(model, str):
        return None, model
    if isinstance(model, nn.Module):
        return model, GIVEN + type(model).__name__
    if isinstance(inner := getattr(model, "model", None), nn.Module):
        return inner, str(getattr(model, "spec", GIVEN + type(inner).__name__))
    raise InputError("model", f"is a {type(model).__name__}", "give a torch.nn.Module or a specification")


def _samples(data: Any, limit: int | None) -> Dataset:
    """Return any form of data as a Dataset of at most `limit` samples."""
    from maodun.zoo import Dataset, load_data
    from maodun.zoo.data.base import make_dataset

    if isinstance(data, Dataset):
        return data.take(limit)
    if isinstance(data, str):
        return load_data(data, limit=limit)
    if isinstance(data, tuple | list) and len(data) == 2 and all(hasattr(part, "__array__") for part in data):
        x, y = (torch.as_tensor(part) for part in data)
    else:
        x, y = _gather(data, limit)
    return make_dataset("given", "given", x.detach().cpu().numpy(), y.detach().cpu().numpy(), None).take(limit)


def _gather(batches: Any, limit: int | None) -> tuple[Tensor, Tensor]:
    """Concatenate the batches of a loader, or stack the samples of a data set whose labels are single numbers."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    count = 0
    try:
        for x, y in batches:
            label = torch.as_tensor(y)
            inputs.append(x.unsqueeze(0) if label.ndim == 0 else x)
            labels.append(label.reshape(-1))
            count += labels[-1].shape[0]
            if limit is not None and count >= limit:
                break
        return torch.cat(inputs), torch.cat(labels)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"is no collection of (inputs, labels) pairs ({error})"
        raise InputError("data", reason, "give (x, y), a DataLoader, or a specification such as digits") from error


def _spears(attack: Spear | Sequence[Spear], gradient: str, eot: int) -> list[dict[str, Any]]:
    """Return the recipe's spears for names, comma-separated names, built attacks and mappings."""
    given: list[Spear] = list(attack) if isinstance(attack, list | tuple) else [attack]  # type: ignore[list-item]
    common = {"gradient": gradient, "eot": eot}
    spears: list[dict[str, Any]] = []
    for each in given:
        if isinstance(each, str):
            spears += [{"attack": name.strip(), **common} for name in each.split(",") if name.strip()]
        elif isinstance(each, Attack):
            spears.append({"attack": each.name, "options": _options(each), **common})
        else:
            spears.append({**common, **each})
    if not spears:
        raise InputError("attack", "names no attack", "give one, such as autoattack")
    return spears


def _options(attack: Attack[Any]) -> dict[str, Any]:
    """Return the options in which an attack differs from its class's defaults."""
    if isinstance(attack, TrainedAttack):
        raise InputError(f"attack '{attack.name}'", "is trained", "save_artifact(attack, PATH), and give 'file:PATH'")
    plain = type(attack)()
    return {
        entry.name: getattr(attack, entry.name)
        for entry in dataclasses.fields(attack)
        if entry.init and getattr(attack, entry.name) != getattr(plain, entry.name)
    }
