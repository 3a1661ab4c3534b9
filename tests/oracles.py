"""Models whose answers are known in closed form, shared by the attack tests.

`Linear` (any number of classes and any input shape) has a known nearest adversarial in linf, l2 and l1 as long as that
point lies inside the box; `samples` draws inputs for which it does. `Sphere` has two classes and a curved boundary.
`Noisy` adds its own keyed noise; `Counting` counts what passes through a model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from maodun.core import context

SHAPES = {1: (24,), 2: (4, 6), 3: (1, 4, 6)}
"""Input shapes of rank 1, 2 and 3, all with 24 entries."""


def generator(seed: int) -> torch.Generator:
    """A private generator: tests do not touch the global one."""
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    """Logits `scale * (W x + b) + shift` of the flattened input."""

    def __init__(self, weight: Tensor, bias: Tensor, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x.flatten(1) @ self.weight.T + self.bias) + self.shift


def linear(classes: int = 5, entries: int = 24, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> Linear:
    """A random linear model whose classes tie at the centre of the box."""
    weight = torch.randn(classes, entries, generator=generator(seed))
    return Linear(weight, -weight.sum(1) / 2, scale, shift).eval()


def samples(model: nn.Module, n: int, shape: tuple[int, ...] = SHAPES[3], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs in [0.3, 0.7], with room to the box's walls, and the classes the model gives them.

    Those of a linear model lie towards the weights of a random class: margins of a size an attack has to work for.
    """
    source = generator(seed)
    x = 0.45 + 0.1 * torch.rand(n, *shape, generator=source)
    if isinstance(model, Linear):
        weight = model.weight.detach()
        pick = weight[torch.randint(weight.shape[0], (n,), generator=source)]
        x = x + (0.15 * pick / pick.abs().amax(1, keepdim=True)).reshape(x.shape)
    with torch.no_grad():
        return x, model(x).argmax(1)


def dual(weight: Tensor, norm: str) -> Tensor:
    """Length of ... x D rows in the norm dual to `norm`."""
    if norm == "linf":
        return weight.abs().sum(-1)
    return torch.linalg.vector_norm(weight, dim=-1) if norm == "l2" else weight.abs().amax(-1)


def distances(model: Linear, x: Tensor, norm: str) -> Tensor:
    """(N, C) distances to the half-space where class k beats the predicted one (infinite for the predicted one).

    Their minimum is the exact distance to the nearest adversarial when the box is not in the way.
    """
    with torch.no_grad():
        logits = x.flatten(1) @ model.weight.T + model.bias
        own = logits.argmax(1)
        gap = logits.gather(1, own[:, None]) - logits
        length = dual(model.weight[None] - model.weight[own][:, None], norm)
        return torch.where(length > 0, gap / length, math.inf)


def nearest(model: Linear, x: Tensor, norm: str) -> Tensor:
    """(N,) distances to the nearest adversarial, the box aside."""
    return distances(model, x, norm).amin(1)


class Sphere(nn.Module):
    """Class 0 inside a ball around the centre of the box, class 1 outside; the boundary is curved everywhere."""

    def __init__(self, radius: float = 0.8, flip: bool = False) -> None:
        super().__init__()
        self.radius, self.flip = radius, flip

    def forward(self, x: Tensor) -> Tensor:
        inside = self.radius**2 - (x.flatten(1) - 0.5).pow(2).sum(1)
        logits = torch.stack([inside, -inside], dim=1)
        return logits.flip(1) if self.flip else logits

    def distance(self, x: Tensor) -> Tensor:
        """(N,) l2 distances to the boundary, the box aside."""
        return ((x.flatten(1) - 0.5).norm(dim=1) - self.radius).abs()


class Noisy(nn.Module):
    """Add Gaussian noise of size `sigma` to the input, drawn from the keyed context of the call."""

    stochastic = True

    def __init__(self, model: nn.Module, sigma: float) -> None:
        super().__init__()
        self.model, self.sigma = model, sigma

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(x + self.sigma * context.noise(x, "noisy").normal())
        return answer


class Counting(nn.Module):
    """Count the calls and rows that pass forwards (with and without graph) and the rows that pass backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.clear()

    def clear(self) -> None:
        """Set all counts to zero."""
        self.calls = self.rows = self.graph_rows = self.backward_rows = self.weight_gradients = 0

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x)
        self.calls += 1
        self.rows += x.shape[0]
        if logits.requires_grad:
            self.graph_rows += x.shape[0]
            self.weight_gradients += any(parameter.requires_grad for parameter in self.model.parameters())
            logits.register_hook(self._back)
        return logits

    def _back(self, grad: Tensor) -> None:
        self.backward_rows += grad.shape[0]


class Flat(nn.Module):
    """Always the same logits: class 0 wins and no gradient leads anywhere."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.arange(classes, 0, -1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0.0 * x.flatten(1).sum(1, keepdim=True)
