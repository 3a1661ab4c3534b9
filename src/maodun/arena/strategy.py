"""Which gradient to attack a shield with, and why, from what every part of it declares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from maodun.arena.plan import Cell
from maodun.arena.recipe import SpearSpec
from maodun.core.ensemble import price_of
from maodun.core.oracle import granted

# The literature's usual number (AutoAttack's `rand`); the diagnostics say when two such means still disagree.
DRAWS = 20


@dataclass(frozen=True)
class Strategy:
    """The strongest gradient that the parts of a shield leave to an adversary who knows them, and `why` in words.

    `gradient`, `options` (its gradient_options) and `eot` are a spear's.
    """

    gradient: str
    eot: int
    why: str
    options: tuple[tuple[str, Any], ...] = ()


def derive(model: nn.Module, eot: int = 1) -> Strategy:
    """Return how to get gradients of `model`, the defended classifier as one module.

    Parts that declare `broken` (no useful derivative) are passed by their stand-ins (BPDA), all others exactly; when a
    part declares `stochastic`, every gradient is the mean over `eot` draws (1: as many as DRAWS). A model that tells
    scores only is searched by NES; one that tells decisions only has no gradient at all, and the plan refuses it.
    """
    level = granted(model)
    if level != "gradient":
        why = f"The shield tells {level} only and is not differentiated: gradients are estimated from scores (NES)."
        return Strategy("nes", 1, why)
    broken = _names(module for module in model.modules() if getattr(module, "broken", False) is True)
    random = _names(module for module in model.modules() if getattr(module, "stochastic", False) is True)
    draws = 1 if not random else eot if eot > 1 else DRAWS
    words = [_through(model, broken)]
    if random:
        verb = "differ" if len(random) > 1 else "differs"
        words.append(
            f"As {_listed(random)} {verb} from call to call, every gradient is the mean over {draws} draws (EOT), and "
            "the verdict takes fresh draws that no search has seen."
        )
    else:
        words.append("Nothing in it is random, so one pass is enough.")
    words += _notes(model)
    return Strategy("bpda" if broken else "exact", draws, " ".join(words), (("every", False),) if broken else ())


def resolve(cell: Cell, strategy: Strategy) -> Cell:
    """Return the cell with the estimator that `strategy` names, if its spear left that to the plan."""
    return replace(cell, spec=resolved(cell.spec, strategy))


def resolved(spear: SpearSpec, strategy: Strategy) -> SpearSpec:
    """Return a spear with the estimator that `strategy` names; one that names its own keeps it."""
    if spear.gradient != "auto":
        return spear
    options = {**dict(strategy.options), **spear.gradient_options}
    return spear.model_copy(
        update={"gradient": strategy.gradient, "gradient_options": options, "eot": strategy.eot, "name": spear.label}
    )


def _through(model: nn.Module, broken: list[str]) -> str:
    """Say how the gradient passes the parts."""
    sound = [name for name in _defenses(model) if name not in broken]
    rest = _listed([*sound, "the classifier" if price_of(model) == 1 else f"the {price_of(model)} classifiers"])
    if not broken:
        return f"The gradient is exact through {rest}: every part has a derivative of its own."
    own = "its own derivative is" if len(broken) == 1 else "their own derivatives are"
    by = "its stand-in" if len(broken) == 1 else "their stand-ins"
    return f"The gradient passes {_listed(broken)} by {by} (BPDA), because {own} of no use, and {rest} exactly."


def _notes(model: nn.Module) -> Iterable[str]:
    specs = list(_specs(model))
    loops = _names_of(name for name, spec in specs if spec.inner_loop)
    if loops:
        yield f"The loop inside {_listed(loops)} is differentiated step by step."
    votes = _names_of(name for name, spec in specs if spec.votes > 1)
    if votes:
        yield f"The answers that {_listed(votes)} averages are averaged in the search too."
    rejects = _names_of(name for name, spec in specs if spec.may_reject)
    if rejects:
        yield f"{_listed(rejects)} may refuse to answer: an attack has to pass it as well."


def _specs(model: nn.Module) -> Iterable[tuple[str, Any]]:
    from maodun.defenses import Defense

    for module in model.modules():
        if isinstance(module, Defense) and module.name not in ("none", "stack"):
            yield module.name, module.spec


def _defenses(model: nn.Module) -> list[str]:
    return _names_of(name for name, _ in _specs(model))


def _names(modules: Iterable[nn.Module]) -> list[str]:
    return _names_of(str(getattr(module, "name", None) or type(module).__name__) for module in modules)


def _names_of(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
