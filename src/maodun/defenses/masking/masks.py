"""The masks themselves. Every one is broken, each by the thing its `mitigation` names."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.masking.base import ActivationMask, Mask, OutputMask
from maodun.defenses.preprocessing.base import DefenseSpec


class NoiseLayers(ActivationMask):
    """Add normal noise of `sigma` (default 0.1) times a layer's root mean square after every ReLU, anew at each call.

    Draws are keyed by seed, sample, draw and layer. Exact gradients of single draws point here and there; their mean
    does not. Source: random self-ensemble (Liu et al., ECCV 2018), which trains with the noise; this adds it to any
    finished classifier.
    """

    name = "noise_layers"
    spec = DefenseSpec(stochastic=True)
    mitigation = "EOT: the mean gradient over draws"

    def __init__(self, sigma: float = 0.1) -> None:
        super().__init__()
        _positive("sigma", sigma, 0.1)
        self.sigma = sigma

    def activation(self, x: Tensor, place: int) -> Tensor:
        """Return noisy activations."""
        active = F.relu(x)
        noise = context.noise(active, f"{self.name}-{place}").normal()
        scale = active.detach().flatten(1).pow(2).mean(1).sqrt().reshape(-1, *([1] * (x.ndim - 1)))
        return active + self.sigma * scale * noise


class KWTA(ActivationMask):
    """k-winners-take-all: of every layer's activations of a sample only the `share` largest stay, the rest are zero.

    `share` in (0, 1], default 0.3. Which ones win changes from point to point, so the derivative is that of a piece
    that ends nearby. Losers below zero stay zero too, so that it fits a classifier trained with ReLUs. The BPDA partner
    is the ReLU. Source: Xiao, Zhong and Zheng, ICLR 2020, who train with it; broken by Tramer et al., NeurIPS 2020.
    """

    name = "k_wta"
    mitigation = "BPDA with the ReLU, gradients averaged over nearby points (NES), or a query attack such as square"

    def __init__(self, share: float = 0.3) -> None:
        super().__init__()
        if not 0 < share <= 1:
            raise InputError(f"share {share}", "it is a share of the activations", "use for example 0.3")
        self.share = share

    def activation(self, x: Tensor, place: int) -> Tensor:  # noqa: ARG002
        """Return the winners."""
        active = F.relu(x)
        flat = active.flatten(1)
        winners = max(1, int(self.share * flat.shape[1]))
        least = flat.topk(winners, dim=1, sorted=False).values.amin(1, keepdim=True)
        return torch.where(flat >= least, flat, torch.zeros_like(flat)).reshape(x.shape)


class Saturating(ActivationMask):
    """Activations that level off again and again: the ReLU as a staircase of sigmoids.

    Stairs are `step` wide and high (default 0.1); `sharpness` (default 100) is a sigmoid's slope in units of its stair.
    Between the rises every unit is saturated and its derivative vanishes, and what remains after several layers is
    noise; the value is never further than a stair from the ReLU's, so few decisions change. The BPDA partner is the
    ReLU. Its form is ours, a reconstruction; the idea is that of saturating networks (Nayebi and Ganguli, 2017), broken
    by Brendel and Bethge (2017).
    """

    name = "saturating"
    spec = DefenseSpec(differentiable=False)
    mitigation = "BPDA with the ReLU"

    def __init__(self, step: float = 0.1, sharpness: float = 100.0) -> None:
        super().__init__()
        _positive("step", step, 0.1)
        _positive("sharpness", sharpness, 100.0)
        self.step, self.sharpness = step, sharpness

    def activation(self, x: Tensor, place: int) -> Tensor:  # noqa: ARG002
        """Return the activations, levelled."""
        stairs = F.relu(x) / self.step
        below = stairs.detach().floor()
        return self.step * (below + (self.sharpness * (stairs - below - 0.5)).sigmoid())


class TruncatedGradient(Mask):
    """The identity, whose derivative is rounded towards zero to multiples of `step` (default 1).

    A confident classifier's cross-entropy has a gradient far below one everywhere, of which nothing is left. No
    forward value changes. The BPDA partner is the identity.
    """

    name = "truncated_gradient"
    spec = DefenseSpec(differentiable=False)
    lifted = True
    mitigation = "BPDA with the identity, or a query attack"

    def __init__(self, step: float = 1.0) -> None:
        super().__init__()
        _positive("step", step, 1.0)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        same: Tensor = _Truncate.apply(x, self.step)  # type: ignore[no-untyped-call]
        return same


class _Truncate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: float) -> Tensor:
        ctx.step = step
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient / ctx.step).trunc() * ctx.step, None


class QuantisedLogits(OutputMask):
    """Logits rounded to multiples of `step` (default 0.01): the derivative is zero, and the decision all but the same.

    Only classes closer than a step may change places. The BPDA partner is the identity.
    """

    name = "quantised_logits"
    spec = DefenseSpec(differentiable=False)
    mitigation = "BPDA with the identity, or a query attack"

    def __init__(self, step: float = 0.01) -> None:
        super().__init__()
        _positive("step", step, 0.01)
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded logits."""
        return torch.round(x / self.step) * self.step


class SquashedLogits(OutputMask):
    """Logits squeezed between -1 and 1 as 2 softmax(`sharpness` z) - 1, sharpness 100 by default.

    The commonest mask, mostly by mistake, is the softmax itself, which the arena refuses at the door; squeezed, it gets
    in. The top value saturates at one, and the derivative of every loss of it vanishes. The largest logit stays the
    largest, as far as float32 can tell. The BPDA partner is the identity.
    """

    name = "squashed_logits"
    spec = DefenseSpec(differentiable=False)
    mitigation = "take the logits before the squeeze, as BPDA with the identity does, or a query attack"

    def __init__(self, sharpness: float = 100.0) -> None:
        super().__init__()
        _positive("sharpness", sharpness, 100.0)
        self.sharpness = sharpness

    def forward(self, x: Tensor) -> Tensor:
        """Return the squeezed logits."""
        return 2 * (self.sharpness * x).softmax(1) - 1


class LogitScale(OutputMask):
    """Logits times `factor` (default 1000), as distillation at a high temperature leaves them.

    The cross-entropy of any classified sample underflows to a gradient of exactly zero; margins only grow. The BPDA
    partner is the identity. Source: Carlini and Wagner, S&P 2017, on defensive distillation.
    """

    name = "logit_scale"
    spec = DefenseSpec(differentiable=False)
    mitigation: ClassVar[str] = "a margin loss (dlr, margin), logits divided by a constant, or BPDA with the identity"

    def __init__(self, factor: float = 1000.0) -> None:
        super().__init__()
        _positive("factor", factor, 1000.0)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits."""
        return self.factor * x


def _positive(name: str, value: float, example: float) -> None:
    if value <= 0:
        raise InputError(f"{name} {value}", "it must be positive", f"use for example {example}")
