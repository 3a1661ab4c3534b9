"""From counted votes to a certified radius: exact binomial bounds and the normal quantile (Cohen et al., ICML 2019)."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maodun.core.errors import InputError

Numbers = NDArray[np.float64]


def check_confidence(alpha: float) -> None:
    """Raise InputError unless `alpha`, the share of certificates that may be wrong, lies in (0, 1)."""
    if not 0 < alpha < 1:
        raise InputError(f"alpha {alpha}", "is the share of certificates that may be wrong", "use for example 0.001")


def check_sigma(sigma: float) -> None:
    """Raise InputError unless `sigma`, the noise's standard deviation in [0, 1] input units, is positive and finite."""
    if not (sigma > 0 and np.isfinite(sigma)):
        raise InputError(f"sigma {sigma}", "is a standard deviation in [0, 1] input units", "use for example 0.25")


def lower_bound(successes: ArrayLike, n: int, alpha: float) -> Numbers:
    """Return the one-sided Clopper-Pearson bound: with probability 1 - `alpha` the true share is no lower.

    `successes` (any shape) of `n` >= 1 trials; none gives 0, all give alpha ** (1 / n).
    """
    from scipy.stats import beta

    counts = np.asarray(successes, dtype=np.float64)
    bound = beta.ppf(alpha, np.maximum(counts, 0.5), n - counts + 1)
    return np.where(counts > 0, bound, 0.0)


def radius(share: ArrayLike, sigma: float) -> Numbers:
    """Return the certified l2 radius sigma * PhiInv(share) (any shape), 0 where `share` <= 1/2.

    `share` bounds the probability of the predicted class under noise from below; the radius is in input units.
    Source: Cohen, Rosenfeld and Kolter, ICML 2019, Theorem 1 with the runner-up bounded by 1 - share.
    """
    from scipy.special import ndtri

    bound = np.asarray(share, dtype=np.float64)
    return sigma * ndtri(np.maximum(bound, 0.5))  # type: ignore[no-any-return]


def largest_radius(n: int, sigma: float, alpha: float) -> float:
    """Return the radius that a classifier which never wavers gets from `n` draws: sigma * PhiInv(alpha ** (1 / n))."""
    return float(radius(alpha ** (1.0 / n), sigma))


def surely_ahead(first: ArrayLike, second: ArrayLike, alpha: float) -> NDArray[np.bool_]:
    """Tell whether `first` votes against `second` (same shape) could hardly come from a tie: p <= `alpha`, two-sided.

    The binomial test of Cohen et al.'s PREDICT; no votes at all are no lead.
    """
    from scipy.stats import binom

    ahead, behind = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    trials = ahead + behind
    # Under a tie both tails are equal, so the two-sided p is twice one of them.
    p = np.minimum(1.0, 2 * binom.sf(np.maximum(ahead, behind) - 1, trials, 0.5))
    return np.asarray((trials > 0) & (p <= alpha))
