"""Feature importance: weaken the features that the label rests on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maodun.attacks.feature.base import FeatureAttack
from maodun.attacks.feature.layers import catching
from maodun.core import geometry
from maodun.core.errors import InputError
from maodun.core.problem import Problem


@dataclass(frozen=True, kw_only=True)
class FIA(FeatureAttack):
    """Feature importance-aware attack (Wang et al., ICCV 2021).

    The gradients of the label's logit with respect to a layer's output, added over `copies` of the input in which each
    value is kept with probability `keep`, weigh the layer's features; the search makes the weighted sum small. Costs
    `copies` more forwards and backwards. `own_labels` takes the surrogate's own answers in place of the labels, for
    inputs of other data than it knows (one more forward).
    """

    name: ClassVar[str] = "fia"

    steps: int = 10
    decay: float = 1.0
    copies: int = 30
    keep: float = 0.7
    own_labels: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.copies < 1:
            raise InputError(f"copies {self.copies}", "must be at least 1", "give a positive number")
        if not 0.0 < self.keep <= 1.0:
            raise InputError(f"keep {self.keep}", "is not a probability above 0", "give a number up to 1")

    def aim(self, problem: Problem, model: nn.Module, layer: str) -> Tensor:
        """Return the aggregate gradient, of l2 length one per sample."""
        # Masked copies are no candidates.
        quiet = replace(problem, quiet=True)
        labels = quiet.logits(problem.x).argmax(1) if self.own_labels else problem.y
        stream, shape = problem.stream(f"{self.name}/masks"), tuple(problem.x.shape[1:])
        total: Tensor | None = None
        for copy in range(self.copies):
            mask = (stream.uniform(problem.ids, shape, copy) < self.keep).to(problem.x)
            slope = self._feature_gradient(quiet, model, layer, problem.x * mask, labels)
            total = slope if total is None else total + slope
        if total is None:
            raise InputError(f"copies {self.copies}", "must be at least 1", "give a positive number")
        return geometry.unit_l2(total)

    def objective(self, feature: Tensor, aim: Tensor) -> Tensor:
        """Return minus the sum of the weighted features."""
        return -(feature * aim).flatten(1).sum(1)

    @staticmethod
    def _feature_gradient(problem: Problem, model: nn.Module, layer: str, x: Tensor, labels: Tensor) -> Tensor:
        """Return the gradient of the labels' logits with respect to the layer's output, N x feature shape."""
        found: list[Tensor] = []

        def heads(logits: Tensor, index: Tensor) -> Tensor:
            feature = caught.take(layer)
            if feature.requires_grad:
                feature.register_hook(_keeper(found))  # type: ignore[no-untyped-call]
            return logits.gather(1, labels[index].unsqueeze(1))

        with catching(model, layer) as caught:
            problem.values_and_gradients(x, heads)
        if not found:
            raise InputError(f"layer '{layer}'", "no gradient passes through it", "name an earlier layer")
        slopes = torch.cat(found)
        # A stochastic surrogate passes every row several times.
        return slopes.reshape(len(problem), -1, *slopes.shape[1:]).mean(1)


def _keeper(found: list[Tensor]) -> Any:
    def keep(gradient: Tensor) -> None:
        found.append(gradient.detach())

    return keep
