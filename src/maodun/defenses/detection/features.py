"""Detectors that compare the classifier's features with those of clean samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.detection.base import Detector, Seen

_SHRINK = 1e-3


class Mahalanobis(Detector):
    """Refuse what is far from every class's mean in feature space (Lee et al., NeurIPS 2018).

    The score is the least squared Mahalanobis distance to a class mean under one covariance for all classes (shrunk by
    a thousandth of its mean variance), added over `layers` (names separated by commas; default: what enters the last
    linear layer), each in units of its clean mean. A reconstruction of the paper's core: its input perturbation
    and its logistic regression on attacked samples are left out. Breaker: the joint attack.
    """

    name = "mahalanobis"
    needs_features = True
    learnt = ("means", "whitening", "scale")
    means: Tensor
    whitening: Tensor
    scale: Tensor

    def __init__(
        self,
        layers: str = "",
        fpr: float = 0.05,
        samples: int = 2000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file, layers)

    def learn(self, seen: Seen, y: Tensor, adversarial: Seen | None) -> None:  # noqa: ARG002 - the common shape
        """Fit means and covariance per layer."""
        means, whitenings, scales = [], [], []
        for feature in seen.features:
            wide = feature.double()
            centres = torch.stack([_mean(wide[y == label], label) for label in range(seen.logits.shape[1])])
            apart = wide - centres[y]
            covariance = apart.T @ apart / wide.shape[0]
            ridge = _SHRINK * covariance.diagonal().mean() + 1e-12
            covariance += ridge * torch.eye(wide.shape[1], dtype=torch.float64, device=wide.device)
            whitening = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
            means.append(centres @ whitening)
            whitenings.append(whitening)
            scales.append(_square(wide @ whitening, means[-1]).amin(1).mean())
        self.keep(
            means=torch.cat(means, 1),
            whitening=torch.cat([each.flatten() for each in whitenings]),
            scale=torch.stack(scales),
        )

    def score(self, seen: Seen) -> Tensor:
        """Return the least distance, added over the layers."""
        total, start, place = seen.logits.new_zeros(seen.x.shape[0]), 0, 0
        for feature, scale in zip(seen.features, self.scale, strict=True):
            width = feature.shape[1]
            whitening = self.whitening[place : place + width**2].reshape(width, width)
            white, means = feature @ whitening, self.means[:, start : start + width]
            total = total + _square(white, means).amin(1) / scale
            start, place = start + width, place + width**2
        return total


class NearestNeighbours(Detector):
    """Refuse what is far from its `k`-th nearest clean neighbour in feature space (Sun et al., ICML 2022).

    Features are divided by their length; the score is the l2 distance to the k-th neighbour among the clean samples of
    the fit, averaged over `layers` (default: what enters the last linear layer). Breaker: the joint attack.
    """

    name = "knn"
    needs_features = True
    learnt = ("memory",)
    memory: Tensor

    def __init__(
        self,
        k: int = 10,
        layers: str = "",
        fpr: float = 0.05,
        samples: int = 2000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file, layers)
        self.k = _neighbours(k, samples)

    def measures(self) -> str:
        """Return layers and number of neighbours."""
        return f"{super().measures()}, k={self.k}"

    def learn(self, seen: Seen, y: Tensor, adversarial: Seen | None) -> None:  # noqa: ARG002 - the common shape
        """Remember the clean features."""
        self.keep(memory=torch.cat([_unit(feature) for feature in seen.features], 1))

    def score(self, seen: Seen) -> Tensor:
        """Return the distance to the k-th neighbour."""
        return torch.stack([each[:, self.k - 1] for each in _near(seen, self.memory, self.k, _unit)]).mean(0)


class LID(Detector):
    """Refuse where the local intrinsic dimensionality of the features is high (Ma et al., ICLR 2018).

    LID = -(mean over the k nearest clean neighbours of log(r_i / r_k))^-1 with r_i the l2 distances among the clean
    samples of the fit, averaged over `layers` (default: what enters the last linear layer). A reconstruction of the
    paper's core: it fits a logistic regression over all layers to noisy and attacked samples instead, and takes
    the neighbours from mini-batches of 100. Breaker: the joint attack (Athalye et al., ICML 2018).
    """

    name = "lid"
    needs_features = True
    learnt = ("memory",)
    memory: Tensor

    def __init__(
        self,
        k: int = 20,
        layers: str = "",
        fpr: float = 0.05,
        samples: int = 1000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file, layers)
        self.k = _neighbours(k, samples)
        if self.k < 2:
            raise InputError(f"k {k}", "a dimensionality needs two neighbours or more", "give for example 20")

    def measures(self) -> str:
        """Return layers and number of neighbours."""
        return f"{super().measures()}, k={self.k}"

    def learn(self, seen: Seen, y: Tensor, adversarial: Seen | None) -> None:  # noqa: ARG002 - the common shape
        """Remember the clean features."""
        self.keep(memory=torch.cat(seen.features, 1))

    def score(self, seen: Seen) -> Tensor:
        """Return the mean dimensionality over the layers."""
        found = []
        for near in _near(seen, self.memory, self.k, lambda feature: feature):
            near = near.clamp(min=1e-6)
            found.append(-1.0 / (near / near[:, -1:]).log().mean(1).clamp(max=-1e-6))
        return torch.stack(found).mean(0)


def _near(seen: Seen, memory: Tensor, k: int, prepare: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
    """Yield, per layer, the N x k distances to the nearest remembered features, in order."""
    start = 0
    for feature in seen.features:
        width = feature.shape[1]
        square = _square(prepare(feature), memory[:, start : start + width])
        yield square.topk(k, dim=1, largest=False).values.clamp(min=1e-12).sqrt()
        start += width


def _square(a: Tensor, b: Tensor) -> Tensor:
    """Return N x M squared l2 distances between the rows of `a` and of `b`."""
    return (a.square().sum(1, keepdim=True) + b.square().sum(1) - 2.0 * a @ b.T).clamp(min=0.0)


def _unit(feature: Tensor) -> Tensor:
    length: Tensor = feature.norm(dim=1, keepdim=True)
    return feature / length.clamp(min=1e-12)


def _mean(rows: Tensor, label: int) -> Tensor:
    if rows.shape[0] == 0:
        raise InputError("samples", f"hold none of class {label}, whose mean is needed", "fit with more samples")
    return rows.mean(0)


def _neighbours(k: int, samples: int) -> int:
    if not 1 <= k < samples:
        raise InputError(f"k {k}", f"is no number of neighbours among {samples} samples", "give 1 to samples - 1")
    return k
