"""Norm balls and boxes: projections, norms and steps on batches, with one radius for all or one per sample."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

TINY = 1e-12


def per_sample(value: Tensor | float, like: Tensor) -> Tensor:
    """Shape a number or an (N,) tensor so that it broadcasts over `like` (N x ...)."""
    if not isinstance(value, Tensor):
        return torch.full((1,) * like.ndim, float(value), dtype=like.dtype, device=like.device)
    return value.to(like).reshape(-1, *([1] * (like.ndim - 1)))


def norms(delta: Tensor, norm: str) -> Tensor:
    """Return the (N,) norms of N x ... differences; l0 counts the entries that are not zero."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1)
    if norm == "l2":
        length: Tensor = torch.linalg.vector_norm(flat, dim=1)
        return length
    if norm == "l1":
        return flat.abs().sum(1)
    return (flat != 0).sum(1).to(flat.dtype)


def project_linf(x_adv: Tensor, x: Tensor, eps: Tensor | float) -> Tensor:
    """Return the point of the linf ball around `x`, cut by [0, 1], nearest to `x_adv`."""
    radius = per_sample(eps, x) if isinstance(eps, Tensor) else eps
    return torch.minimum(torch.maximum(x_adv, (x - radius).clamp_(min=0.0)), (x + radius).clamp_(max=1.0))


def project_l2(x_adv: Tensor, x: Tensor, eps: Tensor | float) -> Tensor:
    """Shrink `x_adv` to the l2 ball around `x`, then clip to [0, 1].

    Clipping only moves towards `x`, so the result is feasible; where the box is active it is not the Euclidean
    projection on the intersection. This is the form every published l2 attack uses.
    """
    delta = x_adv - x
    length = per_sample(norms(delta, "l2"), x)
    scale = (per_sample(eps, x) / length.clamp(min=TINY)).clamp_(max=1.0)
    return (x + delta * scale).clamp_(0.0, 1.0)


def project_l1(x_adv: Tensor, x: Tensor, eps: Tensor | float) -> Tensor:
    """Return the Euclidean projection on the l1 ball around `x` intersected with [0, 1].

    Each coordinate becomes sign(u) * clip(|u| - m, 0, room) for one multiplier m >= 0 per sample, found exactly from
    the sorted breakpoints |u| and |u| - room (Croce and Hein, "Mind the box", ICML 2021, Proposition 2.1).
    """
    u = (x_adv - x).flatten(1)
    base = x.flatten(1)
    size = u.abs()
    room = torch.minimum(torch.where(u > 0, 1.0 - base, base), size)
    radius = (eps if isinstance(eps, Tensor) else torch.full((u.shape[0],), float(eps))).to(u).reshape(-1, 1)
    # total(m) = sum(clip(size - m, 0, room)) falls piecewise linearly; walk its breakpoints from the largest down.
    points, order = torch.cat([size, size - room], dim=1).sort(dim=1, descending=True)
    turns = torch.where(order < size.shape[1], 1.0, -1.0).to(u.dtype)
    slope = turns.cumsum(1)
    rise = slope[:, :-1] * (points[:, :-1] - points[:, 1:])
    total = torch.cat([torch.zeros_like(radius), rise.cumsum(1)], dim=1)
    last = (total <= radius).sum(1, keepdim=True).sub_(1).clamp_(min=0)
    gap = radius - total.gather(1, last)
    multiplier = (points.gather(1, last) - gap / slope.gather(1, last).clamp(min=1.0)).clamp_(min=0.0)
    multiplier = torch.where(room.sum(1, keepdim=True) <= radius, torch.zeros_like(multiplier), multiplier)
    shrunk = torch.minimum((size - multiplier).clamp_(min=0.0), room) * u.sign()
    return (x + shrunk.reshape(x.shape)).clamp_(0.0, 1.0)


def project_l0(x_adv: Tensor, x: Tensor, eps: Tensor | float) -> Tensor:
    """Keep the `eps` largest changes of each sample (entries counted one by one) and undo the rest; clip to [0, 1]."""
    delta = (x_adv.clamp(0.0, 1.0) - x).flatten(1)
    ranks = delta.abs().argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    limit = (eps if isinstance(eps, Tensor) else torch.full((x.shape[0],), float(eps))).to(x.device).reshape(-1, 1)
    return x + torch.where(ranks < limit, delta, torch.zeros_like(delta)).reshape(x.shape)


PROJECTIONS = {"linf": project_linf, "l2": project_l2, "l1": project_l1, "l0": project_l0}


def unit_l2(gradient: Tensor) -> Tensor:
    """Scale every sample to l2 length one; a zero gradient stays zero."""
    length = per_sample(norms(gradient, "l2"), gradient)
    return torch.where(length > 0, gradient / length.clamp(min=torch.finfo(gradient.dtype).tiny), gradient)


def sparse_l1(gradient: Tensor, x: Tensor, share: float | Tensor) -> Tensor:
    """Return the l1 step of length one along the signs of the largest usable gradient entries.

    Entries at a bound the step would cross are not usable. `share` of the entries (at least one; a number or (N,))
    move equally. A dense step is very weak in l1 (Tramer and Boneh, 2019; Croce and Hein, 2021).
    """
    flat, base = gradient.flatten(1), x.flatten(1)
    usable = torch.where(flat > 0, base < 1.0, base > 0.0) & (flat != 0)
    size = torch.where(usable, flat.abs(), torch.zeros_like(flat))
    entries = flat.shape[1]
    if isinstance(share, Tensor):
        count = (share * entries).floor().clamp(1, entries).to(torch.int64).reshape(-1, 1)
        top = size.sort(dim=1, descending=True).values.gather(1, count - 1)
    else:
        top = size.topk(max(1, int(share * entries)), dim=1).values[:, -1:]
    chosen = (size >= top) & usable
    step = torch.where(chosen, flat.sign(), torch.zeros_like(flat))
    return (step / chosen.sum(1, keepdim=True).clamp(min=1)).reshape(gradient.shape)


@cache
def cosine_basis(size: int) -> Tensor:
    """Return the orthonormal DCT-II matrix, size x size: its rows are the basis vectors."""
    k, n = torch.arange(size, dtype=torch.float64).view(-1, 1), torch.arange(size, dtype=torch.float64).view(1, -1)
    basis = torch.cos(math.pi * (n + 0.5) * k / size) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()
