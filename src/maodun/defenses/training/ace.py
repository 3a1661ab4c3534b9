"""Adversarial calibration entropy: be surer where adversarial inputs are answered rightly, less sure where not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.losses import margin
from maodun.defenses.training.adversarial import Adversarial
from maodun.defenses.training.objective import Batch

Form = Literal["entropy", "complement", "calibration"]
_BINS = 15


def entropy_term(adv: Tensor, y: Tensor, *, eta: float = 1.0, tau: float = 1.0) -> Tensor:
    """Return mean[ c H(p') - eta (1 - c) H(p') ]: sharpen what is right, soften what is wrong.

    H is the entropy over log K, in [0, 1]; c = sigmoid(margin / tau) without gradient, near 1 where x' is answered
    rightly; tau = 0 gives the hard gate. `adv` N x K logits.
    """
    log_p = F.log_softmax(adv, dim=1)
    entropy = -(log_p.exp() * log_p).sum(1) / math.log(adv.shape[1])
    lead = -margin(adv.detach(), y)
    gate = torch.sigmoid(lead / tau) if tau > 0 else (lead > 0).to(adv.dtype)
    return (gate * entropy - eta * (1 - gate) * entropy).mean()


def complement_term(adv: Tensor, y: Tensor) -> Tensor:
    """Return -mean[ (1 - p'_y) H(q) ]: flatten the wrong classes, q_j = p'_j / (1 - p'_y) for j != y."""
    others = adv.scatter(1, y.unsqueeze(1), -math.inf)
    log_q = F.log_softmax(others, dim=1)
    entropy = -(log_q.exp() * log_q.masked_fill(log_q == -math.inf, 0.0)).sum(1)
    right = adv.softmax(1).gather(1, y.unsqueeze(1)).squeeze(1)
    return -((1 - right) * entropy).mean()


def calibration_term(adv: Tensor, y: Tensor, bins: int = _BINS) -> Tensor:
    """Return sum over bins of w_b (confidence_b - accuracy_b)^2, a differentiable calibration error.

    A sample belongs to the two bins nearest to its confidence by linear (triangular) shares; w_b is the bin's share of
    the batch; the accuracies and the shares' denominators carry no gradient of their own beyond the shares.
    """
    confidence, guess = adv.softmax(1).max(1)
    right = (guess == y).to(adv.dtype)
    centres = (torch.arange(bins, device=adv.device, dtype=adv.dtype) + 0.5) / bins
    # Beyond the outermost centres everything belongs to the outermost bin.
    place = confidence.clamp(float(centres[0]), float(centres[-1])).unsqueeze(1)
    share = (1 - (place - centres).abs() * bins).clamp(min=0.0)
    weight = share.sum(0)
    gap = (share * (confidence - right).unsqueeze(1)).sum(0) / weight.clamp(min=1e-12)
    return (weight / adv.shape[0] * gap.square()).sum()


@dataclass(frozen=True)
class ACE:
    """An adversarial objective plus `weight` times an adversarial calibration term (a reconstruction).

    `base` is any objective of clean and adversarial logits (PGD-AT, TRADES, MART, ...). `form`: entropy (the primary
    form), complement or calibration; `eta` and `tau` belong to the first. Over the first `warmup` optimiser steps the
    weight grows from zero. With weight 0 it is its base to the bit. Confidence can fake robustness: attack the result
    with scale-free losses and compare calibration after temperature scaling.
    Source: a reconstruction of "adversarial calibration entropy", whose formula is not public.
    """

    base: Adversarial
    weight: float = 0.1
    form: Form = "entropy"
    eta: float = 1.0
    tau: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.form not in ("entropy", "complement", "calibration"):
            raise InputError(f"form '{self.form}'", "is not a form of ACE", "use entropy, complement or calibration")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch."""
        return self.loss(model, batch, self.craft(model, batch))

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the base's adversarial inputs."""
        return self.base.craft(model, batch)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        """Return base loss and calibration term on the same logits."""
        clean = model(batch.x) if self.base.needs_clean else None
        adv = model(x_adv)
        value = self.base.of_logits(adv if clean is None else clean, adv, batch.y)
        pace = 1.0 if batch.step >= self.warmup else batch.step / self.warmup
        if self.weight * pace == 0:
            return value
        return value + self.weight * pace * self.term(adv, batch.y)

    def state(self) -> dict[str, Tensor]:
        """Return the base's state."""
        return self.base.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`."""
        self.base.restore(state)

    def term(self, adv: Tensor, y: Tensor) -> Tensor:
        """Return the calibration term of adversarial logits (N x K)."""
        if self.form == "entropy":
            return entropy_term(adv, y, eta=self.eta, tau=self.tau)
        return complement_term(adv, y) if self.form == "complement" else calibration_term(adv, y)
