"""A detector fitted once to a user's own model and kept as a file, for every evaluation after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from maodun.arena.detectors import fit_detectors
from maodun.arena.metrics import rate
from maodun.arena.recipe import make_recipe
from maodun.arena.shields import shield_model
from maodun.arena.summary import Rate
from maodun.arena.workplace import usable_folder
from maodun.core import context
from maodun.core.errors import InputError, nearest
from maodun.core.sizing import metered
from maodun.core.streams import Stream


@dataclass(frozen=True)
class FittedDetector:
    """A kept detector: its file and the file's SHA-256, its threshold, and the digest of the model it belongs to.

    `refused` is the share that it refuses of the clean test samples which were left for judging.
    """

    file: Path
    sha256: str
    name: str
    threshold: float
    model: str
    refused: Rate


def fit_detector_file(
    model: str,
    data: str,
    out: str | Path,
    *,
    detector: str = "mahalanobis",
    options: dict[str, Any] | None = None,
    norm: str = "linf",
    eps: float | str | None = None,
    weights: str | None = None,
    model_options: dict[str, Any] | None = None,
    limit: int = 1000,
    seed: int = 0,
    device: str = "cpu",
) -> FittedDetector:
    """Fit `detector` to a model on the train split of `data`, set its threshold, and write both to the file `out`.

    `limit` samples of the test split are left alone, for whoever judges the two later (`evaluate --limit`), and say
    what share of clean inputs is really refused. `norm` and `eps` are the ball of the attacks that trained_detector
    learns from. The file fits these weights and options alone. InputError for a name that is no detector, for one that
    learns from attacks without `eps`, for a service, for data without clean samples, and for a file that cannot be.
    """
    from maodun.defenses.detection import DETECTORS, RejectingClassifier, save_detector
    from maodun.zoo import load_data
    from maodun.zoo.cards import file_sha256

    kinds = {each.name: each for each in DETECTORS}
    if detector not in kinds:
        raise InputError(f"detector '{detector}'", "is none", nearest(detector, list(kinds)))
    options = options or {}
    if "file" in options:
        raise InputError("option 'file'", "loads a detector that is fitted already", "leave it out, and name --out")
    if kinds[detector].needs_adversary and eps is None:
        raise InputError(f"detector '{detector}'", "learns from attacks in a ball", "give eps, as 8/255")
    if Path(out).suffix != ".safetensors":
        raise InputError(f"file '{out}'", "is not called as what it will be", "give a name that ends in .safetensors")
    shield = {"model": model, "weights": weights, "model_options": model_options or {}, "defense": detector}
    recipe = make_recipe(
        {
            "seed": seed,
            "data": {"spec": data, "split": "test", "limit": limit},
            "threats": [{"norm": norm, "eps": eps}],
            "shields": [{**shield, "options": options}],
            "spears": [{"attack": "pgd"}],
        },
        source="arguments",
    )
    place = torch.device(device)
    judged = load_data(data, split="test", limit=limit)
    guarded, _ = shield_model(recipe.shields[0], place)
    if metered(guarded):
        raise InputError(f"model '{model}'", "is a service, which thousands of samples would be sent to", "fit a copy")
    if not isinstance(guarded, RejectingClassifier):
        raise InputError(f"detector '{detector}'", "does not stand in front of a classifier", "take another")
    usable_folder(Path(out).expanduser().parent)
    fit_detectors(guarded, recipe, judged, place)
    file = save_detector(guarded, out)
    refused = 0
    for start in range(0, len(judged), 256):
        x, ids = judged.x[start : start + 256].to(place), judged.ids[start : start + 256].to(place)
        with torch.no_grad(), context.draw(Stream(seed, "detector/judged"), ids, torch.zeros_like(ids)):
            refused += int((~guarded.answer(x).accepted).sum())
    own = guarded.detector
    return FittedDetector(
        file, file_sha256(file), detector, float(own.threshold), own.fitted_to, rate(refused, len(judged))
    )


__all__ = ["FittedDetector", "fit_detector_file"]
