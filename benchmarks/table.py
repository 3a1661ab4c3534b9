"""Rows, tables and JSON of the speed comparison. Pure: takes numbers, returns text and dictionaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.rounds import ratios, spread

if TYPE_CHECKING:
    from benchmarks.measure import Outcome

COLUMNS = (
    "attack", "model", "who", "x fastest peer", "robust", "median dist", "fwd/n", "bwd/n", "wgrad", "overhead", "CPU s",
)  # fmt: skip


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """One dictionary per contender of one case on one model, ours first, then peers by time."""
    case, n = outcome.case, len(outcome.batch.y)
    comparable = {label: label not in case.not_comparable for label in outcome.trials}
    timed = {label: t for label, t in outcome.trials.items() if t.seconds}
    times = {label: t.seconds for label, t in timed.items()}
    prices = {label: t.price for label, t in timed.items()}
    by_name = {r.name: r for r in ratios(times, prices, comparable)} if timed else {}
    found = []
    for label, trial in outcome.trials.items():
        ratio = by_name.get(label)
        found.append(
            {
                "attack": case.name, "model": outcome.batch.subject.name, "norm": case.norm,
                "eps": outcome.batch.subject.eps[case.norm], "n": n, "who": label,
                "comparable": comparable[label], "note": case.not_comparable.get(label, ""),
                "repeats": len(trial.seconds), "seconds": ratio.seconds if ratio else None,
                "to_fastest_peer": ratio.to_fastest_peer if ratio else None,
                "overhead": ratio.overhead if ratio else None,
                "spread": spread(trial.seconds) if trial.seconds else None,
                "robust_accuracy": trial.score.robust_accuracy, "success_rate": trial.score.success_rate,
                "median_distance": trial.score.median_distance if case.minimum else None,
                "outside_ball": 0 if case.minimum else trial.score.outside_ball, "outside_box": trial.score.outside_box,
                "forward_per_sample": trial.calls.forward_samples / n,
                "backward_per_sample": trial.calls.backward_samples / n,
                "forward_calls": trial.calls.forward_calls, "backward_calls": trial.calls.backward_calls,
                "weight_gradients": trial.calls.weight_gradients,
            }
        )  # fmt: skip
    found.sort(key=lambda r: (not r["who"].startswith("maodun"), r["seconds"] or math.inf))
    return found


def _number(value: float | None, digits: int = 2) -> str:
    if value is None or math.isnan(value):
        return "-"
    return "inf" if math.isinf(value) else f"{value:.{digits}f}"


def cells(row: dict[str, Any]) -> list[str]:
    """The texts of one row, in the order of COLUMNS."""
    star = "" if row["comparable"] else " *"
    return [
        row["attack"], row["model"], row["who"] + star, _number(row["to_fastest_peer"]),
        f"{row['robust_accuracy']:.3f}", _number(row["median_distance"], 4), _number(row["forward_per_sample"], 1),
        _number(row["backward_per_sample"], 1), "yes" if row["weight_gradients"] else "no", _number(row["overhead"]),
        _number(row["seconds"], 3),
    ]  # fmt: skip


def markdown(all_rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of rows; the star says that a peer did different work and never sets the bar."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in all_rows]
    notes = sorted({f"{r['who']}, {r['attack']}: {r['note']}" for r in all_rows if r["note"]})
    return "\n".join(lines + ([""] + [f"\\* {note}" for note in notes] if notes else [])) + "\n"


def absences(outcomes: Iterable[Outcome]) -> list[str]:
    """One line per contender that did not run, with its reason."""
    return [
        f"{o.case.name} on {o.batch.subject.name}: {who} did not run: {why}"
        for o in outcomes
        for who, why in o.absent.items()
    ]
