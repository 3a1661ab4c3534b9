"""Training objectives in words: what a recipe may say, and the objective it stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from maodun.arena.recipe import Radius
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError, nearest
from maodun.core.threat import Threat
from maodun.defenses.training import (
    ACE,
    ADP,
    AWP,
    DKL,
    MART,
    SCORE,
    TRADES,
    UAD,
    Adversarial,
    AdversarialTraining,
    Crafter,
    Free,
    Inner,
    InputGradient,
    MixedTraining,
    NoisyFGSM,
    Objective,
    Standard,
)
from maodun.defenses.training.noisy import GaussianAugmentation

BASES: dict[str, type[Adversarial]] = {
    "adversarial": AdversarialTraining,
    "mixed": MixedTraining,
    "trades": TRADES,
    "mart": MART,
    "score": SCORE,
    "dkl": DKL,
    "ikl": DKL,
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class InnerAttack(_Part):
    """An attack by name with its options, in a ball of radius `eps` of `norm`; in training also n-fgsm."""

    attack: str = "pgd"
    options: dict[str, Any] = Field(default_factory=dict)
    norm: Literal["linf", "l2", "l1"] = "linf"
    eps: Radius


class ACESpec(_Part):
    """The arguments of maodun.defenses.training.ACE; `warmup` in epochs."""

    weight: float = Field(default=0.1, ge=0)
    form: Literal["entropy", "complement", "calibration"] = "entropy"
    eta: float = Field(default=1.0, ge=0)
    tau: float = Field(default=1.0, ge=0)
    warmup: int = Field(default=0, ge=0)


class UADSpec(_Part):
    """The arguments of maodun.defenses.training.UAD; `start` in epochs."""

    resampling: float = Field(default=0.5, ge=0, le=1)
    beta: float = Field(default=6.0, ge=0)
    gamma: float = Field(default=0.5, ge=0)
    layer: str | None = None
    start: int = Field(default=0, ge=0)


class AWPSpec(_Part):
    """The arguments of maodun.defenses.training.AWP; `warmup` in epochs."""

    gamma: float = Field(default=0.005, ge=0)
    warmup: int = Field(default=0, ge=0)


class ObjectiveSpec(_Part):
    """What is minimised.

    standard: cross-entropy. noise: cross-entropy under Gaussian noise of option `sigma`. adversarial: cross-entropy at
    the inputs that `inner` finds; mixed, trades, mart, score, dkl and ikl: the objectives of those names. free: replays
    with the ball of `inner`, whose attack is not used. distillation: a teacher at `temperature` on hard labels, then a
    student at the same temperature on the teacher's soft ones. A finished model named as `teacher` takes the first
    one's place: the net with T times its logits has the very loss at T that it has at 1, so its softmax is the soft
    label at every T. With `start` the student, of the teacher's architecture, begins as that net: its last linear layer
    times T. `options` are the objective's own (beta, alpha, ...).
    `uad` or `ace` extend it, `awp` wraps the whole. adp: an ensemble trained to differ. gradient: cross-entropy and the
    squared length of its gradient.
    `ramp` in [0, 1] is the share of the steps over which the inner radius grows to its full size.
    """

    kind: Literal[
        "standard",
        "noise",
        "adversarial",
        "mixed",
        "trades",
        "mart",
        "score",
        "dkl",
        "ikl",
        "free",
        "distillation",
        "adp",
        "gradient",
    ] = "standard"
    inner: InnerAttack | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    uad: UADSpec | None = None
    ace: ACESpec | None = None
    awp: AWPSpec | None = None
    temperature: float = Field(default=1.0, gt=0)
    teacher: str | None = None
    start: bool = False
    ramp: float = Field(default=0.0, ge=0, le=1)
    smoothing: float = Field(default=0.0, ge=0, lt=1)

    def check(self, source: str) -> None:
        """Refuse, before any work, what does not fit together; `source` names the recipe."""
        adversarial = self.kind in BASES
        if (adversarial or self.kind == "free") and self.inner is None:
            raise InputError(f"{source}", f"objective '{self.kind}' has no inner attack", "add objective.inner")
        if not adversarial and (self.uad or self.ace or self.awp):
            raise InputError(f"{source}", f"uad, ace and awp do not extend '{self.kind}'", "use kind adversarial")
        if self.teacher and self.kind != "distillation":
            raise InputError(f"{source}", f"'{self.kind}' has no teacher", "use kind distillation")
        if self.start and not self.teacher:
            raise InputError(f"{source}", "nothing to start from", "name a finished teacher, or leave start out")
        if self.uad and self.ace:
            raise InputError(f"{source}", "uad and ace both extend the objective", "keep one of them")
        allowed = _options(self.kind)
        for name in self.options:
            if name not in allowed:
                known = nearest(name, allowed) if allowed else "leave it out"
                raise InputError(f"{source}, objective option '{name}'", f"is not one of {self.kind}", known)


def build_objective(spec: ObjectiveSpec, *, seed: int, per_epoch: int, epochs: int) -> Objective:
    """Return the objective of a recipe (distillation, which has two, excepted); one epoch has `per_epoch` steps."""
    if spec.kind == "noise":
        return GaussianAugmentation(smoothing=spec.smoothing, seed=seed, **spec.options)
    if spec.kind == "adp":
        return ADP(**spec.options)
    if spec.kind == "gradient":
        return InputGradient(smoothing=spec.smoothing, **spec.options)
    if spec.inner is None or spec.kind == "standard":
        return Standard(spec.smoothing)
    threat = Threat(spec.inner.norm, spec.inner.eps)
    if spec.kind == "free":
        return Free(threat, smoothing=spec.smoothing, **spec.options)
    crafter = _crafter(spec.inner, threat, seed, round(spec.ramp * epochs * per_epoch))
    extra = {"smoothing": spec.smoothing} if "smoothing" in _fields(BASES[spec.kind]) else {}
    if spec.kind == "ikl":
        extra["improved"] = True
    make: Callable[..., Adversarial] = BASES[spec.kind]
    base = make(crafter, **extra, **spec.options)
    whole: Any = base
    if spec.uad:
        own = spec.uad
        whole = UAD(base, own.resampling, own.beta, own.gamma, own.layer, own.start * per_epoch, seed=seed)
    elif spec.ace:
        whole = ACE(base, spec.ace.weight, spec.ace.form, spec.ace.eta, spec.ace.tau, spec.ace.warmup * per_epoch)
    if spec.awp:
        whole = AWP(whole, spec.awp.gamma, spec.awp.warmup * per_epoch)
    objective: Objective = whole
    return objective


def _crafter(inner: InnerAttack, threat: Threat, seed: int, ramp: int) -> Crafter:
    if inner.attack == "n-fgsm":
        return NoisyFGSM(threat, seed=seed, **inner.options)
    return Inner(build_attack(inner.attack, **inner.options), threat, seed, ramp)


def _fields(kind: type[Any]) -> list[str]:
    return [entry.name for entry in dataclasses.fields(kind) if entry.init]


def _options(kind: str) -> list[str]:
    """Return the names an objective of this kind takes under `options`."""
    if kind == "free":
        return ["replays"]
    if kind == "noise":
        return ["sigma"]
    if kind == "adp":
        return ["alpha", "beta"]
    if kind == "gradient":
        return ["weight"]
    fixed = {"attack", "smoothing", "improved", "memory"}
    return [name for name in _fields(BASES[kind]) if name not in fixed] if kind in BASES else []
