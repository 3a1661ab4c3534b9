"""From the store to the summary: read the parts that are there, and add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from maodun.arena import metrics
from maodun.arena.calibrated import Calibration, profile, tempered_probs
from maodun.arena.calibration import equal_width
from maodun.arena.crosscheck import cross_check
from maodun.arena.diagnostics import diagnosis_name, findings_name
from maodun.arena.ladder import ladders, weak_rungs
from maodun.arena.plan import clean_folder
from maodun.arena.refusals import refusals, rejection
from maodun.arena.store import Store, part_name
from maodun.arena.summary import (
    CellSummary,
    Curve,
    Diagnosis,
    Finding,
    Picture,
    Reliability,
    RunSummary,
    WorstCase,
)
from maodun.arena.work import column

_PICTURES = 6


class Records:
    """The columns of a cell's finished shards as numpy arrays, with the cell's line of the manifest.

    `shards` are their numbers and `ends` the row after the last of each.
    """

    def __init__(self, about: dict[str, Any], shards: list[int], tables: list[pa.Table]) -> None:
        self.about, self.shards = about, shards
        self.ends = np.cumsum([table.num_rows for table in tables])
        table = pa.concat_tables(tables)
        self.columns: dict[str, NDArray[Any]] = {name: column(table, name) for name in table.column_names}

    def in_order(self, *names: str) -> list[NDArray[Any]]:
        """Return columns sorted by sample id, so that what halves or resamples them does not depend on the order."""
        order = np.argsort(self.columns["sample_id"], kind="stable")
        return [self.columns[name][order] for name in names]

    @property
    def place(self) -> tuple[str, str, float | None, bool]:
        """Shield and threat: what cells must share to be compared sample by sample."""
        return self.about["shield"], self.about["norm"], self.about["eps"], self.about["targeted"]


def account(store: Store | str) -> RunSummary:
    """Return the summary of all finished parts of a store or of the run's folder with that path."""
    store = Store(store) if isinstance(store, str) else store
    manifest = store.manifest()
    shards = -(-manifest["data"]["samples"] // manifest["recipe"]["shard_size"])
    cells = cell_records(store)
    findings, diagnosed = _findings(store, manifest)
    complete = diagnosed and len(cells) == len(manifest["cells"])
    complete = complete and all(len(records.shards) == shards for records in cells)
    worst = list(_worst(cells))
    clean = _CleanProfiles()
    rungs = list(ladders(cells, manifest["shields"], _clean(store, manifest, shards)))
    data = manifest["data"]
    return RunSummary(
        name=manifest["name"],
        created=manifest["created"],
        command=manifest["command"],
        seed=manifest["seed"],
        versions=manifest["versions"],
        data={key: str(value) for key, value in data.items()} | {"split": manifest["recipe"]["data"]["split"]},
        shields=manifest["shields"],
        classes=manifest["classes"],
        complete=complete,
        cells=[_cell(records, clean(records)) for records in cells],
        worst=worst,
        curves=[*_curves_by_distance(cells), *_curves_by_radius(cells)],
        reliability=list(_reliability(cells)),
        findings=[
            *findings,
            *cross_check([(each.about, each.columns) for each in cells]),
            *refusals([(each.about, each.columns) for each in cells]),
            *weak_rungs(rungs),
        ],
        pictures=[picture for records in cells for picture in _pictures(store, records)],
        ladders=rungs,
        diagnoses=_diagnoses(store, manifest),
    )


def cell_records(store: Store) -> list[Records]:
    """Return the records of every cell of a run that has a finished shard, in the manifest's order."""
    manifest = store.manifest()
    shards = -(-manifest["data"]["samples"] // manifest["recipe"]["shard_size"])
    return [records for about in manifest["cells"] if (records := _records(store, about, shards)) is not None]


def _records(store: Store, about: dict[str, Any], shards: int) -> Records | None:
    names = {number: f"records/{about['name']}/{part_name(number)}.parquet" for number in range(shards)}
    there = [number for number, name in names.items() if store.exists(name)]
    if not there:
        return None
    return Records(about, there, [store.read_table([names[number]]) for number in there])


def _clean(store: Store, manifest: dict[str, Any], shards: int) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the finished clean passes of the stochastic shields, by column."""
    found = {}
    for shield, about in manifest["shields"].items():
        names = [f"{clean_folder(shield)}/{part_name(number)}.parquet" for number in range(shards)]
        there = [name for name in names if store.exists(name)]
        if there and about.get("stochastic") == "yes":
            table = store.read_table(there)
            found[shield] = {name: column(table, name) for name in ("label", "pred", "draw_preds")}
    return found


def _findings(store: Store, manifest: dict[str, Any]) -> tuple[list[Finding], bool]:
    """Return the stored findings of all shields and whether none is missing that was asked for."""
    found, missing = [], False
    for shield in manifest["shields"]:
        name = findings_name(shield)
        if store.exists(name):
            found += [Finding(**each) for each in json.loads(store.read(name))]
        else:
            missing = True
    return found, not (missing and manifest["diagnostics"])


class _CleanProfiles:
    """The calibration on clean inputs, looked at once per shield and not once per cell."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[int, ...]], Calibration | None] = {}

    def __call__(self, records: Records) -> Calibration | None:
        key = (records.about["shield"], tuple(records.shards))
        if key not in self._known:
            self._known[key] = profile(*records.in_order("clean_probs", "label"))
        return self._known[key]


def _diagnoses(store: Store, manifest: dict[str, Any]) -> list[Diagnosis]:
    """Return the stored diagnoses of all shields; runs of before there were any have none."""
    names = [diagnosis_name(shield) for shield in manifest["shields"]]
    return [Diagnosis(**each) for name in names if store.exists(name) for each in json.loads(store.read(name))]


def _cell(records: Records, clean: Calibration | None) -> CellSummary:
    about, columns = records.about, records.columns
    minimum = about["kind"] == "minimum"
    # A least-distance search is measured by all it found, wherever that lies; a search in a ball by what fell there.
    reach = {**columns, "success": columns["fell"]} if minimum else columns
    names, counts = np.unique(columns["status"], return_counts=True)
    return CellSummary(
        cell=about["name"],
        shield=about["shield"],
        spear=about["spear"],
        norm=about["norm"],
        eps=about["eps"],
        targeted=about["targeted"],
        rule=about["rule"],
        draws=int(columns["draws"].max()),
        clean=metrics.clean_accuracy(columns),
        robust=metrics.robust_accuracy(columns),
        asr_all=metrics.success_of_all(columns),
        asr_correct=metrics.success_of_correct(columns),
        median_distance=metrics.median_distance(reach),
        rho=metrics.rho(reach),
        forwards=float(columns["forwards"].mean()),
        backwards=float(columns["backwards"].mean()),
        queries=float(columns["queries"].mean()),
        seconds=float(columns["seconds"].sum()),
        statuses={str(name): int(count) for name, count in zip(names, counts, strict=True)},
        calibration_clean=clean,
        calibration_adversarial=profile(*records.in_order("adv_probs", "label", "clean_probs")),
        reference=about["reference"],
        command=about["command"],
        surrogates=about.get("surrogates", []),
        hooks=about.get("hooks", ""),
        white_box=about.get("white_box", False),
        rejection=rejection(columns),
    )


def _groups(cells: list[Records]) -> Iterator[list[Records]]:
    for place in dict.fromkeys(records.place for records in cells):
        yield [records for records in cells if records.place == place]


def _worst(cells: list[Records]) -> Iterator[WorstCase]:
    for group in _groups(cells):
        clean, robust, strongest = metrics.worst_case([records.columns for records in group])
        shield, norm, eps, targeted = group[0].place
        yield WorstCase(
            shield=shield,
            norm=norm,
            eps=eps,
            clean=clean,
            robust=robust,
            strongest=group[strongest].about["spear"],
            targeted=targeted,
        )


def _curves_by_distance(cells: list[Records]) -> Iterator[Curve]:
    seen = set()
    for records in cells:
        about = records.about
        key = (about["shield"], about["spear"], about["norm"], about["targeted"])
        if about["kind"] != "minimum" or key in seen:
            continue
        seen.add(key)
        eps, robust = metrics.security_curve({**records.columns, "success": records.columns["fell"]})
        yield Curve(shield=about["shield"], spear=about["spear"], norm=about["norm"], eps=eps, robust=robust)


def _curves_by_radius(cells: list[Records]) -> Iterator[Curve]:
    """Yield the robust accuracy of every spear that searched inside several radii, starting from the clean one."""
    lines: dict[tuple[str, str, str], dict[float, float]] = {}
    for records in cells:
        about = records.about
        if about["kind"] != "fixed" or about["eps"] is None or about["targeted"]:
            continue
        key = (about["shield"], about["spear"], about["norm"])
        line = lines.setdefault(key, {0.0: metrics.clean_accuracy(records.columns).value})
        line[about["eps"]] = metrics.robust_accuracy(records.columns).value
    for (shield, spear, norm), line in lines.items():
        radii = sorted(line)
        yield Curve(shield=shield, spear=spear, norm=norm, eps=radii, robust=[line[eps] for eps in radii])


def _reliability(cells: list[Records]) -> Iterator[Reliability]:
    """Yield one diagram per shield for the clean inputs and one per cell for the attacked ones."""
    seen = set()
    for records in cells:
        shield, spear = records.about["shield"], records.about["spear"]
        if shield not in seen:
            seen.add(shield)
            yield from _diagram(records, "clean", shield, "")
        yield from _diagram(records, "adversarial", shield, spear)


def _diagram(records: Records, kind: str, shield: str, spear: str) -> Iterator[Reliability]:
    """Yield the diagram of a cell's clean or attacked inputs, and that after the temperature that suits clean ones."""
    probs, labels, clean = records.in_order("clean_probs" if kind == "clean" else "adv_probs", "label", "clean_probs")
    if not np.isfinite(probs).all():
        return
    after = tempered_probs(probs, labels, clean)
    for temperature, shown in [(None, probs), *([after] if after is not None else [])]:
        bins = equal_width(torch.from_numpy(shown), torch.from_numpy(labels))
        yield Reliability(
            shield=shield,
            spear=spear,
            kind=kind,
            confidence=bins.confidence.tolist(),
            accuracy=bins.accuracy.tolist(),
            count=[int(count) for count in bins.count],
            temperature=temperature,
            norm="" if kind == "clean" else records.about["norm"],
            eps=None if kind == "clean" else records.about["eps"],
            targeted=kind != "clean" and records.about["targeted"],
        )


def _pictures(store: Store, records: Records) -> Iterator[Picture]:
    """Yield the first fallen samples of a cell whose adversarial inputs are in the store."""
    about, columns = records.about, records.columns
    for place in np.flatnonzero(metrics.fallen(columns))[:_PICTURES]:
        # The rows of the finished shards stand one after the other, in the shards' order.
        shard = int(np.searchsorted(records.ends, place, side="right"))
        part = f"adversarials/{about['name']}/{part_name(records.shards[shard])}.npz"
        if not store.exists(part):
            return
        yield Picture(
            cell=about["name"],
            shield=about["shield"],
            spear=about["spear"],
            part=part,
            row=int(place - (records.ends[shard - 1] if shard else 0)),
            sample_id=int(columns["sample_id"][place]),
            label=int(columns["label"][place]),
            clean_pred=int(columns["clean_pred"][place]),
            adv_pred=int(columns["adv_pred"][place]),
            distance=float(columns["distance"][place]),
        )
