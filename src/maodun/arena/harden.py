"""Hardening: a user's own classifier, trained on against an adversary and measured before and after."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from maodun.arena.objectives import InnerAttack, ObjectiveSpec, build_objective
from maodun.arena.train import held_out_score, save_weights
from maodun.arena.workplace import checkpoint_in, refuse_one_split, two_sides, usable_folder
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.core.verdict import Interval, interval, judge
from maodun.defenses.training import FitReport, FitSettings, Objective, ShiftFlip, fit
from maodun.zoo.data import Dataset, load_data
from maodun.zoo.models import load_model

OBJECTIVES = ("adversarial", "trades", "mart", "score", "dkl", "ikl")
# What the objective's published inner attack climbs where that is not the cross-entropy.
_CLIMBS = {"trades": "kl", "dkl": "kl", "ikl": "kl", "score": "square"}
_HELD = 0.1


@dataclass(frozen=True, kw_only=True)
class Hardening:
    """What to train a classifier against, and how long.

    `norm`, `eps`: the ball. `objective` is one of OBJECTIVES with its own defaults; the inner attack takes `steps` PGD
    steps. `epochs`, `rate`, `batch_size`: SGD at a low peak rate, for the weights are already good. `shift` pixels and
    `flip` augment images. `limit` uses the first samples of the training split, `measure` those of the test split.
    """

    norm: str = "linf"
    eps: float
    objective: str = "trades"
    steps: int = 7
    epochs: int = 10
    rate: float = 0.02
    batch_size: int = 128
    shift: int = 0
    flip: bool = False
    limit: int | None = None
    measure: int | None = 1000
    attack: str = "sharp"
    seed: int = 0


@dataclass(frozen=True)
class Measure:
    """Accuracy on the test split without and with the attack, each with a 95 % interval."""

    clean: Interval
    robust: Interval


@dataclass(frozen=True)
class Hardened:
    """What hardening made: the model in evaluation mode, its weights file, both measures, and how the epochs went."""

    model: nn.Module
    weights: Path
    before: Measure
    after: Measure
    report: FitReport


def harden(
    model: str,
    data: str,
    plan: Hardening,
    out: str | Path = "runs/harden",
    *,
    weights: str | None = None,
    options: dict[str, object] | None = None,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
    on_measure: Callable[[str, Measure], None] | None = None,
    resume: bool = True,
) -> Hardened:
    """Train the classifier that `model` names on against `plan`, and write hardened.safetensors into the folder `out`.

    `model`, `weights` and `options` are as for load_model, `data` as for load_data; a tenth of the training split
    chooses the epoch by PGD accuracy, the test split is measured before and after by `plan.attack`. A checkpoint per
    epoch lies in the folder until the end; the same call again continues. `on_measure` gets ("before" or "after",
    measure). Errors: InputError for a model that has no weights to train, another number of classes, an unknown
    objective or a folder that cannot be used, before any training.
    """
    if plan.objective not in OBJECTIVES:
        raise InputError(f"objective '{plan.objective}'", "cannot harden a model", f"use {', '.join(OBJECTIVES)}")
    folder = usable_folder(out)
    loaded = load_model(model, weights=weights, options=options)
    net = loaded.model
    if not any(parameter.is_floating_point() for parameter in net.parameters()):
        raise InputError(f"model '{model}'", "has no weights here to train", "give the model as a module")
    net.requires_grad_(True)
    train, test = load_data(data, split="train", limit=plan.limit), load_data(data, split="test", limit=plan.measure)
    _refuse_other_classes(net, train, model)
    refuse_one_split(train)
    kept, held = two_sides(train, _HELD, plan.seed)
    before = _measure(net, test, plan)
    if on_measure is not None:
        on_measure("before", before)
    file = folder / "hardened.safetensors"
    checkpoint = checkpoint_in(folder, "hardened", resume=resume)
    judge_by = InnerAttack(attack="pgd", options={"steps": 10}, norm=plan.norm, eps=plan.eps)
    settings = FitSettings(
        epochs=plan.epochs, batch_size=plan.batch_size, rate=plan.rate, decay=5e-4, warmup=0.1, clip=1.0, guard=0.5
    )
    report = fit(
        net, train.x[kept], train.y[kept], _objective(plan, math.ceil(kept.numel() / plan.batch_size)), settings,
        validate=partial(held_out_score, x=train.x[held], y=train.y[held], inner=judge_by, seed=plan.seed),
        augment=ShiftFlip(plan.shift, plan.flip) if train.x.ndim == 4 and (plan.shift or plan.flip) else None,
        seed=plan.seed, checkpoint=checkpoint, label=f"{model} {loaded.sha256} {data} {plan!r}", on_epoch=on_epoch,
    )  # fmt: skip
    save_weights(net, file, torch.float32)
    after = _measure(net, test, plan)
    if on_measure is not None:
        on_measure("after", after)
    checkpoint.unlink(missing_ok=True)
    return Hardened(net, file, before, after, report)


def _objective(plan: Hardening, per_epoch: int) -> Objective:
    options: dict[str, object] = {"steps": plan.steps}
    if plan.objective in _CLIMBS:
        options["loss"] = _CLIMBS[plan.objective]
    inner = InnerAttack(attack="pgd", options=options, norm=plan.norm, eps=plan.eps)
    # The ball grows over the first third: weights trained without an adversary may break on a whole one at once.
    spec = ObjectiveSpec(kind=plan.objective, inner=inner, ramp=0.3)
    return build_objective(spec, seed=plan.seed, per_epoch=per_epoch, epochs=plan.epochs)


def _refuse_other_classes(net: nn.Module, data: Dataset, name: str) -> None:
    try:
        with torch.no_grad():
            classes = net.eval()(data.x[:2]).shape[1]
    except RuntimeError as error:
        reason = f"cannot take inputs of shape {tuple(data.x.shape[1:])} ({str(error).splitlines()[0]})"
        raise InputError(f"model '{name}'", reason, "give data of the model's own kind") from error
    needed = int(data.y.max()) + 1
    if needed > classes:
        reason = f"answers {classes} classes, the data have {needed}"
        raise InputError(f"model '{name}'", reason, "give data of the model's classes")


def _measure(net: nn.Module, test: Dataset, plan: Hardening) -> Measure:
    oracle, threat = Oracle(net.eval()), Threat(plan.norm, plan.eps)
    found = build_attack(plan.attack).run(oracle, test.x, test.y, threat, seed=plan.seed, ids=test.ids)
    with torch.no_grad():
        right = torch.cat([net(part) for part in torch.split(test.x, 256)]).argmax(1) == test.y
    robust = judge(oracle, found.x_adv, test.x, test.y, threat, seed=plan.seed, ids=test.ids).robust
    return Measure(interval(int(right.sum()), len(test)), robust)
