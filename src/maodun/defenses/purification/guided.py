"""What purifiers that are guided by something have in common: one prediction per step, and a derivative inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from maodun.core.errors import InputError
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.levels import Levels
from maodun.defenses.purification.purifier import DiffusionFilter
from maodun.defenses.purification.samplers import State

# A gradient whose root mean square is below this is not blown up to a full step: what is left of it is rounding.
FAINT = 1e-4


class Told(Denoiser):
    """A denoiser that has been told its answer at one point, and asks `inner` anywhere else.

    Guidance needs the prediction before the sampler does; the network is then asked once for both.
    """

    def __init__(self, inner: Denoiser, u: Tensor, t: int, eps: Tensor) -> None:
        super().__init__()
        self.inner, self.u, self.t, self.eps = inner, u, t, eps

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        """Return the predicted noise."""
        if u is self.u and t == self.t:
            return self.eps
        eps: Tensor = self.inner(u, t, levels)
        return eps


def with_derivatives(step: Callable[[State], State], state: State) -> State:
    """Return `step(state)`, a step that differentiates inside and therefore needs a graph of its own.

    Where autograd is off the result is cut off from that graph; the operations are the same, so are the bits. Attention
    is computed without fused kernels, which have no second derivative.
    """
    live = torch.is_grad_enabled()
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        u = state[0] if live and state[0].requires_grad else state[0].detach().requires_grad_()
        after = step((u, *state[1:]))
    return after if live else tuple(each.detach() for each in after)


def slope(objective: Tensor, at: Tensor) -> Tensor:
    """Return the gradient of every sample's objective (N,) at `at` (N x ...), itself differentiable.

    Objectives of different samples must not depend on each other, then their sum has each one's own gradient: no mean
    over a batch, whose size would become a strength. Zero where nothing of the objective has a derivative, as behind a
    codec or a vote.
    """
    if not objective.requires_grad:
        return torch.zeros_like(at)
    (found,) = torch.autograd.grad(objective.sum(), at, create_graph=True, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def unit(direction: Tensor) -> Tensor:
    """Return every sample's direction (N x ...) at root mean square 1, fainter than FAINT in proportion fainter."""
    square = direction.flatten(1).square().mean(1)
    size = (square + 1e-24).sqrt().clamp_min(FAINT)
    return direction / size.reshape(-1, *([1] * (direction.ndim - 1)))


class Watching(DiffusionFilter):
    """A filter that looks at the classifier it protects; `Defended` introduces them by `attach`."""

    def __init__(self, score: str | Denoiser, **options: Any) -> None:
        super().__init__(score, **options)
        self.attached: tuple[nn.Module, ...] = ()

    def attach(self, model: nn.Module) -> None:
        """Take note of the classifier (in a tuple: it is nobody's submodule here, so nothing counts it twice).

        InputError as for DiffusionFilter.
        """
        super().attach(model)
        self.attached = (model,)

    @property
    def victim(self) -> nn.Module:
        """The classifier; InputError when there is none."""
        if not self.attached:
            reason = "is guided by the classifier behind it and has none"
            raise InputError(f"defence '{self.name}'", reason, "use it as Defended(defence, model)")
        return self.attached[0]


__all__ = ["FAINT", "Told", "Watching", "slope", "unit", "with_derivatives"]
