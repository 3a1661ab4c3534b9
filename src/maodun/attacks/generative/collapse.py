"""Has a generator collapsed? Whether its perturbations are one pattern, and whether the answers they force are one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Collapse:
    """`cosine` is the mean pairwise cosine of perturbations (1: universal), `entropy` that of the histogram of forced
    classes in nats (0: one class for all), `classes` how many classes occur, `n` how many images.
    """

    cosine: float
    entropy: float
    classes: int
    n: int


def mean_cosine(delta: Tensor) -> Tensor:
    """Return the mean cosine over all pairs of different rows of `delta` (N x ...); zero rows count as orthogonal.

    With unit rows u the sum over pairs is |sum u|^2 less the sum of |u|^2: no N x N table is needed. 0 below two rows.
    """
    flat = delta.flatten(1).double()
    length = flat.norm(dim=1, keepdim=True)
    units = torch.where(length > 0, flat / length.clamp(min=1e-30), torch.zeros_like(flat))
    n = flat.shape[0]
    if n < 2:
        return torch.zeros((), dtype=torch.float64, device=delta.device)
    return (units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1))


def collapse(delta: Tensor, predictions: Tensor) -> Collapse:
    """Return the metrics of perturbations `delta` (N x ...) and the classes (N,) the target answers to them."""
    counts = torch.bincount(predictions).double()
    share = counts[counts > 0] / counts.sum()
    entropy = float(-(share * share.log()).sum())
    return Collapse(float(mean_cosine(delta)), max(0.0, entropy), int(share.numel()), delta.shape[0])
