"""Suspicions that the records themselves raise once the spears have been: they cost nothing but a look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maodun.arena.laboratory import stronger
from maodun.arena.recipe import format_radius
from maodun.arena.summary import Finding
from maodun.core.verdict import interval

_Cell = tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]


def cross_check(cells: Sequence[_Cell]) -> list[Finding]:
    """Return what is odd within or between cells; `cells` are pairs of a manifest line and its record columns.

    Checked: a one-step attack stronger than an iterative one, a black-box attack stronger than the best white-box
    one, a smaller radius stronger than a larger one, zero gradients, outputs that are not finite, spent budgets, and
    what audits of early endings showed.
    """
    found = [finding for cell in cells for finding in (*_statuses(cell), *_audit(cell))]
    for group in _same_place(cells):
        found += [*_weak_beats_strong(group)]
    return [*found, *_radii(cells)]


def _same_place(cells: Sequence[_Cell]) -> Iterator[list[_Cell]]:
    def place(cell: _Cell) -> tuple[object, ...]:
        about = cell[0]
        return about["shield"], about["norm"], about["eps"], about["targeted"]

    for where in dict.fromkeys(map(place, cells)):
        yield [cell for cell in cells if place(cell) == where]


def _share(cell: _Cell, status: str) -> tuple[int, int]:
    return int((cell[1]["status"] == status).sum()), len(cell[1]["status"])


def _finding(cell: _Cell, name: str, level: str, sentence: str, action: str) -> Finding:
    about = cell[0]
    where = f"{about['norm']} {format_radius(about['eps'])}"
    return Finding(
        name=name,
        level=level,
        shield=about["shield"],
        spear=about["spear"],
        sentence=f"{sentence} ({where}).",
        action=action,
    )


def _statuses(cell: _Cell) -> Iterator[Finding]:
    zero, n = _share(cell, "zero_gradient")
    if zero:
        level = "alarm" if 10 * zero >= n else "warning"
        sentence = f"{zero} of {n} samples stand because every gradient the search saw was exactly zero"
        action = "That is no robustness: use loss dlr or margin, gradient bpda, or a query attack."
        yield _finding(cell, "zero_gradient", level, sentence, action)
    broken, n = _share(cell, "non_finite")
    if broken:
        sentence = f"The model answered {broken} of {n} samples with NaN or infinity during the search"
        yield _finding(cell, "non_finite", "warning", sentence, "Find the layer that overflows, then run again.")
    spent, n = _share(cell, "exhausted_budget")
    if spent:
        sentence = f"{spent} of {n} samples stand because their budget was spent"
        yield _finding(cell, "budget", "note", sentence, "Read the number as robustness against this budget only.")


def _audit(cell: _Cell) -> Iterator[Finding]:
    """Say how often a search that gives samples up early was checked by a full one, and how often it was wrong."""
    audited, wrong = int(cell[1]["audited"].sum()), int(cell[1]["overturned"].sum())
    if not audited:
        return
    given_up = int(np.isin(cell[1]["status"], ("exhausted_steps", "zero_gradient")).sum()) + wrong
    share = interval(wrong, audited)
    sentence = (
        f"Of {given_up} samples given up {audited} were audited by the full AutoAttack, which overturned {wrong} "
        f"({100 * share.value:.1f} %, 95 % interval {100 * share.low:.1f} to {100 * share.high:.1f})"
    )
    action = "Nothing to do." if not wrong else "For a number to publish run autoattack, or sharp with more patience."
    yield _finding(cell, "audit", "note", sentence, action)


def _compare(suspect: _Cell, expected: _Cell) -> tuple[str | None, int, int]:
    """Return the level of suspicion (None: none) and how many fell to one of the two cells only."""
    _, left, right = np.intersect1d(suspect[1]["sample_id"], expected[1]["sample_id"], return_indices=True)
    fell = [torch.from_numpy(cell[1]["success"][rows]) for cell, rows in ((suspect, left), (expected, right))]
    only, other, p = stronger(*fell)
    if p < 0.05:
        return "alarm", only, other
    return ("note" if only >= 2 and only > other else None), only, other


def _weak_beats_strong(group: list[_Cell]) -> Iterator[Finding]:
    white = [cell for cell in group if cell[0]["access"] == "gradient"]
    iterative = [cell for cell in white if cell[0]["steps"] != 1]
    black = [cell for cell in group if cell[0]["access"] != "gradient"]
    pairs = [
        ("one_step", [cell for cell in white if cell[0]["steps"] == 1], iterative, "One step"),
        ("black_box", black, iterative, "An attack without gradients"),
    ]
    for name, suspects, expected, words in pairs:
        if not expected:
            continue
        best = max(expected, key=lambda cell: int(cell[1]["success"].sum()))
        for suspect in suspects:
            level, only, other = _compare(suspect, best)
            if level is not None:
                sentence = f"{words} fells {only} samples that {best[0]['spear']} leaves standing, and misses {other}"
                action = "The gradients mislead the search: adapt it (bpda, eot, another loss) before trusting it."
                yield _finding(suspect, name, level, sentence, action)


def _radii(cells: Sequence[_Cell]) -> Iterator[Finding]:
    for one, two in combinations(cells, 2):
        small, large = sorted((one, two), key=lambda cell: np.inf if cell[0]["eps"] is None else cell[0]["eps"])
        same = all(small[0][key] == large[0][key] for key in ("shield", "spear", "norm", "targeted"))
        if not same or small[0]["eps"] == large[0]["eps"]:
            continue
        level, only, other = _compare(small, large)
        if level is not None:
            wide = format_radius(large[0]["eps"])
            sentence = f"This radius fells {only} samples that {wide} leaves standing, and misses {other}"
            action = "A larger radius must not help the defence: raise the steps, then suspect masked gradients."
            yield _finding(small, "monotone", level, sentence, action)
