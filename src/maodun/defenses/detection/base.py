"""What a detector is, what it may look at, and the classifier that refuses to answer what it doubts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError, nearest
from maodun.core.rejection import join
from maodun.defenses.preprocessing.base import Defense, DefenseSpec

Adversary = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Makes attacked inputs for a detector that learns from them: adversary(model, x, y) -> x_adv like `x`."""


@dataclass(frozen=True)
class Seen:
    """What a detector looks at for one batch: inputs `x`, the classifier's `logits` (N x C), a list of features (each
    N x d, in the order of the detector's layers) and the classifier, to be asked again.
    """

    x: Tensor
    logits: Tensor
    features: list[Tensor]
    model: nn.Module


class Detector(Defense):
    """A score per input, higher for what looks attacked, and a threshold beyond which the classifier refuses to answer.

    Subclasses set `name`, implement `score(seen) -> (N,)`, `learn(seen, y, adversarial)` when they have something to
    fit, name the buffers that hold it in `learnt`, and say in `layers_wanted` whether they look at features. A detector
    leaves inputs as they are: its place in front of a classifier is `wrap`, which makes a RejectingClassifier.

    `fpr` is the share of clean validation samples that may be rejected (0 < fpr < 1), `samples` how many clean samples
    are used to fit and at most to set the threshold, `validation` the data's split from which the latter are taken,
    `file` a fitted detector to load instead (`save_detector`).
    """

    spec = DefenseSpec(may_reject=True)
    learnt: ClassVar[tuple[str, ...]] = ()
    needs_features: ClassVar[bool] = False
    needs_adversary: ClassVar[bool] = False

    threshold: Tensor
    spread: Tensor

    def __init__(self, fpr: float, samples: int, validation: str, file: str, layers: str = "") -> None:
        super().__init__()
        if not 0.0 < fpr < 1.0:
            raise InputError(f"fpr {fpr:g}", "is a share of clean inputs between 0 and 1", "give for example 0.05")
        if samples < 2:
            raise InputError(f"samples {samples}", "are too few to fit a detector", "give for example 2000")
        self.fpr, self.samples, self.validation, self.file = fpr, samples, validation, file
        self.layers = tuple(name.strip() for name in layers.split(",") if name.strip())
        self.fitted_to = ""
        for name in ("threshold", "spread", *self.learnt):
            self.register_buffer(name, torch.full((), math.nan))

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`: a detector changes nothing."""
        return x

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` with this detector in front of its answers."""
        return RejectingClassifier(model, self)

    @property
    def fitted(self) -> bool:
        """Whether there is a threshold, and so an answer."""
        return bool(torch.isfinite(self.threshold))

    def score(self, seen: Seen) -> Tensor:
        """Return (N,) scores, higher for what looks attacked."""
        raise NotImplementedError("a detector scores what it sees")

    def learn(self, seen: Seen, y: Tensor, adversarial: Seen | None) -> None:
        """Fit to clean samples with labels `y` (N,), and to attacked ones where `needs_adversary`; nothing here."""

    def measures(self) -> str:
        """Return what decides the score besides what was learnt: a threshold is good for equal texts only."""
        return f"layers={','.join(self.layers)}" if self.needs_features else ""

    def keep(self, **tensors: Tensor) -> None:
        """Store what was learnt as float32 buffers."""
        for name, value in tensors.items():
            self.register_buffer(name, value.detach().float().contiguous())

    def extra_repr(self) -> str:
        """Return what rebuilds it, and its threshold."""
        return f"fpr={self.fpr:g}, threshold={float(self.threshold):.4g}"


class RejectingClassifier(nn.Module):
    """A classifier that refuses to answer what its detector doubts: N x ... in [0, 1] to N x (C + 1) logits.

    The last logit is the largest of the others plus (score - threshold) / spread, so it wins exactly where the score is
    above the threshold (`core.rejection`). `spread` is the standard deviation of clean scores, so that one unit of
    doubt means the same for every detector. Raises InputError for layers that the classifier does not have.
    """

    may_reject: ClassVar[bool] = True

    def __init__(self, model: nn.Module, detector: Detector) -> None:
        super().__init__()
        self.model, self.detector = model, detector
        self.taps = find_layers(model, detector.layers) if detector.needs_features else []

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits and, last, that of rejection. InputError when the detector has no threshold yet."""
        if not self.detector.fitted:
            raise InputError(
                f"detector '{self.detector.name}'",
                "has no threshold: it was never shown clean validation data",
                "fit_detector(...) first, or give file=PATH of a fitted one",
            )
        seen = self.look(x)
        return join(seen.logits, (self.detector.score(seen) - self.detector.threshold) / self.detector.spread)

    def look(self, x: Tensor) -> Seen:
        """Return what the detector sees of `x`: one forward of the classifier."""
        with _tapped(self.taps) as features:
            logits: Tensor = self.model(x)
        return Seen(x, logits, features, self.model)

    def answer(self, x: Tensor) -> Answer:
        """Return logits, score and decision for `x`."""
        seen = self.look(x)
        score = self.detector.score(seen)
        return Answer(seen.logits, score, score <= self.detector.threshold)


@dataclass(frozen=True)
class Answer:
    """What a rejecting classifier says: `logits` (N x C), `score` (N,), `accepted` (N,) booleans."""

    logits: Tensor
    score: Tensor
    accepted: Tensor


@dataclass(frozen=True)
class Tap:
    """Where a feature is taken: what enters (`entering`) or leaves a module."""

    module: nn.Module
    entering: bool = field(default=False)


def find_layers(model: nn.Module, names: Sequence[str]) -> list[Tap]:
    """Return the taps of the named modules' outputs; without names, of what enters the last linear layer."""
    modules = dict(model.named_modules())
    if not names:
        last = [module for module in modules.values() if isinstance(module, nn.Linear)]
        if not last:
            raise InputError("layers", "the classifier has no linear layer to look in front of", "name layers=...")
        return [Tap(last[-1], entering=True)]
    for name in names:
        if name not in modules:
            known = [each for each in modules if each]
            raise InputError(f"layer '{name}'", "the classifier has none of that name", nearest(name, known))
    return [Tap(modules[name]) for name in names]


@contextmanager
def _tapped(taps: Sequence[Tap]) -> Iterator[list[Tensor]]:
    """Collect a feature per tap (N x d; spatial and token axes averaged) from the forward made inside."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for tap in taps:
            if tap.entering:
                enter = lambda _module, inputs: found.append(_flat(inputs[0]))  # noqa: E731 - a hook that returns nothing
                stack.callback(tap.module.register_forward_pre_hook(enter).remove)
            else:
                leave: Any = lambda _module, _inputs, output: found.append(_flat(output))  # noqa: E731
                stack.callback(tap.module.register_forward_hook(leave).remove)
        yield found


def _flat(value: Tensor) -> Tensor:
    if value.ndim == 4:
        return value.mean((2, 3))
    return value.mean(1) if value.ndim == 3 else value


__all__ = ["Adversary", "Answer", "Detector", "RejectingClassifier", "Seen", "Tap", "find_layers"]
