"""Detectors of a shield, fitted before anything is attacked: on clean samples that the run does not judge."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maodun.arena.recipe import Recipe, ThreatSpec
from maodun.core.engine import Attack
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat

if TYPE_CHECKING:
    from maodun.defenses.detection import Adversary, Detector
    from maodun.zoo import Dataset

VALIDATION = 1000
"""The most clean samples a threshold is set on."""


def fit_detectors(model: nn.Module, recipe: Recipe, data: Dataset, device: torch.device) -> None:
    """Fit every detector in `model` that has no threshold yet, in place; does nothing where there is none.

    A detector with a `file` is loaded from it. Any other is fitted to the first `samples` of the data's train split and
    its threshold set on at most 1000 of its `validation` split that are neither these nor among the run's.
    InputError for a detector fitted to another model, and for data without samples to set a threshold on.
    """
    from maodun.defenses.detection import RejectingClassifier, fit_detector, load_detector

    for part in model.modules():
        if not isinstance(part, RejectingClassifier) or part.detector.fitted:
            continue
        detector = part.detector
        if detector.file:
            load_detector(detector.file, detector, part.model)
            continue
        adversary = pgd_adversary(recipe.threats[0], recipe.seed) if detector.needs_adversary else None
        (x, y), validation = clean_samples(recipe, data, detector)
        train = (x.to(device), y.to(device))
        fit_detector(part.model, detector, train, validation.to(device), adversary=adversary, seed=recipe.seed)


def clean_samples(recipe: Recipe, data: Dataset, detector: Detector) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return inputs and labels to fit to, and inputs to set the threshold on; InputError when there are none."""
    from maodun.zoo import load_data
    from maodun.zoo.data import same_samples

    spec, own, thing = recipe.data, detector.validation, f"detector '{detector.name}'"
    remedy = "name data with a train split, or fit it in Python (fit_detector, save_detector) and give file=PATH"
    if data.spec == "given":
        raise InputError(thing, "has no clean validation data to set its threshold on", remedy)

    def judged(split: str) -> int:
        """Return how many of the first samples of `split` the run judges: a file without splits has only one."""
        return len(data) if same_samples(load_data(spec.spec, split=split, limit=1), data) else 0

    try:
        skip = judged("train")
        train = load_data(spec.spec, split="train", limit=skip + detector.samples + VALIDATION)
        passed = skip if own == "train" else judged(own)
        rest = train if own == "train" else load_data(spec.spec, split=own, limit=passed + VALIDATION)
    except InputError as error:
        raise InputError(thing, f"finds no clean samples ({error.thing}: {error.reason})", remedy) from None
    # A small train split is shared out: four parts to fit, one to set the threshold.
    cut = skip + min(detector.samples, math.floor(0.8 * (len(train) - skip)))
    # What was fitted to is no validation, whatever the split is called.
    one = own == "train" or same_samples(train, rest)
    validation = train.x[cut:] if one else rest.x[passed:]
    if cut == skip:
        raise InputError(thing, f"finds no clean samples beside the {len(data)} that the run judges", remedy)
    return (train.x[skip:cut], train.y[skip:cut]), validation


def pgd_adversary(threat: ThreatSpec, seed: int) -> Adversary:
    """Return PGD of ten steps in `threat` as the adversary that a trained detector learns from.

    InputError for a threat without a radius, or of a norm in which PGD does not search.
    """
    from maodun.attacks.registry import build_attack

    attack: Attack[Any] = build_attack("pgd", steps=10)
    if math.isinf(threat.eps) or threat.norm not in attack.norms:
        learns = f"learns from PGD in the first threat, and {threat.label} is no ball that it searches"
        raise InputError("detector 'trained_detector'", learns, f"give eps and one of {', '.join(attack.norms)}")

    def adversary(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return attack.run(
            Oracle(model), x, y, Threat(threat.norm, threat.eps), seed=seed, stop_early=False, check_model=False
        ).x_adv

    return adversary
