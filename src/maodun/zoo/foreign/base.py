"""What all foreign classifiers share: arrays out, answers in, and how an answer becomes scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from maodun.core.errors import InputError

KINDS = ("scores", "logits", "probabilities", "label")
Array = NDArray[Any]

# The smallest normal float32: a probability rounded to zero becomes -87 nats, not minus infinity.
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Reading:
    """How answers are read.

    `kind` says what a row holds: "logits" and "scores" are taken as they come, "probabilities" become their logarithms
    (the order of the classes stays, and so does the sign of every margin), "label" is one class number, which becomes
    a one-hot row. `classes` is the number of classes, needed for labels and otherwise checked when given; `names` are
    their names in the order of the labels, for targets that answer in words.
    """

    kind: str
    classes: int | None = None
    names: tuple[str, ...] = ()

    @staticmethod
    def make(kind: str, classes: int | Sequence[Any] | None, thing: str) -> Reading:
        """Return the reading for `kind` and `classes` (a number or the names); InputError for what cannot be."""
        if kind not in KINDS:
            raise InputError(thing, f"kind '{kind}' is none that can be read", "use " + ", ".join(KINDS))
        names = () if classes is None or isinstance(classes, int) else tuple(str(name) for name in classes)
        count = classes if isinstance(classes, int) else len(names) or None
        if count is not None and count < 2:
            raise InputError(thing, f"classes {count} leaves nothing to confuse", "give 2 or more")
        if kind == "label" and count is None:
            reason = "it answers labels, and how many classes there are is not known"
            raise InputError(thing, reason, "give classes=10, or the list of their names in the order of the labels")
        return Reading(kind, count, names)

    @property
    def access(self) -> str:
        """What such answers let an adversary ask: "decision" for labels, else "scores"."""
        return "decision" if self.kind == "label" else "scores"

    def scores(self, answers: Array) -> Tensor:
        """Return float32 scores N x C from what the target said: N x C numbers, or N x 1 class numbers."""
        if self.kind == "label":
            labels = torch.from_numpy(np.rint(answers[:, 0]).astype(np.int64))
            return nn.functional.one_hot(labels, self.classes or 2).to(torch.float32)
        scores = torch.from_numpy(np.ascontiguousarray(answers, dtype=np.float32))
        return scores.clamp(min=_TINY).log() if self.kind == "probabilities" else scores


class Foreign(nn.Module):
    """A classifier outside of PyTorch: [0, 1] inputs N x ... to scores N x C (float32), no gradients.

    Subclasses say how to ask (`answers`) and give a `fingerprint`, which stands for the weights nobody can see: a
    store refuses to continue with a target of another fingerprint. `access` is what the Oracle grants; `stochastic`
    whether equal inputs get different answers; `metered` whether every forward costs a query somewhere else, so that
    nothing may be tried out on it unasked.
    """

    metered = False

    def __init__(self, reading: Reading, fingerprint: str, *, stochastic: bool = False) -> None:
        super().__init__()
        self.reading, self.fingerprint, self.stochastic = reading, fingerprint, stochastic

    @property
    def access(self) -> str:
        """The most an adversary may ask for: scores or decision."""
        return self.reading.access

    def answers(self, x: Array) -> Array:
        """Return what the target says of float32 inputs N x ... in [0, 1]: N x C numbers, or N x 1 class numbers."""
        raise NotImplementedError("a foreign classifier says how it is asked")

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of `x` on its device."""
        plain = x.detach().to("cpu", torch.float32).contiguous().numpy()
        return self.reading.scores(self.answers(plain)).to(x.device)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(kind={self.reading.kind!r}, classes={self.reading.classes})"
