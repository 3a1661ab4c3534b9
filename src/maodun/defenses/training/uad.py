"""Uncertainty-aware distributional adversarial training: adversaries as a distribution, a refined reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.training.adversarial import Adversarial
from maodun.defenses.training.features import feature_layer, pooled, still, tapped
from maodun.defenses.training.objective import Batch, bare
from maodun.defenses.training.statistics import ClassStatistics

_TINY = 1e-5


def resample(h: Tensor, draws: Tensor, chosen: Tensor) -> Tensor:
    """Return feature maps (N x C x H x W) whose channel statistics are redrawn within their uncertainty.

    mu, s are each sample's channel means and deviations, U_mu and U_s the variances of those over the batch (no
    gradient): h~ = (s + e2 sqrt(U_s)) * (h - mu) / s + mu + e1 sqrt(U_mu). `draws` (N x 2 x C) are e1 and e2, clipped
    to +-2; `chosen` (N,) booleans: the other samples stay as they are. Li et al., "Uncertainty modeling for
    out-of-distribution generalization", ICLR 2022.
    """
    mean = h.mean((2, 3), keepdim=True)
    deviation = (h.var((2, 3), keepdim=True, unbiased=False) + _TINY).sqrt()
    noise = draws.clamp(-2.0, 2.0).to(h).unsqueeze(-1).unsqueeze(-1)
    widths = [statistic.detach().var(0, keepdim=True, unbiased=False).sqrt() for statistic in (mean, deviation)]
    centre = mean + noise[:, 0] * widths[0]
    scale = deviation + noise[:, 1] * widths[1]
    return torch.where(chosen.view(-1, 1, 1, 1), scale * (h - mean) / deviation + centre, h)


def gradient_gap(clean: Tensor, adv: Tensor) -> Tensor:
    """Return mean 1 - cos of two batches of input gradients; pairs with a zero gradient count as aligned."""
    first, second = clean.flatten(1), adv.flatten(1)
    lengths = first.norm(dim=1) * second.norm(dim=1)
    cosine = (first * second).sum(1) / lengths.clamp(min=1e-12)
    return torch.where(lengths > 1e-12, 1.0 - cosine, torch.zeros_like(cosine)).mean()


@dataclass(frozen=True)
class UAD:
    """Uncertainty-aware distributional adversarial training on top of PGD-AT, TRADES or MART (a reconstruction).

    base(f(x), f~(x'), y) + beta * mean KL(r || softmax f~(x')) + gamma * mean [1 - cos(g_c, g_a)].
    (A) `resampling`: f~ redraws the features of x' within the uncertainty of their statistics, for each sample with
    that probability, from step `start` on; 0 switches it off. Feature maps: see `resample`. Feature vectors: Gaussian
    noise with the running adversarial variance of the class (1 + 1/n of it: spread plus uncertainty of the mean).
    (B) `beta`: the reference r is the model's own clean answer where that is right; for a misclassified x it is that
    of the statistically nearest (Mahalanobis, running clean variance of the class) rightly classified sample of the
    same class in the batch, else the running mean answer of the class, else the label smoothed by 0.1. No gradient
    through r.
    (C) `gamma`: g_c, g_a are the input gradients of the cross-entropy at x (held) and x', in evaluation mode, on every
    second step; it needs a double backward pass. No outside model takes part.
    With resampling, beta and gamma 0 it is its base to the bit. `layer` names the features' module (None: chosen).
    Source: a reconstruction of "UAD-AT" (arXiv 2411.02871), whose exact losses are not public.
    """

    base: Adversarial
    resampling: float = 0.5
    beta: float = 6.0
    gamma: float = 0.5
    layer: str | None = None
    start: int = 0
    momentum: float = 0.99
    seed: int = 0
    memory: ClassStatistics = field(default_factory=ClassStatistics, repr=False, compare=False)

    reaches_inside: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.resampling <= 1:
            raise InputError(f"resampling {self.resampling}", "is a probability", "give a number in [0, 1]")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch."""
        return self.loss(model, batch, self.craft(model, batch))

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the base's adversarial inputs."""
        return self.base.craft(model, batch)

    def loss(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        """Return the mean loss given the adversarial inputs."""
        if self.resampling == 0 and self.beta == 0 and self.gamma == 0:
            return self.base.loss(model, batch, x_adv)
        own_model = bare(model)
        layer = feature_layer(own_model, batch.x, self.layer)
        with still(own_model), torch.no_grad(), tapped(layer) as seen:
            answer = own_model(batch.x).softmax(1)
        own = pooled(seen[0])
        reference = self.memory.refine(answer, own, batch.y) if self.beta else None
        resampling = self.resampling > 0 and batch.step >= self.start
        clean = model(batch.x) if self.base.needs_clean else None
        with tapped(layer, (lambda h: self.redraw(h, batch)) if resampling else None) as seen:
            adv = model(x_adv)
        value = self.base.of_logits(adv if clean is None else clean, adv, batch.y)
        if reference is not None:
            target = reference.clamp(min=1e-12)
            align = (reference * (target.log() - F.log_softmax(adv, dim=1))).sum(1).mean()
            value = value + self.beta * align
        if self.gamma and batch.step % 2 == 0:
            value = value + self.gamma * self.introspect(own_model, batch, x_adv)
        self.memory.update(own, pooled(seen[0]).detach(), answer, batch.y, self.momentum)
        return value

    def redraw(self, h: Tensor, batch: Batch) -> Tensor:
        """Return adversarial features `h` (N x C x H x W or N x D) redrawn within their uncertainty."""
        stream = Stream(self.seed, "train/uad")
        chosen = stream.uniform(batch.rows, (1,), batch.step).squeeze(1).to(h.device) < self.resampling
        noise = Stream(self.seed, "train/uad/noise")
        if h.ndim == 4:
            return resample(h, noise.normal(batch.rows, (2, h.shape[1]), batch.step), chosen)
        draws = noise.normal(batch.rows, tuple(h.shape[1:]), batch.step).clamp(-2.0, 2.0).to(h)
        return torch.where(chosen.unsqueeze(1), h + draws * self.memory.deviation(h, batch.y), h)

    def introspect(self, model: nn.Module, batch: Batch, x_adv: Tensor) -> Tensor:
        """Return how far the input gradients at clean and adversarial inputs differ in direction, with a graph."""
        with still(model):
            gradients = []
            for point, follow in ((batch.x, False), (x_adv, True)):
                point = point.detach().requires_grad_(True)
                with nullcontext() if follow else torch.enable_grad():
                    value = F.cross_entropy(model(point), batch.y, reduction="sum")
                    (gradient,) = torch.autograd.grad(value, point, create_graph=follow)
                gradients.append(gradient if follow else gradient.detach())
        return gradient_gap(*gradients)

    def state(self) -> dict[str, Tensor]:
        """Return the running statistics of the classes, and the base's state."""
        return {**self.memory.state(), **self.base.state()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`."""
        self.memory.restore(state)
        self.base.restore(state)
