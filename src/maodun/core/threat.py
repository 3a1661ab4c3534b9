"""What the adversary may change: norm, radius, and whether the wrong class is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maodun.core import flow, geometry
from maodun.core.errors import InputError, nearest
from maodun.core.streams import Stream

NORMS = ("linf", "l2", "l1", "l0", "flow")


@dataclass(frozen=True)
class Threat:
    """The set of inputs the adversary may choose: a norm ball of radius `eps` around x, cut by the box [0, 1].

    `norm` is linf, l2, l1 or l0 (l0 counts changed entries); `eps` is in input units and infinite by default, for
    minimum-norm attacks; `targeted` asks for a given wrong class instead of any. InputError for an unknown norm or an
    eps that is negative or not a number.

    "flow" bounds no values but displacements: an image (N x C x H x W) is inside when every pixel's value is found in
    the clean image within `eps` pixels along each axis, read bilinearly. The test needs no flow, so it judges any
    image from any attack. With one channel it is exact; with several it looks at each channel alone, which no true
    flow fails and a patchwork of colours might pass.
    """

    norm: str
    eps: float = math.inf
    targeted: bool = False

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise InputError(f"norm '{self.norm}'", "is not a norm known here", nearest(self.norm, list(NORMS)))
        if math.isnan(self.eps) or self.eps < 0:
            raise InputError(
                f"eps {self.eps}", "a radius cannot be negative", "give eps >= 0 in [0, 1] input units, as 8/255"
            )

    def with_eps(self, eps: float) -> Threat:
        """Return the same threat with another radius."""
        return Threat(self.norm, eps, self.targeted)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return `x_adv` (N x ...) brought into the ball around `x` and the box [0, 1]."""
        if math.isinf(self.eps):
            return x_adv.clamp(0.0, 1.0)
        if self.norm == "flow":
            low, high = flow.reach_within(x, self.eps)
            return torch.minimum(torch.maximum(x_adv, low), high)
        return geometry.PROJECTIONS[self.norm](x_adv, x, self.eps)

    def random_start(self, x: Tensor, stream: Stream, ids: Tensor, step: int | Tensor = 0) -> Tensor:
        """Return a point drawn uniformly from the ball around each row of `x`, then clipped to [0, 1].

        An infinite radius draws from the whole box. For l0 the changed entries and their values are uniform, for flow
        the displacements are.
        """
        shape = tuple(x.shape[1:])
        if math.isinf(self.eps):
            return stream.uniform(ids, shape, step).to(x)
        size = math.prod(shape)
        if self.norm == "flow":
            flow.check_images(x)
            return flow.warp(x, (stream.uniform(ids, (2, *shape[1:]), step) * 2.0 - 1.0).to(x) * self.eps)
        if self.norm == "linf":
            delta = (stream.uniform(ids, shape, step) * 2.0 - 1.0).to(x) * self.eps
        elif self.norm == "l2":
            direction = geometry.unit_l2(stream.normal(ids, shape, step))
            radius = stream.child("radius").uniform(ids, (), step) ** (1.0 / size)
            delta = (direction * geometry.per_sample(radius * self.eps, direction)).to(x)
        elif self.norm == "l1":
            # Uniform in the l1 ball: exponential magnitudes over their sum plus one more exponential.
            uniform = stream.uniform(ids, (size + 1,), step).clamp(min=2.0**-25)
            spread = -torch.log(uniform)
            share = spread[:, :size] / spread.sum(1, keepdim=True)
            delta = (share * stream.child("sign").signs(ids, (size,), step)).reshape(x.shape).to(x) * self.eps
        else:
            order = stream.uniform(ids, (size,), step).argsort(1).argsort(1)
            value = stream.child("value").uniform(ids, (size,), step).to(x)
            return torch.where((order < self.eps).to(x.device), value, x.flatten(1)).reshape(x.shape)
        return (x + delta).clamp_(0.0, 1.0)

    def steepest(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the step of unit length, in this norm, along which a linear function with `gradient` grows most.

        linf, flow: the sign. l2: the gradient over its length (zero stays zero). l1, l0: the signs of the largest
        entries that the box lets move at `x`, scaled to l1 length one: about as many as the ball can carry to a wall
        (1.5 eps; 5 % when eps is infinite). A single entry would be exact but crawls, more never gather in the best.
        """
        if self.norm in ("linf", "flow"):
            return gradient.sign()
        if self.norm == "l2":
            return geometry.unit_l2(gradient)
        entries = gradient[0].numel()
        count = 0.05 * entries if math.isinf(self.eps) else min(int(1.5 * self.eps) + 0.5, entries)
        return geometry.sparse_l1(gradient, x, count / entries)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return the (N,) distances between rows in this norm; in flow, displacements in pixels."""
        if self.norm == "flow":
            return flow.displacement(x_adv, x)
        return geometry.norms(x_adv - x, self.norm)

    def contains(self, x_adv: Tensor, x: Tensor, slack: float = 1e-5) -> Tensor:
        """Return (N,) booleans: inside the ball and the box up to a relative `slack` for float32 rounding."""
        flat = x_adv.flatten(1)
        in_box = (flat >= -1e-6).all(1) & (flat <= 1.0 + 1e-6).all(1)
        if math.isinf(self.eps):
            return in_box
        if self.norm == "flow":
            return in_box & flow.inside(x_adv, x, self.eps * (1.0 + slack))
        return in_box & (self.distance(x_adv, x) <= self.eps * (1.0 + slack) + 1e-6)

    def __str__(self) -> str:
        unit = " px" if self.norm == "flow" else ""
        radius = "any radius" if math.isinf(self.eps) else f"eps {self.eps:.6g}{unit}"
        return f"{self.norm}, {radius}" + (", targeted" if self.targeted else "")
