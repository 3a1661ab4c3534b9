"""What an adversary who knows a defence can always do: send the example that was made for the classifier without it.

A stand-in's derivative may lead astray where the classifier's own does not, so an adaptive attack (gradient auto) that
ends without success has one more candidate. It can only gain by that: its row is never above the static one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from maodun.arena.recipe import BudgetSpec, SpearSpec
from maodun.core.engine import Attack, Candidates, Progress
from maodun.core.estimators import Exact
from maodun.core.oracle import Budget, Oracle, granted, is_stochastic
from maodun.core.status import Status
from maodun.core.threat import Threat
from maodun.core.verdict import Rule, judge

# Single searches in a ball that climb a loss; recipes of several attacks have other ways out of their own.
_CLIMBERS = frozenset({"fgsm", "bim", "pgd", "mifgsm", "nifgsm", "lowfreq", "apgd", "apgd-t", "transfer"})
_DRAWS = 10
FALLBACK = "What it leaves standing is sent the example made for the bare classifier too."
"""What the plan says of it."""


def bare(model: nn.Module) -> nn.Module | None:
    """Return the classifier behind the defences of this package, None where there is none in front of it."""
    found = model
    while True:
        if isinstance(found, nn.Sequential) and len(found) == 2 and getattr(found[1], "lifted", False):
            found = found[0]
        elif type(found).__module__.startswith("maodun.defenses.") and isinstance(
            inner := getattr(found, "model", None), nn.Module
        ):
            found = inner
        else:
            return None if found is model else found


def falls_back(spear: SpearSpec, attack: Attack[Any], model: nn.Module) -> bool:
    """Tell whether a spear as it was asked for, against `model`, may end with the bare classifier's example.

    So do attacks that climb a loss in a ball with gradient auto, on a shield that tells gradients, without a budget.
    """
    asked = spear.gradient == "auto" and not (spear.surrogate or spear.seed_known) and spear.budget == BudgetSpec()
    return asked and attack.name in _CLIMBERS and granted(model) == "gradient" and bare(model) is not None


def or_static(
    attack: Attack[Any],
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    found: Candidates,
    *,
    targets: Tensor | None = None,
    seed: int = 0,
    ids: Tensor | None = None,
    progress: Progress | None = None,
) -> Candidates:
    """Return `found`, and the same attack's example for the bare classifier where that fools the shield and it did not.

    Of a stochastic shield every sample gets both, and the one is sent that fools more of ten fresh draws, none of which
    are the verdict's. What this costs is added to the account. Arguments as for `Attack.run`; `oracle` is the shield's.
    """
    inner = bare(oracle.model)
    stochastic = is_stochastic(oracle.model) if oracle.stochastic is None else oracle.stochastic
    open_ = found.status != int(Status.skipped_misclassified)
    open_ &= torch.ones_like(open_) if stochastic else found.status != int(Status.found)
    rows = open_.nonzero().squeeze(1)
    if inner is None or not rows.numel():
        return found
    ids = torch.arange(x.shape[0], device=x.device) if ids is None else ids.to(x.device)
    aims, clean, labels = None if targets is None else targets[rows], x[rows], y[rows]
    plain = dataclasses.replace(
        oracle, model=inner, gradient=Exact(), budget=Budget(), stochastic=None, compile=False, surrogate=True
    )
    static = attack.run(
        plain, clean, labels, threat, targets=aims, seed=seed, ids=ids[rows], check_model=False, progress=progress
    )

    def fooled(x_adv: Tensor) -> Tensor:
        own = judge(
            dataclasses.replace(oracle, gradient=Exact(), budget=Budget()), x_adv, clean, labels, threat,
            targets=aims, rule=Rule("majority", _DRAWS), seed=seed, ids=ids[rows], purpose="fallback",
        )  # fmt: skip
        return own.flags.float().mean(1)

    share = fooled(static.x_adv)
    better = share > (fooled(found.x_adv[rows]) if stochastic else 0.0)
    draws = 2 * _DRAWS if stochastic else 1
    calls = {name: getattr(found, name).clone() for name in ("forwards", "backwards", "queries")}
    calls["forwards"][rows] += static.forwards + draws
    calls["backwards"][rows] += static.backwards
    calls["queries"][rows] += draws
    x_adv, distance, status = found.x_adv.clone(), found.distance.clone(), found.status.clone()
    x_adv[rows] = torch.where(better.reshape(-1, *([1] * (x.ndim - 1))), static.x_adv, x_adv[rows])
    distance[rows] = torch.where(better, static.distance, distance[rows])
    status[rows[better & (share > 0.5)]] = int(Status.found)
    seconds = found.seconds + static.seconds
    return dataclasses.replace(found, x_adv=x_adv, distance=distance, status=status, seconds=seconds, **calls)
