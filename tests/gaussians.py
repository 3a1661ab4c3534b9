"""Gaussian data, whose score is known in closed form: the yardstick of everything that diffuses."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.defenses.purification import Denoiser, Levels


class Gaussian(Denoiser):
    """Pixels that are N(mean, covariance) in [-1, 1] space: the posterior mean of the noise, exactly.

    `covariance` is a number (independent pixels) or a matrix over the flattened pixels.
    """

    def __init__(self, mean: float = 0.1, covariance: float | Tensor = 0.09) -> None:
        super().__init__()
        self.mean, self.covariance, self.calls = mean, covariance, 0

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        self.calls += 1
        scale, sigma = levels.at(t)
        centred = u - scale * self.mean
        if isinstance(self.covariance, float):
            return sigma * centred / (scale**2 * self.covariance + sigma**2)
        total = scale**2 * self.covariance + sigma**2 * torch.eye(len(self.covariance), dtype=self.covariance.dtype)
        return (sigma * torch.linalg.solve(total.to(u), centred.flatten(1).T).T).reshape(u.shape)
