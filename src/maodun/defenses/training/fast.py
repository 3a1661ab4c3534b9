"""One-step training that does not learn its own attack by heart, and free replays of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class NoisyFGSM:
    """N-FGSM: a step of size `step` * eps from a point with uniform noise of `noise` * eps, not projected back.

    x' = clip(x + n + step * eps * sign(grad CE(f(x + n), y))), n ~ U(-noise * eps, noise * eps). The result may lie
    up to (noise + step) eps away, on purpose: projecting it is what lets one-step training overfit. linf only;
    `noise` is 2 and `step` 1 in the paper. One forward and one backward.
    Source: de Jorge et al., "Make some noise: reliable and efficient single-step adversarial training", NeurIPS 2022.
    """

    threat: Threat
    noise: float = 2.0
    step: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threat.norm != "linf":
            raise InputError(f"norm {self.threat.norm}", "N-FGSM is defined for linf", "use linf, or another attack")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return adversarial inputs like `batch.x`, in [0, 1]."""
        x, eps = batch.x.detach(), self.threat.eps
        draw = Stream(self.seed, "train/n-fgsm").uniform(batch.rows, tuple(x.shape[1:]), batch.step)
        noisy = (x + (2.0 * draw.to(x) - 1.0) * self.noise * eps).requires_grad_(True)
        with torch.enable_grad():
            value = F.cross_entropy(model(noisy), batch.y, reduction="sum")
            (gradient,) = torch.autograd.grad(value, noisy)
        return (noisy.detach() + self.step * eps * gradient.sign()).clamp_(0.0, 1.0)


@dataclass
class Free:
    """Free adversarial training: each batch is replayed `replays` times, and one backward serves weights and input.

    On every replay the loss is CE(f(x + d), y); the input gradient that falls out of the backward pass for the weights
    moves d one step of length eps along the steepest direction, projected on the ball. The loop asks `replays` and
    calls `after_backward`. d starts at zero with every new batch (the published code carries it over to the next one,
    where it belongs to other images). Train 1 / replays as many epochs.
    Source: Shafahi et al., "Adversarial training for free!", NeurIPS 2019.
    """

    threat: Threat
    replays: int = 4
    smoothing: float = 0.0
    mixes: ClassVar[bool] = True
    _offset: Tensor | None = field(default=None, init=False, repr=False)
    _point: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.replays < 1:
            raise InputError(f"replays {self.replays}", "must be at least 1", "give a positive number")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy at the inputs moved so far."""
        if batch.step % self.replays == 0 or self._offset is None:
            self._offset = torch.zeros_like(batch.x)
        self._point = (batch.x + self._offset).detach().requires_grad_(True)
        return F.cross_entropy(model(self._point), batch.target, label_smoothing=self.smoothing)

    def after_backward(self, batch: Batch) -> None:
        """Move the inputs by the gradient that the backward pass has left at them."""
        if self._point is not None and self._point.grad is not None:
            point = self._point.detach()
            step = self.threat.eps * self.threat.steepest(self._point.grad, point)
            self._offset = self.threat.project(point + step, batch.x) - batch.x
