"""What certificates amount to: certified accuracy by radius, and whether attacks have contradicted any of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from maodun.arena.metrics import rate
from maodun.arena.store import Store, part_name
from maodun.arena.summary import Rate
from maodun.arena.work import column
from maodun.core.errors import StoreError
from maodun.defenses.smoothing import ABSTAIN, largest_radius

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
_POINTS = 61


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CertifiedRow(_Data):
    """The share of samples whose prediction is right and certified within `radius` (l2, [0, 1] input units)."""

    radius: float
    accuracy: Rate


class Beside(_Data):
    """An arena run's spear against the same data, in l2: `radius` and `robust` accuracy, beside the certificates.

    `contradictions` counts the common samples that were certified beyond the attack's distance and fell all the same.
    """

    shield: str
    spear: str
    radius: list[float]
    robust: list[Rate]
    contradictions: int
    compared: int


class Certified(_Data):
    """The certificates of a folder: where they came from, certified accuracy by radius, what they cost.

    `rows` are round radii, `curve` (radius, accuracy) the whole line up to the largest radius that `draws` can prove.
    `mean_radius` is ACR: the mean over all samples of the radius, 0 where the prediction is wrong or absent. `seconds`
    are per sample, `evaluations` classifier calls per sample, `nfe` further network evaluations in each of them,
    `memory` the peak in MiB. `alpha` bounds the probability that one certificate is wrong.
    """

    created: str
    command: str
    model: str
    data: str
    sigma: float
    draws: int
    guesses: int
    alpha: float
    seed: int
    complete: bool
    samples: int
    rows: list[CertifiedRow]
    curve: list[tuple[float, float]]
    abstained: Rate
    mean_radius: float
    largest: float
    seconds: float
    evaluations: int
    nfe: int
    memory: float
    beside: list[Beside] = []


def is_certificate(folder: Store | str) -> bool:
    """Tell whether a folder holds certificates and not an arena's run."""
    store = Store(folder) if isinstance(folder, str) else folder
    return store.exists("manifest.json") and "certificate" in store.manifest()


def certificates(store: Store | str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Return the manifest and the columns of the certificates that are there; StoreError when there are none."""
    store = Store(store) if isinstance(store, str) else store
    manifest = store.manifest()
    if "certificate" not in manifest:
        raise StoreError(store.location, "holds no certificates", "make them with maodun certify")
    shards = -(-manifest["data"]["samples"] // manifest["certificate"]["shard_size"])
    names = [f"certificates/{part_name(number)}.parquet" for number in range(shards)]
    there = [name for name in names if store.exists(name)]
    if not there:
        raise StoreError(store.location, "holds no finished certificate yet", "the same command line goes on with it")
    table = store.read_table(there)
    return manifest, {name: column(table, name) for name in table.column_names}


def summarise_certificates(store: Store | str, beside: list[Beside] | None = None) -> Certified:
    """Return what the certificates of a folder amount to so far, with attacks to show `beside` them."""
    manifest, columns = certificates(store)
    plan, n = manifest["certificate"], len(columns["label"])
    largest = largest_radius(plan["draws"], plan["sigma"], plan["alpha"])
    reach = np.linspace(0.0, largest, _POINTS)
    certain = certain_radius(columns)
    radii = [each for each in RADII if each <= largest]
    return Certified(
        created=manifest["created"],
        command=manifest["command"],
        model=manifest["name"],
        data=manifest["data"]["spec"],
        sigma=plan["sigma"],
        draws=plan["draws"],
        guesses=plan["guesses"],
        alpha=plan["alpha"],
        seed=plan["seed"],
        complete=n == manifest["data"]["samples"],
        samples=n,
        rows=[CertifiedRow(radius=each, accuracy=rate(int(_within(certain, each).sum()), n)) for each in radii],
        curve=[(float(each), float(_within(certain, each).mean())) for each in reach],
        abstained=rate(int((columns["prediction"] == ABSTAIN).sum()), n),
        mean_radius=float(np.maximum(certain, 0.0).mean()),
        largest=largest,
        seconds=float(columns["seconds"].mean()),
        evaluations=plan["draws"] + plan["guesses"],
        nfe=manifest["nfe"],
        memory=float(columns["memory"].max()),
        beside=beside or [],
    )


def certain_radius(columns: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Return each sample's certified radius where its prediction is right, -1 where it is wrong or absent (N,)."""
    right = columns["prediction"] == columns["label"]
    return np.where(right, columns["radius"], -1.0)


def _within(certain: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    return np.asarray(certain >= radius)


def attacks_beside(store: Store | str, run: Store | str) -> list[Beside]:
    """Return the untargeted l2 spears of an arena run on the same data, to be shown beside a folder's certificates.

    A sample contradicts its certificate when it was certified as its label within a radius larger than the distance of
    an adversarial input that fooled the run's shield. Whether that shield is the certified classifier the two folders
    cannot tell: the caller knows. StoreError when the run is of other data.
    """
    from maodun.arena.account import cell_records

    manifest, columns = certificates(store)
    run = Store(run) if isinstance(run, str) else run
    other = run.manifest()
    if other["data"]["spec"] != manifest["data"]["spec"]:
        reason = f"is of data '{other['data']['spec']}', the certificates of '{manifest['data']['spec']}'"
        raise StoreError(run.location, reason, "give a run on the same data")
    mine, theirs = manifest["certificate"]["data"]["split"], other["recipe"]["data"]["split"]
    if mine != theirs:
        reason = f"is of the {theirs} split, the certificates of the {mine} split"
        raise StoreError(run.location, reason, "give a run on the same data")
    certain = dict(zip(columns["sample_id"].tolist(), certain_radius(columns).tolist(), strict=True))
    lines: dict[tuple[str, str], list[tuple[float, Rate, int, int]]] = {}
    for records in cell_records(run):
        about, own = records.about, records.columns
        if about["norm"] != "l2" or about["eps"] is None or about["targeted"]:
            continue
        rows = np.array([each in certain for each in own["sample_id"].tolist()])
        success, distance = own["success"][rows], own["distance"][rows]
        promised = np.array([certain[each] for each in own["sample_id"][rows].tolist()])
        # A clean mistake is a success at distance 0, and contradicts any certificate of the right class.
        broken = int((success & (promised > distance)).sum())
        entry = (float(about["eps"]), rate(int((~success).sum()), len(success)), broken, len(success))
        lines.setdefault((about["shield"], about["spear"]), []).append(entry)
    found = []
    for (shield, spear), line in lines.items():
        line.sort(key=lambda each: each[0])
        found.append(
            Beside(
                shield=shield,
                spear=spear,
                radius=[eps for eps, _, _, _ in line],
                robust=[robust for _, robust, _, _ in line],
                contradictions=sum(broken for _, _, broken, _ in line),
                compared=sum(n for _, _, _, n in line),
            )
        )
    return found
