"""The continuous adjoint of the reverse equation: how purification was first attacked, kept for the record.

The reverse equation is solved forwards by Euler and Maruyama, and only its end is kept. The backward pass solves the
same equation backwards from there, along the same Brownian path, and with it the adjoint equation da = -a db/du dtau
(additive noise adds nothing to it). The states met on the way back are not those that the forward pass went through, so
on grids as coarse as purification uses the result is not the derivative of what was computed (DiffBreak, NeurIPS 2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maodun.core import context
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.levels import CLEAN, Levels
from maodun.defenses.purification.replay import Chain, Move, Plain, Scene
from maodun.defenses.purification.samplers import State
from maodun.defenses.purification.solvers import EulerMaruyama


@dataclass(frozen=True)
class ReverseEquation:
    """The reverse equation of `levels` with the score of `denoiser`, as a way to run a filter's chain.

    Moves down are Euler and Maruyama steps of du = [f u - g^2 score] dt + g dw whatever the filter's own sampler is,
    with noise of the current draw; moves up are its diffusion. Its derivative is the adjoint's: DiffPure (ICML 2022)
    took it from torchsde, this one solves the same two equations with the noise of each sample's draw.
    """

    denoiser: Denoiser
    levels: Levels

    def run(self, chain: Chain, moves: Sequence[Move], start: State, guide: State) -> Tensor:
        """Return the end of the chain; what guides it is left out."""
        del chain, guide
        with context.ensured(start[0]):
            if torch.is_grad_enabled() and start[0].requires_grad:
                out: Tensor = _Adjoint.apply(self, tuple(moves), start[0])  # type: ignore[no-untyped-call]
                return out
            return Plain().run(_Forward(self), moves, start, ())

    def drift(self, u: Tensor, t: int) -> Tensor:
        """Return b of du = b dtau + g dw, tau running from noise to image, at level `t` (the clean end is level 0)."""
        t = max(t, 0)
        f, square = self.levels.coefficients(t)
        _, sigma = self.levels.at(t)
        eps: Tensor = self.denoiser(u, t, self.levels)
        return -f * u - square * eps / sigma

    def shake(self, t: int, span: float) -> float:
        """Return g sqrt(dtau) at level `t` (the clean end is level 0)."""
        return math.sqrt(self.levels.coefficients(max(t, 0))[1] * span)


class _Forward:
    """The chain solved forwards."""

    def __init__(self, equation: ReverseEquation) -> None:
        self.equation = equation

    def draw(self, x: Tensor, i: int, t: int) -> Tensor:
        """Return Gaussian noise for every move, whatever noise the filter's own sampler needs."""
        del t
        return context.noise(x, f"adjoint-{i}").normal()

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State) -> State:
        """Return the state after one move."""
        del guide
        levels = self.equation.levels
        if t == CLEAN:
            scale, sigma = levels.at(s)
            return (scale * state[0] + sigma * noise,)
        return EulerMaruyama().step(self.equation.denoiser, levels, state, t, s, noise)


class _Adjoint(torch.autograd.Function):
    """The equation as one node of the graph, of which only the end is kept."""

    @staticmethod
    def forward(ctx: Any, equation: ReverseEquation, moves: tuple[Move, ...], u: Tensor) -> Tensor:
        ctx.equation, ctx.chain, ctx.moves, ctx.scene = equation, _Forward(equation), moves, Scene(u)
        with ctx.scene.set():
            end = Plain().run(ctx.chain, moves, (u,), ())
        ctx.end = end.detach()
        return end

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        equation: ReverseEquation = ctx.equation
        u = ctx.end
        with ctx.scene.set():
            for i in reversed(range(len(ctx.moves))):
                t, s = ctx.moves[i]
                noise = ctx.chain.draw(u, i, t)
                if t == CLEAN:
                    scale, sigma = equation.levels.at(s)
                    u, grad = (u - sigma * noise) / scale, scale * grad
                    continue
                with torch.enable_grad():
                    at = u.detach().requires_grad_()
                    drift = equation.drift(at, s)
                (turn,) = torch.autograd.grad(drift, at, grad)
                span = equation.levels.moment(t) - equation.levels.moment(s)
                u = u - drift.detach() * span - equation.shake(s, span) * noise
                grad = grad + turn * span
        return None, None, grad


__all__ = ["ReverseEquation"]
