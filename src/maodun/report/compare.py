"""Two runs side by side: paired differences of who was left standing, sample by sample."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
from scipy.stats import binomtest

from maodun.arena.store import Store
from maodun.core.errors import StoreError
from maodun.report.words import threat

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from maodun.arena.summary import CellSummary, RunSummary

DRAWS = 10_000
CLEAN = "no attack (clean)"
WORST = "worst case"

_Flags = dict[int, tuple[int, bool, bool]]


@dataclass(frozen=True)
class Pair:
    """One spear against one shield in both runs, over the `n` samples that both judged.

    `first` and `second` are robust accuracies in [0, 1] (clean accuracies for the clean row), `difference` is
    second minus first with its 95 % paired bootstrap interval. `gained` samples stand in the second run only,
    `lost` in the first only. `p_value` is McNemar's exact two-sided test, `p_adjusted` Holm's correction over
    the rows of the comparison. Numbers are None when the row could not be paired; `note` then says why.
    """

    shield: str
    spear: str
    threat: str
    n: int
    first: float | None = None
    second: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    gained: int = 0
    lost: int = 0
    p_value: float | None = None
    p_adjusted: float | None = None
    reference: bool = True
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two runs compared: `pairs` has the rows, `notes` what a reader must know before believing them."""

    first: str
    second: str
    seed: int
    draws: int
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]

    def __rich__(self) -> Any:
        """Return the table that Rich prints."""
        from maodun.report.compare_views import to_table

        return to_table(self)


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided exact p-value that `gained` and `lost` of their sum come from a fair coin (McNemar, 1947).

    Both counts >= 0; 1 when nothing changed.
    """
    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired_interval(gained: int, lost: int, n: int, *, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of (gained - lost) / n over `n` >= 1 paired samples.

    Resampling n pairs with replacement draws the counts of gained, lost and unchanged pairs from a multinomial
    law, which is drawn directly, `draws` times, from a Philox generator keyed by `seed`: the interval does not
    depend on the order of the samples.
    """
    generator = np.random.Generator(np.random.Philox(seed))
    shares = np.array([gained, lost, n - gained - lost], dtype=np.float64) / n
    counts = generator.multinomial(n, shares, size=draws)
    low, high = np.quantile((counts[:, 0] - counts[:, 1]) / n, [0.025, 0.975])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values (1979), in the order given: at most alpha keeps the family's error at alpha."""
    order = np.argsort(p_values, kind="stable")
    adjusted = np.ones(len(p_values))
    running = 0.0
    for rank, place in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return [float(value) for value in adjusted]


def read_flags(run_dir: str | Path, cell: str) -> _Flags:
    """Return {sample id: (label, clean correct, robust)} of a cell from its records; robust means no verdict success.

    Raises StoreError when a part cannot be read. A cell without records gives an empty dictionary.
    """
    store = Store(run_dir)
    flags: _Flags = {}
    pattern = store.path(f"records/{cell}/part-*.parquet")
    for path in sorted(str(found) for found in store.fs.glob(pattern)):
        try:
            with store.fs.open(path, "rb") as file:
                table = pq.read_table(file, columns=["sample_id", "label", "clean_correct", "success"])
        except (OSError, ValueError, KeyError) as error:
            raise StoreError(path, f"cannot be read ({error})", "delete the part and resume the run") from error
        columns = (table.column(name).to_pylist() for name in ("sample_id", "label", "clean_correct", "success"))
        for sample, label, correct, success in zip(*columns, strict=True):
            flags[int(sample)] = (int(label), bool(correct), not success)
    return flags


def compare(
    first: RunSummary,
    first_dir: str | Path,
    second: RunSummary,
    second_dir: str | Path,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Comparison:
    """Compare two runs cell by cell over the samples that both judged.

    Cells match when shield, spear and threat do; two runs with a single shield each are matched even when the
    shields' names differ, which a note says. Rows that exist in one run only, or whose samples or labels do not
    agree, are listed with the reason instead of numbers. Reads only the summaries and the records.
    """
    renamed = _single_shield(first, second)
    left = {_key(cell, ""): cell for cell in first.cells}
    right = {_key(cell, renamed): cell for cell in second.cells}
    names = (_named(first, first_dir), _named(second, second_dir))
    reader = _Reader(first_dir, second_dir)
    pairs: list[Pair] = []
    for key in dict.fromkeys([*left, *right]):
        one, two = left.get(key), right.get(key)
        if one is None or two is None:
            present = one or two
            if present is not None:
                side = "first" if one is not None else "second"
                pairs.append(_unpaired(present, key[0], f"only in the {side} run"))
            continue
        pairs.append(_cell_pair(one, two, key[0], reader, seed=seed, draws=draws))
    pairs = [*_grouped(left, right, reader, seed=seed, draws=draws), *pairs]
    shields = [pair.shield for pair in pairs]
    pairs.sort(key=lambda pair: shields.index(pair.shield))
    notes = _notes(first, second, renamed, pairs)
    return Comparison(names[0], names[1], seed, draws, tuple(_corrected(pairs)), tuple(notes))


_Key = tuple[str, str, str, float | None, bool]


def _key(cell: CellSummary, shield: str) -> _Key:
    return shield or cell.shield, cell.spear, cell.norm, cell.eps, cell.targeted


def _named(run: RunSummary, folder: str | Path) -> str:
    return f"{run.name} ({folder})"


def _single_shield(first: RunSummary, second: RunSummary) -> str:
    """Return the name that the second run's only shield goes by here, empty when names are taken as they are."""
    mine = dict.fromkeys(cell.shield for cell in first.cells)
    other = dict.fromkeys(cell.shield for cell in second.cells)
    return next(iter(mine)) if len(mine) == len(other) == 1 and mine != other else ""


class _Reader:
    """Reads each cell's flags once."""

    def __init__(self, first: str | Path, second: str | Path) -> None:
        self._folders = (first, second)
        self._known: dict[tuple[int, str], _Flags] = {}

    def both(self, one: CellSummary, two: CellSummary) -> tuple[_Flags, _Flags]:
        """Return the flags of a cell of the first run and of its partner in the second."""
        found = []
        for place, cell in enumerate((one, two)):
            if (place, cell.cell) not in self._known:
                self._known[place, cell.cell] = read_flags(self._folders[place], cell.cell)
            found.append(self._known[place, cell.cell])
        return found[0], found[1]


def _unpaired(cell: CellSummary, shield: str, note: str) -> Pair:
    label = threat(cell.norm, cell.eps, targeted=cell.targeted)
    return Pair(shield, cell.spear, label, 0, reference=cell.reference, note=note)


def _cell_pair(one: CellSummary, two: CellSummary, shield: str, reader: _Reader, *, seed: int, draws: int) -> Pair:
    mine, other = reader.both(one, two)
    shared, note, comparable = _shared(mine, other)
    if not comparable:
        return _unpaired(one, shield, note)
    if (one.rule, one.draws) != (two.rule, two.draws):
        note = _join(note, f"verdict rules differ ({one.rule} of {one.draws}, {two.rule} of {two.draws})")
    before = np.array([mine[sample][2] for sample in shared])
    after = np.array([other[sample][2] for sample in shared])
    label = threat(one.norm, one.eps, targeted=one.targeted)
    reference = one.reference and two.reference
    return _measured((shield, one.spear, label), before, after, reference, note, seed=seed, draws=draws)


def _shared(mine: _Flags, other: _Flags) -> tuple[list[int], str, bool]:
    """Return the shared sample ids in order, a note about the rest, and whether the two can be paired at all."""
    shared = sorted(mine.keys() & other.keys())
    if not mine or not other:
        return [], f"no records in the {'first' if not mine else 'second'} run", False
    if not shared:
        return [], "the two runs judged no sample in common", False
    strangers = sum(mine[sample][0] != other[sample][0] for sample in shared)
    if strangers:
        return [], f"{strangers} of {len(shared)} shared ids have different labels: not the same data", False
    only = len(mine) - len(shared), len(other) - len(shared)
    if any(only):
        return shared, f"sample ids differ: {only[0]} only in the first run, {only[1]} only in the second", True
    return shared, "", True


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _measured(
    names: tuple[str, str, str],
    before: np.ndarray[Any, Any],
    after: np.ndarray[Any, Any],
    reference: bool,
    note: str,
    *,
    seed: int,
    draws: int,
) -> Pair:
    n = len(before)
    gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
    low, high = paired_interval(gained, lost, n, draws=draws, seed=seed)
    return Pair(
        *names,
        n=n,
        first=float(before.mean()),
        second=float(after.mean()),
        difference=(gained - lost) / n,
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        p_value=mcnemar(gained, lost),
        reference=reference,
        note=note,
    )


def _grouped(
    left: dict[_Key, CellSummary], right: dict[_Key, CellSummary], reader: _Reader, *, seed: int, draws: int
) -> list[Pair]:
    """Return, per shield, the clean row and per threat the row over all spears that both runs have."""
    keys = [key for key in left if key in right]
    pairs = []
    for shield in dict.fromkeys(key[0] for key in keys):
        own = [key for key in keys if key[0] == shield]
        groups = [(CLEAN, "no change", own)]
        for place in dict.fromkeys(key[2:] for key in own):
            label = threat(place[0], place[1], targeted=place[2])
            groups.append((WORST, label, [key for key in own if key[2:] == place]))
        for spear, label, members in groups:
            flags = [reader.both(left[key], right[key]) for key in members]
            mine, other = _all_spears([each[0] for each in flags]), _all_spears([each[1] for each in flags])
            shared, note, comparable = _shared(mine, other)
            if not comparable or (spear == WORST and len(members) < 2):
                continue
            column = 1 if spear == CLEAN else 2
            before = np.array([mine[sample][column] for sample in shared])
            after = np.array([other[sample][column] for sample in shared])
            # Clean predictions are not searched for: reduced precision leaves them alone.
            reference = spear == CLEAN or all(left[key].reference and right[key].reference for key in members)
            extra = f"over the {len(members)} spears that both runs have" if spear == WORST else ""
            names = (shield, spear, label)
            pairs.append(_measured(names, before, after, reference, _join(extra, note), seed=seed, draws=draws))
    return pairs


def _all_spears(cells: Iterable[_Flags]) -> _Flags:
    """Return flags where a sample is robust when no cell felled it, over the samples that all cells judged."""
    cells = list(cells)
    shared = set(cells[0]).intersection(*cells[1:])
    return {
        sample: (cells[0][sample][0], cells[0][sample][1], all(cell[sample][2] for cell in cells)) for sample in shared
    }


def _corrected(pairs: list[Pair]) -> list[Pair]:
    tested = [place for place, pair in enumerate(pairs) if pair.p_value is not None]
    adjusted = holm([pairs[place].p_value or 0.0 for place in tested])
    corrected = dict(zip(tested, adjusted, strict=True))
    return [replace(pair, p_adjusted=corrected.get(place)) for place, pair in enumerate(pairs)]


def _notes(first: RunSummary, second: RunSummary, renamed: str, pairs: Sequence[Pair]) -> list[str]:
    notes = []
    if renamed:
        other = second.cells[0].shield
        notes.append(f"Each run has one shield: '{renamed}' of the first is compared with '{other}' of the second.")
    data = {key: (first.data.get(key, "absent"), second.data.get(key, "absent")) for key in first.data | second.data}
    notes += [f"The data differ in {key}: {one} and {two}." for key, (one, two) in data.items() if one != two]
    runs = (("first", first), ("second", second))
    notes += [f"The {name} run is not complete." for name, run in runs if not run.complete]
    if any(not pair.reference for pair in pairs):
        notes.append("* searched in reduced precision in one of the runs: not a reference result.")
    if not any(pair.difference is not None for pair in pairs):
        notes.append("Nothing could be paired: the runs share no shield, spear and threat over common samples.")
    return notes


def significant(pair: Pair, alpha: float = 0.05) -> bool:
    """Say whether a row's difference survives Holm's correction at level `alpha` in (0, 1)."""
    return pair.p_adjusted is not None and math.isfinite(pair.p_adjusted) and pair.p_adjusted <= alpha
