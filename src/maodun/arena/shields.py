"""From what a recipe says of a shield to a module: models loaded, defences built in order, members made one."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from maodun.arena.shield_recipe import DefensePart, MemberSpec, ShieldSpec
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.sizing import metered

if TYPE_CHECKING:
    from maodun.defenses import Defense

# The clean images that a defence may learn from.
_CLEAN = 2000


def shield_model(spec: ShieldSpec, device: torch.device, given: nn.Module | None = None) -> tuple[nn.Module, str]:
    """Return the defended model of a shield on `device`, and the digest of the weights in it, score networks' too.

    `given` is the classifier instead of the one that is specified. InputError for a model or defence that cannot be,
    defences that cannot stand in their order, and a subset that its members do not make.
    """
    model, digest = _shield_model(spec, device, given)
    return model, _with_scores(model, digest)


def _shield_model(spec: ShieldSpec, device: torch.device, given: nn.Module | None) -> tuple[nn.Module, str]:
    if not spec.members:
        return _classifier(spec, device, given)
    if given is not None:
        return behind(spec.parts, given, device), _digest(given)
    from maodun.defenses.ensembles import Committee

    pairs = [_classifier(member, device, None) for member in spec.members]
    committee = Committee([model for model, _ in pairs], fusion=spec.fusion, subset=spec.subset).to(device).eval()
    digest = hashlib.sha256("".join(each for _, each in pairs).encode()).hexdigest()
    return behind(spec.parts, committee, device), digest


def _with_scores(model: nn.Module, digest: str) -> str:
    """Return the digest of a shield's classifiers and score networks; the classifiers' own where it has none of these.

    Two score networks are two shields: a run that is continued has to meet the one it was begun with.
    """
    from maodun.defenses.purification import Denoiser

    scores = [_digest(each) for each in model.modules() if isinstance(each, Denoiser)]
    return hashlib.sha256("".join([digest, *scores]).encode()).hexdigest() if scores else digest


def _classifier(spec: MemberSpec, device: torch.device, given: nn.Module | None) -> tuple[nn.Module, str]:
    if given is not None:
        return behind(spec.parts, given, device), _digest(given)
    from maodun.zoo import load_model

    loaded = load_model(spec.model, weights=spec.weights, options=spec.model_options or None)
    return behind(spec.parts, loaded.model.to(device), device), loaded.sha256


def _digest(model: nn.Module) -> str:
    from maodun.zoo.checkpoints import state_sha256

    return state_sha256(model)


def behind(parts: tuple[DefensePart, ...], model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` behind the defences `parts`, the first nearest to the input; without any, the model itself."""
    if not parts:
        return model
    from maodun.defenses import Stack

    built = [build_part(part) for part in parts]
    defense = built[0] if len(built) == 1 else Stack(built)
    return defense.wrap(model).to(device).eval()


def build_part(part: DefensePart) -> Defense:
    """Return one defence; InputError for unknown names and options, and for score networks that are not there.

    One that learns from clean images, and names data rather than a file as `source`, is handed the training split.
    """
    from maodun.defenses import build_defense
    from maodun.defenses.preprocessing import Quilting

    options = dict(part.options)
    if isinstance(options.get("score"), str):
        from maodun.zoo.scores import find_score

        options["score"] = find_score(options["score"])
    if isinstance(options.get("scores"), str):
        from maodun.zoo.scores import find_score

        options["scores"] = ",".join(find_score(each.strip()) for each in re.split("[,+]", options["scores"]))
    defense = build_defense(part.name, **options)
    if isinstance(defense, Quilting) and defense.source and not defense.bank.numel():
        from maodun.zoo import load_data

        defense.learn(load_data(defense.source, split="train", limit=_CLEAN).x)
    return defense


def about_shield(spec: ShieldSpec) -> dict[str, str]:
    """Return what the report says of a shield's make: models, defences, their options."""
    about = {"model": spec.model, "defense": " > ".join(part.name for part in spec.parts) or "none"}
    if spec.members:
        about["model"] = " & ".join(member.title for member in spec.members)
        about["fusion"] = spec.fusion
    if spec.subset is not None:
        about["subset"] = f"a random {spec.subset} per query"
    if spec.weights is not None:
        about["weights"] = spec.weights
    several = len(spec.parts) > 1
    for part in spec.parts:
        about.update({f"{part.name} {key}" if several else key: str(value) for key, value in part.options.items()})
    return about


def refuse_unfit(label: str, model: nn.Module, few: Tensor, ids: Tensor) -> None:
    """Pass a sample or two through a shield, once its parts are together and before any work is spent on it.

    Raises InputError for what the parts cannot agree on: input shapes, numbers of classes. Services, where a pass costs
    a query, are left alone.
    """
    if metered(model):
        return
    oracle = Oracle(model, stochastic=is_stochastic(model))
    rows = torch.arange(few.shape[0], device=few.device)
    try:
        with oracle.ready(), torch.no_grad():
            answer = oracle.session(few, ids, 0).call(few, rows, rows)
    except RuntimeError as error:
        reason = f"cannot take inputs of shape {tuple(few.shape[1:])} ({str(error).splitlines()[0]})"
        raise InputError(f"shield '{label}'", reason, "check what the parts expect, and the device") from error
    if answer.ndim != 2 or answer.shape[0] != few.shape[0]:
        reason = f"answers a tensor of shape {tuple(answer.shape)} to {few.shape[0]} samples"
        raise InputError(f"shield '{label}'", reason, "give parts that end in N x classes logits")
