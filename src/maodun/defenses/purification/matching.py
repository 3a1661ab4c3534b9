"""What a score network is trained to minimise: the weighted error of the noise it predicts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from maodun.core.streams import Stream
from maodun.defenses.purification.levels import Levels
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class ScoreMatching:
    """Denoising score matching on the noise range that purification needs; an objective of the one training loop.

    Images in [0, 1] become u_0 = 2x - 1 and y = u_0 + r n; the loss is the mean of w(r) |n_hat - n|^2 per pixel.
    `law` "uniform" draws r from the levels 0..`top` of `levels` uniformly with w = 1 (score matching with
    lambda = sigma^2: Vincent, 2011; Ho et al., 2020); "edm" draws log r ~ N(`mean`, `std`) cut to the range of those
    levels, with w = (r^2 + spread^2) / spread^2, which is EDM's weight written for the noise (Karras et al., 2022).
    Noise and levels are functions of (seed, row, step): a resumed training meets the same ones.
    """

    levels: Levels
    top: int
    law: Literal["uniform", "edm"] = "edm"
    spread: float = 0.5
    mean: float = -1.2
    std: float = 1.2
    seed: int = 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of a batch."""
        return self.errors(model, batch.x, batch.rows, batch.step).mean()

    def errors(self, model: nn.Module, x: Tensor, rows: Tensor, step: int) -> Tensor:
        """Return the loss of every image of `x` (N x C x H x W in [0, 1]), (N,), for ids `rows` (N,) at `step`."""
        stream = Stream(self.seed, "score-matching")
        ratio = self.ratios(stream.child("level").uniform(rows, (1,), step)[:, 0].double()).to(x)
        noise = stream.child("noise").normal(rows, tuple(x.shape[1:]), step).to(x)
        y = (2.0 * x - 1.0) + ratio.reshape(-1, 1, 1, 1) * noise
        error: Tensor = (model(y, ratio) - noise).square().flatten(1).mean(1)
        if self.law == "uniform":
            return error
        weighted: Tensor = error * (ratio.square() + self.spread**2) / self.spread**2
        return weighted

    def ratios(self, uniform: Tensor) -> Tensor:
        """Return the noise ratios (N,) that uniform draws in [0, 1) stand for."""
        if self.law == "uniform":
            return self.levels.ratios[(uniform * (self.top + 1)).long().clamp(max=self.top)]
        low, high = (
            0.5 * (1.0 + math.erf((math.log(self.levels.ratio(t)) - self.mean) / (self.std * math.sqrt(2.0))))
            for t in (0, self.top)
        )
        normal: Tensor = torch.special.ndtri(low + uniform * (high - low))
        return (self.mean + self.std * normal).exp()
