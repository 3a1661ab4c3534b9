"""A made-up but realistic run for the tests of the report room, with its store on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.stats import binomtest

from maodun.arena.calibrated import Calibration
from maodun.arena.summary import (
    CellSummary,
    Curve,
    Finding,
    Picture,
    Rate,
    Reliability,
    RunSummary,
    WorstCase,
)

N = 1000
NASTY = "<script>alert('x')</script>"
SHIELDS = {
    "none": (0.985, 1.0),
    "adversarial training": (0.947, 0.16),
    "bit depth 3": (0.982, 0.85),
    "random resize and pad": (0.943, 0.6),
    "distilled T=100": (0.979, 0.9),
}
SPEARS = {
    "fgsm": (0.45, 1, 1),
    "pgd": (0.86, 40, 40),
    "pgd (bpda, eot 8)": (0.93, 320, 320),
    "deepfool": (0.95, 18, 55),
    "square": (0.80, 2210, 0),
    "autoattack": (1.0, 655, 610),
}


def rate(hits: int, n: int = N) -> Rate:
    """A Wilson interval, as the arena gives one."""
    found = binomtest(hits, n).proportion_ci(method="wilson")
    return Rate(value=hits / n, low=found.low, high=found.high, n=n)


def cell(shield: str, spear: str, **changes: Any) -> CellSummary:
    clean, softness = SHIELDS.get(shield, (0.95, 0.5))
    power, forwards, backwards = SPEARS.get(spear, (0.7, 10, 10))
    hits = round(N * clean * (1 - power * softness))
    masked = shield.startswith("distilled") and spear in {"fgsm", "pgd"}
    hits = round(N * 0.93) if masked else hits
    right = round(N * clean)
    content: dict[str, Any] = {
        "cell": f"{shield}--{spear}--linf".replace(" ", "_"),
        "shield": shield,
        "spear": spear,
        "norm": "linf",
        "eps": 0.15,
        "targeted": False,
        "rule": "majority" if shield.startswith("random") else "single",
        "draws": 10 if shield.startswith("random") else 1,
        "clean": rate(right),
        "robust": rate(hits),
        "asr_all": rate(N - hits),
        "asr_correct": rate(right - hits, right),
        "median_distance": 0.0831 if spear == "deepfool" else 0.15,
        "rho": 0.184 if hits < right else None,
        "forwards": float(forwards),
        "backwards": float(backwards),
        "queries": 2210.4 if spear == "square" else 0.0,
        "seconds": forwards * 0.061 + 0.2,
        "statuses": {"found": right - hits, "exhausted_steps": hits, "skipped_misclassified": N - right},
        "calibration_clean": Calibration(ece=0.021, brier=0.034, nll=0.071, n=N),
        "calibration_adversarial": Calibration(ece=0.61, brier=1.21, nll=4.4, n=N),
        "reference": True,
        "command": f"maodun evaluate --model zoo:digits-cnn --data digits --norm linf --eps 0.15 --attack '{spear}'",
    }
    return CellSummary(**{**content, **changes})


def _reliability(shield: str, spear: str, kind: str, gap: float) -> Reliability:
    confidence = [(2 * place + 1) / 30 for place in range(15)]
    accuracy = [max(0.0, value - gap * (value - 0.1)) for value in confidence]
    counts = [0, 0, 0, 2, 5, 9, 14, 20, 31, 44, 60, 85, 110, 190, 430]
    threat = {"norm": "linf", "eps": 0.15} if kind != "clean" else {}
    bins = {"confidence": confidence, "accuracy": accuracy, "count": counts}
    return Reliability(shield=shield, spear=spear, kind=kind, **bins, **threat)


def _findings() -> list[Finding]:
    def make(name: str, level: str, shield: str, spear: str | None, sentence: str, action: str = "") -> Finding:
        return Finding(name=name, level=level, shield=shield, spear=spear, sentence=sentence, action=action)

    return [
        make("eps_zero", "ok", "none", None, "At eps = 0 nothing falls: clean accuracy comes back."),
        make("eps_infinite", "ok", "none", "pgd", "With any change allowed, robust accuracy is 0 %."),
        make("monotone", "ok", "adversarial training", "pgd", "Success never falls as the radius grows."),
        make(
            "draws_agree",
            "note",
            "random resize and pad",
            "pgd",
            "38 of 1000 verdicts change between draws.",
            "Raise the number of draws to 20 to halve that.",
        ),
        make(
            "ce_dlr_gap",
            "alarm",
            "distilled T=100",
            "pgd",
            "The cross-entropy search leaves 93.0 % standing where a margin search leaves 9.8 %: gradients are masked.",
            "Trust only the margin attacks (autoattack, deepfool) for this shield.",
        ),
        make(
            "black_box_stronger",
            "warning",
            "bit depth 3",
            "pgd",
            "Square, which sees scores only, fells 41 samples that PGD does not.",
            "Run PGD with gradient: bpda.",
        ),
    ]


def summary(**changes: Any) -> RunSummary:
    """Five shields, six spears, one radius; bf16 in one cell, one alarm, curves, reliability, no pictures."""
    cells = [cell(shield, spear) for shield in SHIELDS for spear in SPEARS]
    cells[-1] = cells[-1].model_copy(update={"reference": False})
    worst, curves, reliability = [], [], []
    for shield, (clean, softness) in SHIELDS.items():
        own = [each for each in cells if each.shield == shield]
        least = min(own, key=lambda each: each.robust.value)
        hits = max(0, round(least.robust.value * N) - 4)
        threat = {"norm": "linf", "eps": 0.15}
        worst.append(WorstCase(shield=shield, **threat, clean=own[0].clean, robust=rate(hits), strongest=least.spear))
        radii = np.linspace(0, 0.5, 41)
        for spear, (power, _, _) in SPEARS.items():
            fall = clean / (1 + np.exp((radii - 0.32 + 0.2 * power * softness) / 0.03))
            curves.append(Curve(shield=shield, spear=spear, norm="linf", eps=radii.tolist(), robust=fall.tolist()))
            reliability.append(_reliability(shield, spear, "adversarial", 0.9 * power))
        reliability.append(_reliability(shield, least.spear, "clean", 0.07))
    content: dict[str, Any] = {
        "name": "digits",
        "created": "2026-01-02 03:04 UTC",
        "command": "maodun arena recipes/digits.yaml --out runs/digits",
        "seed": 0,
        "versions": {"maodun": "0.1.0", "torch": "2.13.0", "numpy": "2.3.1", "python": "3.11.9"},
        "data": {"spec": "digits", "split": "test", "n": str(N), "sha256": "7c2f" * 16},
        "shields": {
            shield: {"model": "zoo:digits-cnn", "defense": shield, "weights sha256": "a1b2" * 16} for shield in SHIELDS
        },
        "classes": [str(digit) for digit in range(10)],
        "complete": True,
        "cells": cells,
        "worst": worst,
        "curves": curves,
        "reliability": reliability,
        "findings": _findings(),
        "pictures": [],
    }
    return RunSummary(**{**content, **changes})


def store_pictures(run: RunSummary, folder: Path, images: np.ndarray, per_shield: int = 4) -> RunSummary:
    """Write `images` (N x C x H x W) as adversarial parts of each shield's last cell; return the run with pictures."""
    rng = np.random.default_rng(0)
    pictures = []
    for shield in dict.fromkeys(each.shield for each in run.cells):
        last = [each for each in run.cells if each.shield == shield][-1]
        place = folder / "adversarials" / last.cell
        place.mkdir(parents=True, exist_ok=True)
        changed = np.clip(images + 0.15 * np.sign(rng.standard_normal(images.shape)), 0, 1)
        arrays = {"x": images.astype("f4"), "x_adv": changed.astype("f4"), "ids": np.arange(len(images))}
        np.savez(place / "part-00000.npz", **arrays)
        names = {"cell": last.cell, "shield": shield, "spear": last.spear, "part": "part-00000.npz", "distance": 0.15}
        pictures += [
            Picture(**names, row=row, sample_id=row, label=row % 10, clean_pred=row % 10, adv_pred=(row + 3) % 10)
            for row in range(min(per_shield, len(images)))
        ]
    return run.model_copy(update={"pictures": pictures})


def store_records(
    folder: Path, cell_name: str, ids: list[int], fallen: list[bool], labels: list[int] | None = None
) -> None:
    """Write one cell's records in two parts, with the columns that a comparison reads."""
    place = folder / "records" / cell_name
    place.mkdir(parents=True, exist_ok=True)
    labels = labels if labels is not None else [each % 10 for each in ids]
    middle = len(ids) // 2
    for number, rows in enumerate((slice(None, middle), slice(middle, None))):
        table = pa.table(
            {
                "sample_id": pa.array(ids[rows], pa.int64()),
                "label": pa.array(labels[rows], pa.int64()),
                "clean_correct": pa.array([True] * len(ids[rows]), pa.bool_()),
                "success": pa.array(fallen[rows], pa.bool_()),
            }
        )
        pq.write_table(table, place / f"part-{number:05d}.parquet")
