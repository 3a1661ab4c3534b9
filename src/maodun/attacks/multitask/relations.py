"""Who is near whom, before and after an embedding: the terms of the relation-preservation module (reconstruction).

`h` B x D and `z` B x m are the same samples before and after. Everything is differentiable in `z` and works in the
dtype it is given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from maodun.core.errors import InputError


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the N x M squared Euclidean distances of rows, never below zero."""
    cross = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2.0 * a @ b.T
    return cross.clamp(min=0.0)


def affinities(h: Tensor, perplexity: float = 20.0, iterations: int = 40) -> Tensor:
    """Return the symmetric B x B affinities of t-SNE, zero on the diagonal, of sum one (van der Maaten, 2008).

    Row i is a Gaussian around h_i whose width gives it the wanted perplexity (bisection of its precision); rows and
    columns are then averaged. InputError when the batch cannot have so large a perplexity.
    """
    rows = h.shape[0]
    if not 1.0 < perplexity < rows - 1:
        raise InputError(f"perplexity {perplexity:g}", f"cannot be had among {rows} samples", "use larger batches")
    distance = squared_distances(h, h)
    eye = torch.eye(rows, dtype=torch.bool, device=h.device)
    # The nearest neighbour's distance is taken off: it changes no share and keeps the exponentials from vanishing.
    distance = distance - distance.masked_fill(eye, math.inf).amin(1, keepdim=True)
    scale = distance.masked_fill(eye, 0.0).sum(1, keepdim=True) / (rows - 1)
    low, high = torch.full_like(scale, -20.0), torch.full_like(scale, 20.0)
    shares = distance
    for _ in range(iterations):
        middle = (low + high) / 2
        logits = (-distance * middle.exp() / scale.clamp(min=1e-12)).masked_fill(eye, -math.inf)
        shares = logits.softmax(1)
        spread = -(shares * shares.clamp(min=1e-12).log()).sum(1, keepdim=True)
        wide = spread > math.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (shares + shares.T) / (2.0 * rows)


def neighbourhood_divergence(p: Tensor, z: Tensor, scale: float = 10.0) -> Tensor:
    """Return KL(P || Q), with Q_ij in proportion to 1 / (1 + scale |z_i - z_j|^2) off the diagonal.

    Codes lie on the unit sphere, where distances stay below 2; `scale` gives the kernel room to tell near from far.
    """
    eye = torch.eye(z.shape[0], dtype=torch.bool, device=z.device)
    q = (1.0 / (1.0 + scale * squared_distances(z, z))).masked_fill(eye, 0.0)
    q = q / q.sum()
    divergence: Tensor = (p * (p.clamp(min=1e-12).log() - q.clamp(min=1e-12).log())).sum()
    return divergence


def laplacian(p: Tensor, z: Tensor) -> Tensor:
    """Return sum_ij P_ij |z_i - z_j|^2 (P sums to one): neighbours stay near, as in Laplacian eigenmaps."""
    return (p * squared_distances(z, z)).sum()


def distance_decorrelation(h: Tensor, z: Tensor) -> Tensor:
    """Return one minus the correlation of all pairwise distances before and after: the global shape."""
    rows, columns = torch.triu_indices(h.shape[0], h.shape[0], 1, device=h.device)
    before, after = ((squared_distances(each, each)[rows, columns] + 1e-12).sqrt() for each in (h, z))
    before, after = before - before.mean(), after - after.mean()
    together: Tensor = (before * after).sum() / (before.norm() * after.norm()).clamp(min=1e-12)
    return 1.0 - together


def whitening(z: Tensor) -> Tensor:
    """Return |cov(z) - I / m|_F^2: codes of length one that use all of their m dimensions alike."""
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (z.shape[0] - 1)
    off: Tensor = covariance - torch.eye(z.shape[1], dtype=z.dtype, device=z.device) / z.shape[1]
    return off.square().sum()


def total_variation(d: Tensor) -> Tensor:
    """Return (N,) mean absolute differences of neighbouring pixels of N x C x H x W."""
    down: Tensor = (d[:, :, 1:] - d[:, :, :-1]).abs().flatten(1).mean(1)
    across: Tensor = (d[:, :, :, 1:] - d[:, :, :, :-1]).abs().flatten(1).mean(1)
    return down + across
