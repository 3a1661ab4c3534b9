"""What the outcomes of a text experiment amount to: shares with intervals, and paired differences with tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

_FLIPS = 10_000
UNATTACKED = ("clean", "validation")
"""What is measured without an attack: the test split, and the split that chose the epoch."""


@dataclass(frozen=True)
class Line:
    """One run under one attack (or clean), over all seeds.

    `share` of sentences answered rightly, mean over seeds, with its 95 % interval `low`, `high`; `seeds` holds the
    share of each. Against the reference: `gap` (this minus reference), its interval and its two-sided `p`; None for
    the reference itself, or without one. `n` sentences.
    """

    run: str
    attack: str
    share: float
    low: float
    high: float
    seeds: tuple[float, ...]
    n: int
    gap: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    p: float | None = None


def compare_runs(
    outcomes: Mapping[str, Sequence[Mapping[str, Tensor]]], reference: str | None, resamples: int
) -> list[Line]:
    """Return a line per attack and run from outcomes[run][seed][attack], booleans (N,): the sentence stands.

    A sentence's outcome is its mean over seeds, so the seeds are not taken for more sentences. Intervals: percentile
    bootstrap over sentences, the same draws for every run. p: sign flips of the paired differences, 10,000 draws, which
    for one seed is McNemar's question; Holm's correction is left to the reader. What another choice of seeds would
    give shows in `seeds` alone.
    """
    first = next(iter(outcomes.values()))[0]
    lines = []
    for attack in sorted(first, key=lambda name: (name not in UNATTACKED, name)):
        means = {run: _mean(seeds, attack) for run, seeds in outcomes.items()}
        base = means.get(reference) if reference is not None else None
        for run, mean in means.items():
            share = float(mean.mean())
            low, high = bootstrap(mean, resamples)
            each = tuple(float(seed[attack].float().mean()) for seed in outcomes[run])
            line = Line(run, attack, share, low, high, each, mean.size)
            if base is not None and run != reference:
                gap = mean - base
                ends = bootstrap(gap, resamples)
                line = Line(run, attack, share, low, high, each, mean.size, float(gap.mean()), *ends, sign_flips(gap))
            lines.append(line)
    return lines


def bootstrap(values: NDArray[np.float64], resamples: int, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of `values` (N,) over `resamples` draws of N with replacement."""
    generator = np.random.Generator(np.random.Philox(seed))
    n = values.size
    means = [values[generator.integers(0, n, n)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def sign_flips(gaps: NDArray[np.float64], seed: int = 0) -> float:
    """Return the two-sided p of mean(`gaps`) = 0 when each gap (N,) might as well have had the other sign.

    The observed signs are counted as one more draw, so the smallest p is 1 / 10,001.
    """
    moved = gaps[gaps != 0]
    if not moved.size:
        return 1.0
    generator = np.random.Generator(np.random.Philox(seed))
    seen = abs(moved.sum()) - 1e-9
    flips = generator.integers(0, 2, (_FLIPS, moved.size), dtype=np.int8) * 2 - 1
    return float((1 + (np.abs(flips @ moved) >= seen).sum()) / (1 + _FLIPS))


def _mean(seeds: Sequence[Mapping[str, Tensor]], attack: str) -> NDArray[np.float64]:
    stacked = np.stack([seed[attack].double().numpy() for seed in seeds])
    return np.asarray(stacked.mean(0), dtype=np.float64)
