"""Projected gradient ascent along the slow waves of an image only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from maodun.attacks.gradient.pgd import PGD, PGDState
from maodun.core.errors import InputError
from maodun.core.geometry import cosine_basis
from maodun.core.problem import Problem


@dataclass(frozen=True, kw_only=True)
class LowFrequency(PGD):
    """PGD whose gradients and starts keep only the low frequencies of the image (Sharma et al., IJCAI 2019).

    Images N x C x H x W, values in [0, 1]. Of the orthonormal discrete cosine transform of each gradient the `share` of
    the rows and of the columns with the slowest waves stays, at least one of each; the step goes along what that makes.
    In l2 the perturbation has no other frequency, apart from what clipping to the box adds; in linf its sign is taken,
    so it is made of large patches. Denoisers and purifiers are built to take out fast changes and see slow ones as the
    picture. `share` 1 is PGD. InputError for a share outside (0, 1]. Costs as PGD.
    """

    name: ClassVar[str] = "lowfreq"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    images_only: ClassVar[bool] = True

    share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise InputError(f"share {self.share}", "is the part of the waves that stays", "give a number in (0, 1]")

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the low frequencies of the gradient."""
        gradient, state = super().slope(problem, state)
        return slow(gradient, self.share), state

    def _start(self, problem: Problem, restart: int) -> Tensor:
        start = super()._start(problem, restart)
        return problem.threat.project(problem.x + slow(start - problem.x, self.share), problem.x)


def slow(images: Tensor, share: float) -> Tensor:
    """Project `images` (N x C x H x W) on the slowest `share` of their waves along each side."""
    sides = []
    for size in images.shape[2:]:
        waves = cosine_basis(size).to(images)[: max(1, math.ceil(share * size))]
        sides.append(waves.T @ waves)
    kept: Tensor = sides[0] @ images @ sides[1]
    return kept
