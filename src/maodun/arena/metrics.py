"""What the records of a cell amount to: rates with intervals, distances, costs.

All functions take the columns of the records as numpy arrays, one entry per sample.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maodun.arena.summary import Rate

Columns = Mapping[str, NDArray[Any]]
CONFIDENCE = 0.95


def rate(hits: int, n: int, confidence: float = CONFIDENCE) -> Rate:
    """Return `hits` of `n` as a rate with its exact (Clopper-Pearson) two-sided interval from scipy.

    Nothing observed (n = 0) is the rate 0 with the interval [0, 1].
    """
    from scipy.stats import binomtest  # a second of import that most commands do without

    if n == 0:
        return Rate(value=0.0, low=0.0, high=1.0, n=0)
    interval = binomtest(int(hits), int(n)).proportion_ci(confidence_level=confidence, method="exact")
    return Rate(value=hits / n, low=float(interval.low), high=float(interval.high), n=int(n))


def clean_accuracy(columns: Columns) -> Rate:
    """Return the share of samples answered correctly without an attack, under the verdict's rule."""
    return rate(int(columns["clean_correct"].sum()), len(columns["clean_correct"]))


def robust_accuracy(columns: Columns) -> Rate:
    """Return the share of samples that the attack did not fell, under the verdict's rule.

    A clean error counts as fallen. Clean and attacked inputs meet the same verdict draws, so for a threat
    that allows nothing this is exactly the clean accuracy, also of a stochastic model.
    """
    return rate(int((~columns["success"]).sum()), len(columns["success"]))


def success_of_all(columns: Columns) -> Rate:
    """Return ASR(all) = successes / all samples; clean errors are in both."""
    return rate(int(columns["success"].sum()), len(columns["success"]))


def success_of_correct(columns: Columns) -> Rate:
    """Return ASR(correct) = successes among initially correct samples / initially correct samples."""
    correct = columns["clean_correct"]
    return rate(int((columns["success"] & correct).sum()), int(correct.sum()))


def fallen(columns: Columns) -> NDArray[np.bool_]:
    """Return which samples the attack felled: initially correct and a success."""
    return np.asarray(columns["success"] & columns["clean_correct"])


def median_distance(columns: Columns) -> float | None:
    """Return the median distance, in the threat's norm, over the fallen samples; None when none fell."""
    felled = fallen(columns)
    return float(np.median(columns["distance"][felled])) if felled.any() else None


def rho(columns: Columns) -> float | None:
    """Return DeepFool's robustness: the mean of ||r||_2 / ||x||_2 over the fallen samples (None: none fell).

    Moosavi-Dezfooli et al. (CVPR 2016), eq. 15.
    """
    felled = fallen(columns)
    return float(np.mean(columns["rho"][felled])) if felled.any() else None


def worst_case(cells: Sequence[Columns]) -> tuple[Rate, Rate, int]:
    """Return clean and robust accuracy against all spears at once, and which of them felled most samples.

    A sample is robust when no spear felled it. Samples that some cell has not reached yet are left out.
    """
    common = cells[0]["sample_id"]
    for columns in cells[1:]:
        common = np.intersect1d(common, columns["sample_id"])
    rows = [np.isin(columns["sample_id"], common) for columns in cells]
    orders = [np.argsort(columns["sample_id"][row]) for columns, row in zip(cells, rows, strict=True)]
    pairs = list(zip(cells, rows, orders, strict=True))
    successes = np.stack([columns["success"][row][order] for columns, row, order in pairs])
    clean = cells[0]["clean_correct"][rows[0]][orders[0]]
    robust = ~successes.any(0)
    strongest = int(successes.sum(1).argmax())
    n = len(common)
    return rate(int(clean.sum()), n), rate(int(robust.sum()), n), strongest


def security_curve(columns: Columns, points: int = 41) -> tuple[list[float], list[float]]:
    """Return radii from 0 to the largest distance found, and the robust accuracy at each.

    At radius e a sample is robust when it was initially correct and did not fall at a distance <= e.
    """
    felled = fallen(columns)
    reach = float(columns["distance"][felled].max()) if felled.any() else 0.0
    radii = np.linspace(0.0, reach, points) if reach > 0 else np.zeros(1)
    distance = np.where(felled, columns["distance"], np.inf)
    robust = [float((columns["clean_correct"] & (distance > radius)).mean()) for radius in radii]
    return [float(radius) for radius in radii], robust
