"""A detector that asks how well clean data explains the input."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.detection.base import Detector, Seen


class Reconstruction(Detector):
    """Refuse what a linear autoencoder of clean inputs reconstructs badly (after MagNet, Meng and Chen, CCS 2017).

    The score is the mean squared error after projection on the first `components` principal axes of clean inputs: the
    best linear autoencoder, in closed form (Hendrycks and Gimpel's PCA detector, 2017, looks at the same trailing
    components). MagNet trains convolutional ones: this is a reconstruction of its idea. Breaker: the joint attack.
    """

    name = "reconstruction"
    learnt = ("centre", "axes")
    centre: Tensor
    axes: Tensor

    def __init__(
        self,
        components: int = 200,
        fpr: float = 0.05,
        samples: int = 2000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file)
        if components < 1:
            raise InputError(f"components {components}", "an autoencoder keeps at least one", "give for example 200")
        self.components = components

    def learn(self, seen: Seen, y: Tensor, adversarial: Seen | None) -> None:  # noqa: ARG002 - the common shape
        """Find the principal axes, from the smaller of the two Gram matrices."""
        flat = seen.x.flatten(1).double()
        centre = flat.mean(0)
        apart = flat - centre
        count = min(self.components, min(apart.shape) - 1)
        if apart.shape[0] < apart.shape[1]:
            values, vectors = torch.linalg.eigh(apart @ apart.T)
            axes = (apart.T @ vectors[:, -count:]) / values[-count:].clamp(min=1e-12).sqrt()
        else:
            axes = torch.linalg.eigh(apart.T @ apart).eigenvectors[:, -count:]
        self.keep(centre=centre, axes=axes)

    def score(self, seen: Seen) -> Tensor:
        """Return the mean squared error of every input."""
        apart = seen.x.flatten(1) - self.centre
        return (apart - (apart @ self.axes) @ self.axes.T).square().mean(1)
