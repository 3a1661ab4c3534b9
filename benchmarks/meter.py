"""Count the samples a contender sends through a model, notice weight gradients, and price a bare call."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calls:
    """Samples that went forward and backward, calls made, and how often a weight gradient was accumulated."""

    forward_samples: int = 0
    backward_samples: int = 0
    forward_calls: int = 0
    backward_calls: int = 0
    weight_gradients: int = 0


class _Tap(torch.autograd.Function):
    """Identity whose backward reports how many samples the gradient passed through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, calls: Calls) -> Tensor:
        ctx.calls = calls
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.calls.backward_samples += grad.shape[0]
        ctx.calls.backward_calls += 1
        return grad, None


class Counting(nn.Module):
    """A model that counts what passes through it; logits and gradients are those of the wrapped model.

    Weight gradients are seen by a hook on every parameter that requires a gradient when the wrapper is made, so a
    contender that freezes parameters itself, or asks autograd for input gradients only, reports none.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.calls = Calls()
        trained = [p for p in model.parameters() if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._seen) for p in trained]
        self.train(model.training)

    def _seen(self, parameter: Tensor) -> None:  # noqa: ARG002
        self.calls.weight_gradients += 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the wrapped model; x is [N, ...]."""
        self.calls.forward_samples += x.shape[0]
        self.calls.forward_calls += 1
        if x.requires_grad and torch.is_grad_enabled():
            x = _Tap.apply(x, self.calls)
        out: Tensor = self.model(x)
        return out

    def close(self) -> None:
        """Remove the hooks from the wrapped model."""
        for handle in self._handles:
            handle.remove()


def _forward(model: nn.Module, x: Tensor) -> None:
    with torch.inference_mode():
        model(x)


def _input_gradient(model: nn.Module, x: Tensor) -> None:
    leaf = x.detach().clone().requires_grad_(True)
    torch.autograd.grad(model(leaf).logsumexp(1).sum(), leaf)


@dataclass(frozen=True)
class Bare:
    """CPU seconds per sample of a forward and of an input gradient (forward included), parameters frozen."""

    forward: float
    gradient: float

    def price(self, forward_samples: float, backward_samples: float) -> float:
        """CPU seconds that the calls alone would take."""
        return forward_samples * self.forward + backward_samples * (self.gradient - self.forward)


def bare_cost(model: nn.Module, x: Tensor, *, seconds: float = 0.15) -> Bare:
    """Time bare calls on the batch `x`, each at least three times and for about `seconds`; medians per sample."""
    flags = [p.requires_grad for p in model.parameters()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        prices = []
        for call in (_forward, _input_gradient):
            call(model, x)
            times: list[float] = []
            while len(times) < 3 or sum(times) < seconds:
                start = time.process_time()
                call(model, x)
                times.append(time.process_time() - start)
            prices.append(statistics.median(times) / x.shape[0])
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    return Bare(*prices)
