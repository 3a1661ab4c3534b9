"""The arithmetic of a fair comparison: rotated order, medians, paired ratios. No torch, no peers."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def rotation(names: Sequence[str], index: int) -> list[str]:
    """Return `names` started at another place in every round, so that no contender always runs first.

    Every second lap runs backwards: after 2 * len(names) rounds each contender has held each place twice and has
    followed more than one neighbour.
    """
    if not names:
        return []
    shift = index % len(names)
    order = [*names[shift:], *names[:shift]]
    return order[::-1] if (index // len(names)) % 2 else order


def median(values: Sequence[float]) -> float:
    """Median of a non-empty sequence."""
    return statistics.median(values)


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median over rounds of ours / theirs: both numbers of a round saw the same machine, so drift cancels.

    Both sequences hold one time per round, in the order of the rounds. ValueError when the lengths differ.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError("a paired ratio needs the same rounds for both, at least one")
    return median([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range relative to the median; 0 for fewer than four values."""
    if len(values) < 4:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / median(values)


@dataclass(frozen=True)
class Ratio:
    """Time of one contender relative to the fastest comparable peer, and relative to its own calls."""

    name: str
    seconds: float
    to_fastest_peer: float
    overhead: float


def fastest_peer(
    times: Mapping[str, Sequence[float]], comparable: Mapping[str, bool], ours: str = "maodun"
) -> str | None:
    """Name of the comparable peer with the lowest median; None when there is none.

    Names that start with `ours` are not peers. A peer that does less work (no binary search, fewer steps) is marked
    not comparable and never sets the bar.
    """
    peers = {n: median(t) for n, t in times.items() if not n.startswith(ours) and comparable.get(n, True) and t}
    return min(peers, key=peers.__getitem__) if peers else None


def ratios(
    times: Mapping[str, Sequence[float]],
    bare: Mapping[str, Sequence[float]],
    comparable: Mapping[str, bool],
    ours: str = "maodun",
) -> list[Ratio]:
    """One `Ratio` per contender. `bare[name]` is the price of its calls, one per round, from the same rounds.

    Overhead is the median of time / price over rounds; `to_fastest_peer` is NaN when no comparable peer ran.
    """
    best = fastest_peer(times, comparable, ours)
    rows = []
    for name, seconds in times.items():
        against = paired_ratio(seconds, times[best]) if best else float("nan")
        rows.append(Ratio(name, median(seconds), against, paired_ratio(seconds, bare[name])))
    return rows
