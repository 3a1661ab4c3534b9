"""What the best point of a ball is worth on a linear model, and a model that remembers how far an attack climbed."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def optimum(weight: Tensor, x: Tensor, norm: str, eps: float) -> Tensor:
    """(N,) largest gains of `weight . x` inside the ball of radius `eps` around each row of `x`, cut by [0, 1]."""
    w, flat = weight.flatten(), x.flatten(1)
    price = w.abs()
    room = torch.where(w > 0, 1.0 - flat, flat)
    if norm == "linf":
        return (room.clamp(max=eps) * price).sum(1)
    if norm == "l1":  # A fractional knapsack: the dearest entries are moved as far as the box lets them.
        order = price.argsort(descending=True)
        room, price = room[:, order], price[order]
        spent = room.cumsum(1)
        return (torch.minimum(room, (eps - (spent - room)).clamp(min=0.0)) * price).sum(1)
    low, high = torch.zeros(len(x), 1), torch.full((len(x), 1), 1e4)
    for _ in range(80):  # The length grows with the multiplier of the free entries.
        middle = (low + high) / 2
        long = torch.minimum(middle * price, room).norm(dim=1, keepdim=True) > eps
        low, high = torch.where(long, low, middle), torch.where(long, middle, high)
    return (torch.minimum(low * price, room) * price).sum(1)


class Climbed(nn.Module):
    """A two-class linear model that never changes its mind; `best` is the highest value of `weight . x` it was shown.

    The batch must be whole in every call, as it is with `stop_early=False` and one micro-batch.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.flatten())
        self.best: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        value = x.flatten(1) @ self.weight
        seen = value.detach()
        if len(seen) > 8:  # not the probes that look for randomness
            self.best = seen if self.best is None else torch.maximum(self.best, seen)
        return torch.stack([torch.full_like(value, 0.0), 1e-3 * (value - 1e3)], dim=1)
