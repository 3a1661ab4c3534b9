"""Universal adversarial perturbations: one perturbation that is added to every image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from maodun.attacks.artifacts import TrainedAttack, TrainedState
from maodun.attacks.minimum.deepfool import DeepFool
from maodun.attacks.universal.training import (
    Learnt,
    Line,
    Task,
    TrainingSet,
    UniversalFit,
    learn,
    provenance,
    training_set,
)
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.geometry import norms
from maodun.core.oracle import Oracle
from maodun.core.problem import Problem
from maodun.core.streams import Stream
from maodun.core.threat import Threat

_NORMS = ("linf", "l2")


@dataclass(frozen=True, kw_only=True)
class UAP(TrainedAttack):
    """One perturbation, trained beforehand, is added to every image (Moosavi-Dezfooli et al., CVPR 2017).

    `train_uap` and `train_uap_deepfool` make it. Inputs N x `shape`, values in [0, 1]; norms linf and l2. The tensor
    `delta` is added to every input and the sum clipped; under a smaller radius than `eps` it is projected. `target` is
    the class it was trained to bring about (None: any other class); only with it may a threat be targeted, and only at
    that class. Costs one forward per input.
    """

    name: ClassVar[str] = "uap"
    norms: ClassVar[tuple[str, ...]] = _NORMS

    target: int | None = None

    def __post_init__(self) -> None:
        delta = self.tensors.get("delta")
        if delta is None or tuple(delta.shape) != tuple(self.shape):
            given = "none" if delta is None else str(tuple(delta.shape))
            raise InputError(
                "attack 'uap'", f"needs a tensor delta of {tuple(self.shape)}, got {given}", "train it again"
            )
        super().__post_init__()

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse another shape or norm, and targets unless it was trained for one."""
        super().check(x, replace(threat, targeted=False) if self.target is not None else threat)

    def init(self, problem: Problem) -> TrainedState:
        """Start at the clean input; refuse to be asked for another class than its own."""
        refuse_other_targets(self.name, problem.targets, self.target)
        return super().init(problem)

    def craft(self, x: Tensor, ids: Tensor, stream: Stream, eps: float, number: int) -> Tensor:  # noqa: ARG002
        """Return x + delta."""
        return x + self.tensors["delta"].to(x)


def refuse_other_targets(name: str, targets: Tensor | None, target: int | None) -> None:
    """Raise UnsupportedError when any target (N,) is not the class `target` an attack was trained for."""
    if targets is not None and (target is None or bool((targets != target).any())):
        raise UnsupportedError(f"attack '{name}'", f"can only bring about class {target}", "ask for that class alone")


def train_uap(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    fit: UniversalFit | None = None,
    *,
    target: int | None = None,
    ids: Tensor | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Line], None] | None = None,
    about: dict[str, Any] | None = None,
) -> UAP:
    """Train a universal perturbation by stochastic ascent on clipped losses (Shafahi et al., AAAI 2020, algorithm 2).

    `x` N x ... in [0, 1] with labels `y` (N,); `threat` linf or l2 with a finite eps. `target` makes it a targeted one:
    images of that class are left out. The first starts are the steepest steps of the whole radius towards single
    classes (`class_starts`, ours), further ones are drawn uniformly from the ball, keyed by `seed`. `about` is added to
    the provenance. Judge the result on other images. Errors: InputError for data, models and settings that cannot be
    meant, UnsupportedError for another norm.
    """
    fit = fit or UniversalFit()
    data = _data(oracle, x, y, ids, threat, target, seed)
    shape = tuple(data.x.shape[1:])

    def start(number: int) -> Tensor:
        zero, middle = torch.zeros((1,), dtype=torch.int64), torch.full((1, *shape), 0.5)
        return (threat.random_start(middle, Stream(seed, "uap/start"), zero, number) - middle)[0]

    task = Task(
        name="uap",
        start=start,
        place=lambda value, images, _ids, _number: (images + value).clamp(0.0, 1.0),
        bound=lambda value: shrink(value, threat),
        neutral=torch.zeros(shape),
        leap=lambda gradient: threat.eps * threat.steepest(gradient.unsqueeze(0), data.x[:1])[0],
        reach=threat.eps if threat.norm == "linf" else threat.eps / math.sqrt(data.x[0].numel()),
        even=threat.norm == "l2",
    )
    learnt = learn(oracle, data, task, fit, seed=seed, checkpoint=checkpoint, on_epoch=on_epoch)
    return _made(learnt, data, threat, target, provenance(learnt, data, fit, seed, {"method": "sgd", **(about or {})}))


@dataclass(frozen=True, kw_only=True)
class DeepFoolFit:
    """How DeepFool's moves are gathered: passes, minibatch, the share to fool at which it ends, DeepFool's options.

    The paper moves image by image. Here the images of a minibatch that still stand are moved together and the mean of
    their moves is added, `step` times over; `batch_size` 1 with `step` 1 is the algorithm as published.
    """

    epochs: int = 10
    batch_size: int = 5
    step: float = 4.0
    enough: float = 1.0
    steps: int = 20
    overshoot: float = 0.1
    classes: int | None = 10


def train_uap_deepfool(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    fit: DeepFoolFit | None = None,
    *,
    ids: Tensor | None = None,
    seed: int = 0,
    on_epoch: Callable[[Line], None] | None = None,
    about: dict[str, Any] | None = None,
) -> UAP:
    """Train a universal perturbation by DeepFool moves, summed and projected (Moosavi-Dezfooli et al., CVPR 2017).

    Every image that keeps its class under the perturbation so far is moved across its nearest boundary (l2 DeepFool);
    the moves are added to the perturbation, which is projected to the ball of `threat` (linf or l2, finite eps). What
    counts is the class the model gives the clean image; `y` (N,) only serves to refuse models that cannot be meant.
    Keeps the epoch that fooled most. Errors as `train_uap`.
    """
    fit = fit or DeepFoolFit()
    data = _data(oracle, x, y, ids, threat, None, seed)
    search = DeepFool(steps=fit.steps, overshoot=fit.overshoot, classes=fit.classes)
    rows = torch.arange(data.x.shape[0], device=data.x.device)
    session = oracle.session(data.x, data.ids, seed)
    delta = torch.zeros_like(data.x[0])
    best, history, forwards, backwards = (-1.0, delta), list[Line](), 0, 0
    with oracle.ready():
        own = session.logits(data.x, rows).argmax(1)
        for epoch in range(fit.epochs):
            order = Stream(seed, "uap/order").uniform(data.ids, (), epoch).argsort()
            for part in torch.split(order, fit.batch_size):
                there = (data.x[part] + delta).clamp(0.0, 1.0)
                found = search.run(
                    oracle, there, own[part], Threat("l2"), seed=seed, ids=data.ids[part], check_model=False
                )
                moved = found.distance > 0
                if bool(moved.any()):
                    move = (found.x_adv - there)[moved].mean(0)
                    delta = shrink(delta + fit.step * move, threat)
                forwards, backwards = forwards + int(found.forwards.sum()), backwards + int(found.backwards.sum())
            fooled = float((session.logits((data.x + delta).clamp(0.0, 1.0), rows).argmax(1) != own).float().mean())
            history.append({"epoch": float(epoch), "fooled": fooled})
            best = max(best, (fooled, delta), key=lambda each: each[0])
            if on_epoch is not None:
                on_epoch(history[-1])
            if fooled >= fit.enough:
                break
    learnt = Learnt(best[1], tuple(history), forwards + int(session.meter.forwards.sum()), backwards)
    return _made(
        learnt, data, threat, None, provenance(learnt, data, fit, seed, {"method": "deepfool", **(about or {})})
    )


def shrink(delta: Tensor, threat: Threat) -> Tensor:
    """Return `delta` (one sample's shape) brought into the linf or l2 ball of the threat, the box aside."""
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps)
    length = norms(delta.unsqueeze(0), "l2")
    return delta * (threat.eps / length.clamp(min=1e-12)).clamp(max=1.0)


def _data(
    oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor | None, threat: Threat, target: int | None, seed: int
) -> TrainingSet:
    if threat.norm not in _NORMS:
        raise UnsupportedError("attack 'uap'", f"is not trained in {threat.norm}", "use linf or l2")
    return training_set(oracle, x, y, ids, threat, target, seed)


def _made(learnt: Learnt, data: TrainingSet, threat: Threat, target: int | None, about: dict[str, Any]) -> UAP:
    return UAP(
        shape=tuple(data.x.shape[1:]),
        norm=threat.norm,
        eps=threat.eps,
        target=target,
        tensors={"delta": learnt.value},
        about=about,
    )


__all__ = ["UAP", "DeepFoolFit", "UniversalFit", "train_uap", "train_uap_deepfool"]
