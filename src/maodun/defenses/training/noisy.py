"""Training under Gaussian noise: what a classifier that is to be smoothed has to have seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class GaussianAugmentation:
    """Cross-entropy at x + sigma n, n standard normal, drawn anew for every sample and step, not clipped to [0, 1].

    `sigma` > 0 in input units, `smoothing` of the labels, `seed` of the noise, which is a function of (seed, sample,
    step) alone. Source: Cohen, Rosenfeld and Kolter, ICML 2019. InputError for a sigma that is not positive.
    """

    sigma: float = 0.25
    smoothing: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise InputError(f"sigma {self.sigma}", "is a standard deviation in input units", "use for example 0.25")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean cross-entropy of the noisy batch."""
        noise = Stream(self.seed, "train/noise").normal(batch.rows, tuple(batch.x.shape[1:]), batch.step).to(batch.x)
        return F.cross_entropy(model(batch.x + self.sigma * noise), batch.y, label_smoothing=self.smoothing)
