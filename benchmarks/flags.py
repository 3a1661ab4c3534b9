"""Per-sample outcomes as short text: results can be compared sample by sample and still live in a small file."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def pack(flags: Sequence[bool] | Tensor) -> str:
    """Hex text of a row of booleans, first flag in the highest bit; the length must be kept beside it."""
    bits = [bool(f) for f in flags]
    if not bits:
        return ""
    number = int("".join("1" if b else "0" for b in bits).ljust(-(-len(bits) // 4) * 4, "0"), 2)
    return f"{number:0{-(-len(bits) // 4)}x}"


def unpack(text: str, n: int) -> list[bool]:
    """The `n` booleans that `pack` wrote."""
    if not n:
        return []
    bits = f"{int(text, 16):0{len(text) * 4}b}"
    return [c == "1" for c in bits[:n]]


def discordant(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int]:
    """(robust only under ours, robust only under theirs): where the two attacks disagree."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)


def sign_test(weaker: int, stronger: int) -> float:
    """Two-sided exact McNemar p-value for `weaker` and `stronger` discordant samples; 1 when there are none."""
    from math import comb

    n, k = weaker + stronger, min(weaker, stronger)
    if n == 0:
        return 1.0
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper-Pearson interval of a share."""
    from scipy.stats import binomtest

    found = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="exact")
    return float(found.low), float(found.high)
