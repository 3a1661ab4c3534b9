"""What refusing to answer cost and bought: coverage on clean inputs, acceptance of attacked ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from maodun.arena.metrics import rate
from maodun.arena.summary import Finding, Rejection

_Cell = tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]


def rejection(columns: Mapping[str, NDArray[Any]]) -> Rejection | None:
    """Return a cell's account of refusals from its records; None for a shield that always answers."""
    clean = columns.get("clean_doubt")
    if clean is None or not len(clean) or not np.isfinite(clean.astype(float)).any():
        return None
    from maodun.defenses.detection.metrics import auroc, risk_coverage

    attacked, right = columns["adv_doubt"], columns["clean_correct"]
    accepted, moved = clean <= 0, columns["distance_linf"] > 0
    area = auroc(torch.from_numpy(clean), torch.from_numpy(attacked[moved])) if moved.any() else None
    covered, risk = risk_coverage(torch.from_numpy(clean[accepted]), torch.from_numpy(right[accepted]))
    # Twenty points of the curve say what it has to say; the last is where the shield works.
    places: list[int] = sorted({round(place) for place in np.linspace(0, len(covered) - 1, 20)} if len(covered) else ())
    return Rejection(
        coverage=rate(int(accepted.sum()), len(clean)),
        # Of a stochastic shield an input may be right by the vote and yet doubted on average.
        accuracy=rate(int((right & accepted).sum()), int(accepted.sum())),
        accepted=rate(int((attacked[moved] <= 0).sum()), int(moved.sum())),
        usable=rate(int((right & ~columns["success"]).sum()), len(clean)),
        auroc=area,
        risk=[(float(covered[place]) * float(accepted.mean()), float(risk[place])) for place in places],
    )


def refusals(cells: Sequence[_Cell]) -> Iterator[Finding]:
    """Yield a note per shield that may refuse, so that no robust accuracy is read without its coverage."""
    seen = set()
    for about, columns in cells:
        found = rejection(columns)
        if found is None or about["shield"] in seen:
            continue
        seen.add(about["shield"])
        refused = found.coverage.n - round(found.coverage.value * found.coverage.n)
        yield Finding(
            name="rejection",
            level="note",
            shield=about["shield"],
            spear=None,
            sentence=(
                f"It refuses {refused} of {found.coverage.n} clean inputs and is right on "
                f"{100 * found.accuracy.value:.1f} % of those it answers; clean accuracy counts a refusal as no "
                "answer, robust accuracy counts it as not fooled."
            ),
            action="Quote the robust accuracy beside the share of clean inputs that is refused.",
        )


__all__ = ["refusals", "rejection"]
