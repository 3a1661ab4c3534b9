"""More about confidence: per class, as a reason to abstain or to doubt, after the best temperature, with intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maodun.arena.calibration import BINS, Scores, calibrate, equal_width_index

_LOG_T = (-5.0, 5.0)


def classwise_ece(probs: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Return the calibration error of every class's probability, averaged over the classes (Kull et al., NeurIPS 2019).

    `probs` N x C, `labels` (N,). For each class, samples are binned by that class's probability into `bins` intervals
    (lo, hi] of [0, 1], and the gap to the class's frequency is weighted by the bin's share.
    """
    p = probs.double()
    n, classes = p.shape
    truth = torch.nn.functional.one_hot(labels, classes).double()
    index = (torch.ceil(p * bins).long() - 1).clamp(0, bins - 1) + bins * torch.arange(classes, device=p.device)
    zeros = torch.zeros(bins * classes, dtype=torch.float64, device=p.device)
    # Within a bin, count * |mean probability - frequency| is the distance of two sums.
    sums = zeros.index_add(0, index.flatten(), (p - truth).flatten())
    return float(sums.abs().sum() / (n * classes))


@dataclass(frozen=True)
class Abstention:
    """What confidence is worth as a reason to stay silent.

    `aurc` is the mean error rate over all coverages when the least confident answers are dropped first (lower is
    better; 0 for no errors); `aurc_best` the least it can be at this accuracy; `coverage` the largest share of samples
    that can be answered at each wanted accuracy (0 where none reaches it).
    """

    aurc: float
    aurc_best: float
    coverage: dict[float, float]


def abstention(probs: Tensor, labels: Tensor, accuracies: tuple[float, ...] = (0.8, 0.9, 0.95)) -> Abstention:
    """Return area under the risk-coverage curve and coverage at given accuracies of N x C probabilities.

    Equal confidences are taken together, so the order of the samples does not matter. Geifman et al. (ICLR 2019).
    """
    confidence, predicted = probs.double().max(1)
    wrong = (predicted != labels).double()
    n = wrong.shape[0]
    order = confidence.argsort(descending=True, stable=True)
    confidence, wrong = confidence[order], wrong[order]
    count = torch.arange(1, n + 1, dtype=torch.float64, device=wrong.device)
    # Among ties the errors are spread evenly: each sample of a tie stands for the tie's mean error.
    _, tie, size = torch.unique_consecutive(confidence, return_inverse=True, return_counts=True)
    errors = torch.zeros(len(size), dtype=torch.float64, device=wrong.device).index_add(0, tie, wrong) / size
    risk = errors[tie].cumsum(0) / count
    ends = size.cumsum(0) - 1
    reached = {
        wanted: max((float(count[end]) / n for end in ends if 1 - float(risk[end]) >= wanted - 1e-12), default=0.0)
        for wanted in accuracies
    }
    share = wrong.sort().values.cumsum(0) / count
    return Abstention(float(risk.mean()), float(share.mean()), reached)


def tempered(probs: Tensor, temperature: float) -> Tensor:
    """Return softmax(log probs / T): what the model would say had its logits been divided by T. T > 0."""
    floor = torch.finfo(torch.float32).tiny
    return torch.softmax(probs.double().clamp(min=floor).log() / temperature, 1)


def best_temperature(probs: Tensor, labels: Tensor) -> float:
    """Return the temperature in [e^-5, e^5] with the least negative log-likelihood (Guo et al., ICML 2017).

    Fit it on samples other than those reported. Where every answer is right it runs to the lower end.
    """
    from scipy.optimize import minimize_scalar

    logs = probs.double().clamp(min=torch.finfo(torch.float32).tiny).log()

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logs / np.exp(log_t), labels))

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_T, method="bounded", options={"xatol": 1e-9}).x))


def after_temperature(probs: Tensor, labels: Tensor) -> tuple[float, Scores]:
    """Return the mean best temperature and the calibration after scaling, each half of the samples by the other's.

    Samples are halved by turns, so neither half is scored with a temperature fitted on it. Needs N >= 2.
    """
    temperature, scaled = held_out(probs, labels, probs)
    return temperature, calibrate(scaled, labels)


def held_out(probs: Tensor, labels: Tensor, fitted_on: Tensor) -> tuple[float, Tensor]:
    """Return the mean best temperature and N x C `probs` scaled, each half by what suits the other half best.

    `fitted_on` (N x C) are the predictions on which the temperatures are fitted, for the same samples in the same
    order: `probs` themselves, or the clean ones of attacked samples. Halves are taken by turns. Needs N >= 2.
    """
    even = torch.arange(labels.shape[0], device=labels.device) % 2 == 0
    scaled = torch.empty_like(probs, dtype=torch.float64)
    temperatures = []
    for part in (even, ~even):
        temperatures.append(best_temperature(fitted_on[~part], labels[~part]))
        scaled[part] = tempered(probs[part], temperatures[-1])
    return float(np.mean(temperatures)), scaled


def auroc(probs: Tensor, labels: Tensor) -> float | None:
    """Return how often a right answer is surer than a wrong one, ties counted half; None where one of them is missing.

    The area under the ROC curve of the top probability of N x C `probs` as a detector of right answers.
    """
    from scipy.stats import rankdata  # a second of import that most commands do without

    confidence, predicted = probs.double().max(1)
    right = (predicted == labels).cpu().numpy()
    n, hits = len(right), int(right.sum())
    if hits in (0, n):
        return None
    ranks = rankdata(confidence.cpu().numpy())
    return float((ranks[right].sum() - hits * (hits + 1) / 2) / (hits * (n - hits)))


def entropies(probs: Tensor, labels: Tensor) -> tuple[float | None, float | None]:
    """Return the mean entropy of N x C `probs` in nats over right and over wrong answers, None where there are none."""
    p = probs.double()
    entropy = torch.special.entr(p).sum(1)
    right = p.argmax(1) == labels
    means = [float(entropy[part].mean()) if bool(part.any()) else None for part in (right, ~right)]
    return means[0], means[1]


def spread(
    probs: Tensor, labels: Tensor, *, bins: int = BINS, draws: int = 200, level: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Return the bootstrap percentile intervals of `ece`, `over` and `under` (equal-width bins) and of `gap`.

    `gap` is mean confidence minus accuracy. All `draws` resamples of the samples are made at once. The split into over
    and under is biased upwards for small n, as the calibration error is: read the intervals as spread.
    """
    confidence, predicted = probs.double().max(1)
    surplus = (confidence - (predicted == labels).double()).cpu().numpy()
    index = equal_width_index(confidence, bins).cpu().numpy()
    n = len(surplus)
    rows = np.random.default_rng(seed).integers(0, n, (draws, n))
    place = index[rows] + bins * np.arange(draws)[:, None]
    # Within a bin, share * |confidence - accuracy| is the sum of the surpluses over n.
    sums = np.bincount(place.ravel(), surplus[rows].ravel(), minlength=bins * draws).reshape(draws, bins) / n
    values = {
        "ece": np.abs(sums).sum(1),
        "over": sums.clip(min=0).sum(1),
        "under": (-sums).clip(min=0).sum(1),
        "gap": sums.sum(1),
    }
    ends = [(1 - level) / 2, (1 + level) / 2]
    found = {name: np.quantile(value, ends) for name, value in values.items()}
    return {name: (float(low), float(high)) for name, (low, high) in found.items()}


def bootstrap(
    probs: Tensor,
    labels: Tensor,
    statistic: Callable[[Tensor, Tensor], float],
    *,
    draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of `statistic(probs, labels)` over `draws` resamples of the samples.

    Calibration errors are biased upwards for small n, and so are their resamples: read the interval as spread.
    """
    rng = np.random.default_rng(seed)
    n = labels.shape[0]
    values = []
    for _ in range(draws):
        rows = torch.from_numpy(rng.integers(0, n, n)).to(labels.device)
        values.append(statistic(probs[rows], labels[rows]))
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
