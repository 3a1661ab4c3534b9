"""Reconstruction: an image through a bottleneck and back, judged against the unattacked original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from maodun.tasks import metrics
from maodun.tasks.base import Statistics, Task
from maodun.tasks.nets import AutoEncoder, initialise


@dataclass(frozen=True)
class Reconstruction(Task):
    """PSNR in dB and SSIM of the answer against the clean image; the metric is `by`, "ssim" or "psnr".

    The clean image is the reference under attack too: what the adversary added counts as an error.
    """

    name: ClassVar[str] = "reconstruction"
    metric: ClassVar[str] = "SSIM"

    by: str = "ssim"

    def build(self, seed: int = 0) -> nn.Module:
        """Return an autoencoder of 0.09 M parameters."""
        return initialise(AutoEncoder(), seed)

    def target(self, model: nn.Module, x: Tensor, truth: Tensor) -> Tensor:  # noqa: ARG002 - the common shape
        """The clean image."""
        return x

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean absolute plus 4 times mean square error."""
        error = (output - target).flatten(1)
        return error.abs().mean(1) + 4.0 * error.square().mean(1)

    def judge(self, output: Tensor, clean: Tensor, truth: Tensor) -> Statistics:  # noqa: ARG002 - the common shape
        """Return PSNR and SSIM of each image."""
        return {"psnr": metrics.psnr(output, clean), "ssim": metrics.ssim(output, clean)}

    def score(self, statistics: Statistics, weights: Tensor | None = None) -> float:
        """Return the mean of the metric chosen."""
        return metrics.weighted_mean(statistics[self.by], weights)
