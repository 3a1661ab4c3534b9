"""Transfer in the arena: a spear that searches on surrogates, once for all the shields it is then judged on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maodun.arena.plan import Cell, Shard, access, budget, estimator, slug
from maodun.arena.recipe import Recipe, SpearSpec, format_radius
from maodun.arena.store import part_name
from maodun.core import admission
from maodun.core.engine import Candidates, Progress
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.rejection import may_reject
from maodun.core.status import Status

if TYPE_CHECKING:
    from maodun.arena.setup import Arena, Shield
    from maodun.zoo import Dataset

PREFIX = "surrogate "
"""What marks a surrogate among the weights of a manifest."""


@dataclass(frozen=True)
class Surrogate:
    """A model that stands in for the shields; `sha256` is that of its weights."""

    spec: str
    model: nn.Module
    sha256: str


def load_surrogates(
    recipe: Recipe,
    data: Dataset,
    shields: Mapping[str, Shield],
    device: torch.device,
    given: Mapping[str, nn.Module] | None = None,
) -> dict[str, Surrogate]:
    """Return the models that the recipe's spears search on, by specification; `given` replaces what would be loaded.

    Raises InputError when one cannot take the data's inputs or answers another number of classes than a shield.
    """
    few = admission.check_inputs(data.x[:2]).to(device)
    targets = {f"shield '{label}'": shield.model for label, shield in shields.items()}
    specs = dict.fromkeys(spec for spear in recipe.spears for spec in spear.surrogate)
    return {
        spec: load_surrogate(spec, few, targets, device, None if given is None else given.get(spec)) for spec in specs
    }


def load_surrogate(
    spec: str, few: Tensor, targets: Mapping[str, nn.Module], device: torch.device, given: nn.Module | None
) -> Surrogate:
    """Return one surrogate after passing the samples `few` through it and through the `targets` (by name).

    Raises InputError when it cannot take them or answers another number of classes than a target.
    """
    model, digest = _model(spec, device, given)
    thing = f"surrogate '{spec}'"
    classes = _classes(model, few, thing)
    for name, target in targets.items():
        if any(getattr(module, "metered", False) for module in target.modules()):
            continue  # to ask a service would cost queries; its admission compares the classes with the labels
        answers = _classes(target, few, name)
        if answers != classes:
            reason = f"answers {classes} classes where {name} answers {answers}"
            raise InputError(thing, reason, "take a surrogate of the same classes")
    return Surrogate(spec, model, digest)


def _model(spec: str, device: torch.device, given: nn.Module | None) -> tuple[nn.Module, str]:
    if given is not None:
        from maodun.zoo.checkpoints import state_sha256

        return given, state_sha256(given)
    from maodun.zoo import load_model

    loaded = load_model(spec)
    return loaded.model.to(device), loaded.sha256


def _classes(model: nn.Module, few: Tensor, thing: str) -> int:
    oracle = Oracle(model, stochastic=is_stochastic(model))
    try:
        with oracle.ready(), torch.no_grad():
            ids = torch.arange(few.shape[0], device=few.device)
            return int(oracle.session(few, ids, 0).call(few, ids, ids).shape[1]) - may_reject(model)
    except (RuntimeError, InputError) as error:
        reason = f"cannot take inputs of shape {tuple(few.shape[1:])} ({str(error).splitlines()[0]})"
        raise InputError(thing, reason, "take a model of the same inputs") from error


def fused(surrogates: Mapping[str, Surrogate], spear: SpearSpec) -> nn.Module:
    """Return what a spear searches on: its only surrogate, or the ensemble of all."""
    members = [surrogates[spec].model for spec in spear.surrogate]
    return members[0] if len(members) == 1 else Ensemble(members, fusion=spear.fusion)


def oracle(arena: Arena, cell: Cell) -> Oracle:
    """Return the spear's surrogates as it may ask them."""
    compute, model = arena.recipe.compute, fused(arena.surrogates, cell.spec)
    return Oracle(
        model,
        access=access(cell.spec, cell.attack),
        gradient=estimator(cell.spec),
        budget=budget(cell.spec),
        batch_size=compute.batch_size,
        precision=compute.precision,
        channels_last=compute.channels_last,
        compile=compute.compile,
        surrogate=True,
    )


def white_box(arena: Arena, cell: Cell) -> bool:
    """Tell whether the shield's weights are among the surrogates': then nothing was transferred."""
    own = arena.shields[cell.shield].sha256
    return any(arena.surrogates[spec].sha256 == own for spec in cell.spec.surrogate)


def found_name(cell: Cell, shard: Shard) -> str:
    """Return the store's name for what a spear's search found on a shard: the same for all shields."""
    threat = cell.threat
    words = f"{cell.spear}\n{threat.model_dump_json()}"
    radius = format_radius(threat.eps).replace("/", "-of-")
    digest = hashlib.sha256(words.encode()).hexdigest()[:6]
    return f"searches/{slug(cell.spear)}--{threat.norm}-{radius}-{digest}/{part_name(shard.number)}.npz"


Aim = Callable[[Tensor], Tensor | None]
Found = tuple[Candidates, Tensor | None]


def search(arena: Arena, cell: Cell, shard: Shard, aim: Aim, progress: Progress | None) -> Found:
    """Return what the spear's search finds on a shard, and its targets; from the store once any shield was met there.

    `aim` makes targets from the surrogate's N x C probabilities: an adversary who does not ask the shield cannot know
    what the shield thinks.
    """
    name = found_name(cell, shard)
    if not arena.store.exists(name):
        _search(arena, cell, shard, aim, progress, name)
    arrays = arena.store.read_arrays(name)
    tensors = {key: torch.from_numpy(arrays[key].copy()).to(arena.device) for key in (*_KEPT, "targets")}
    targets = tensors.pop("targets")
    return Candidates(**tensors, seconds=float(arrays["seconds"])), targets if cell.threat.targeted else None


_KEPT = ("x_adv", "distance", "status", "forwards", "backwards", "queries")


def _search(arena: Arena, cell: Cell, shard: Shard, aim: Aim, progress: Progress | None, name: str) -> None:
    x, y, ids = arena.rows(shard)
    asked = oracle(arena, cell)
    with torch.no_grad(), asked.ready():
        session = asked.session(x, ids, arena.recipe.seed)
        rows = torch.arange(x.shape[0], device=x.device)
        probs = session.draws(x, rows, 1)[:, 0].softmax(1) if cell.threat.targeted else torch.zeros(0)
    targets = aim(probs)
    found = cell.attack.run(
        asked,
        x,
        y,
        cell.core_threat,
        targets=targets,
        seed=arena.recipe.seed,
        ids=ids,
        check_model=False,
        progress=progress,
    )
    arrays: dict[str, Any] = {key: getattr(found, key).detach().cpu().numpy() for key in _KEPT}
    seconds = torch.tensor(found.seconds, dtype=torch.float64).numpy()
    aims = (torch.full_like(y, -1) if targets is None else targets).cpu().numpy()
    arena.store.write_arrays(name, **arrays, targets=aims, seconds=seconds)


def for_shield(found: Candidates, x: Tensor, wrong: Tensor) -> Candidates:
    """Return the candidates as sent to a shield: where the clean input is a success already (`wrong`), that is sent.

    The shield itself was asked nothing, so it has no queries to its account.
    """
    status = torch.where(wrong, torch.full_like(found.status, int(Status.skipped_misclassified)), found.status)
    kept = wrong.reshape(-1, *([1] * (x.ndim - 1)))
    return dataclasses.replace(
        found,
        x_adv=torch.where(kept, x, found.x_adv),
        distance=torch.where(wrong, torch.zeros_like(found.distance), found.distance),
        status=status,
        queries=torch.zeros_like(found.queries),
    )
