"""Adversarial inputs as files for people: lossless PNG pictures, or NPZ arrays that keep every bit."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from maodun.arena.store import part_name
from maodun.arena.work import column
from maodun.core.errors import InputError
from maodun.core.verdict import judge

if TYPE_CHECKING:
    import numpy.typing as npt

    from maodun.arena.plan import Cell
    from maodun.arena.setup import Arena

    Array = npt.NDArray[Any]

# Rounding of float32 differences, in 8-bit levels: 8/255 may come out as 7.9999 levels.
_DUST = 1e-4


@dataclass(frozen=True)
class Fallen:
    """The samples of a cell that fell: clean and adversarial inputs (N x ...), ids, labels, targets, predictions."""

    x: Array
    x_adv: Array
    ids: Array
    labels: Array
    targets: Array
    clean: Array
    predicted: Array

    def __len__(self) -> int:
        return len(self.ids)


def fallen(arena: Arena, cell: Cell) -> Fallen:
    """Return the samples whose input was changed so that the verdict was a success, read from the store."""
    parts = []
    for shard in arena.plan.shards:
        name = part_name(shard.number)
        arrays = arena.store.read_arrays(f"adversarials/{cell.name}/{name}.npz")
        table = arena.store.read_table([f"records/{cell.name}/{name}.parquet"])
        fell = column(table, "fell").astype(bool)
        columns = ("sample_id", "label", "target", "clean_pred", "adv_pred")
        rows = [arrays["x"], arrays["x_adv"], *(column(table, key) for key in columns)]
        parts.append([values[fell] for values in rows])
    return Fallen(*(np.concatenate(values) for values in zip(*parts, strict=True)))


def to_levels(x_adv: Array, x: Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return adversarial and clean inputs (N x ..., in [0, 1]) in 256 levels.

    The clean input is rounded to the nearest level, and the change is cut to whole levels, so that no entry of the
    saved change is larger than that of the real one: the picture stays inside any ball around the clean picture.
    """
    clean = np.rint(x.astype(np.float64) * 255.0)
    change = (x_adv.astype(np.float64) - x) * 255.0
    whole = np.trunc(change + np.sign(change) * _DUST)
    return (clean + whole).clip(0, 255).astype(np.uint8), clean.astype(np.uint8)


def to_png(levels: npt.NDArray[np.uint8]) -> bytes:
    """Return one picture (1 x H x W grey or 3 x H x W colour, uint8) as PNG bytes."""
    from PIL import Image

    if levels.ndim != 3 or levels.shape[0] not in (1, 3):
        shape = " x ".join(str(size) for size in levels.shape)
        raise InputError("--save png", f"an input of shape {shape} is not a picture", "use --save npz")
    pixels = levels[0] if levels.shape[0] == 1 else np.moveaxis(levels, 0, -1)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG")
    return buffer.getvalue()


def save(arena: Arena, kind: str) -> Iterator[str]:
    """Write the fallen samples of every cell under saved/ in the run's folder; yields a sentence per cell.

    `kind` is png (8 bit, judged anew as saved) or npz (float32, as found). Raises InputError for inputs that are no
    pictures, StoreError when the folder cannot be written.
    """
    for cell in arena.plan.cells:
        found = fallen(arena, cell)
        yield _save_png(arena, cell, found) if kind == "png" else _save_npz(arena, cell, found)


def _save_npz(arena: Arena, cell: Cell, found: Fallen) -> str:
    name = f"saved/{cell.name}.npz"
    arena.store.write_arrays(
        name,
        x=found.x,
        x_adv=found.x_adv,
        ids=found.ids,
        labels=found.labels,
        clean_predictions=found.clean,
        predictions=found.predicted,
    )
    return f"{cell.spear}: {len(found)} adversarial inputs in {arena.store.path(name)}"


def _save_png(arena: Arena, cell: Cell, found: Fallen) -> str:
    levels, clean = to_levels(found.x_adv, found.x)
    fools, predicted = _judged(arena, cell, found, levels, clean)
    folder = f"saved/{cell.name}"
    lines = io.StringIO()
    table = csv.writer(lines, lineterminator="\n")
    table.writerow(("adversarial", "clean", "sample_id", "label", "clean_prediction", "prediction", "fools"))
    for row in range(len(found)):
        stem = f"{int(found.ids[row]):06d}-{int(found.labels[row])}"
        names = f"{stem}-as-{int(predicted[row])}.png", f"{stem}-clean.png"
        for name, picture in zip(names, (levels[row], clean[row]), strict=True):
            arena.store.write(f"{folder}/{name}", to_png(picture))
        about = (found.ids[row], found.labels[row], found.clean[row], predicted[row], int(fools[row]))
        table.writerow((*names, *(int(value) for value in about)))
    arena.store.write(f"{folder}/pictures.csv", lines.getvalue().encode())
    kept = f"{int(fools.sum())} of {len(found)} still fool the model as 8-bit pictures"
    return f"{cell.spear}: {kept}, in {arena.store.path(folder)}"


def _judged(arena: Arena, cell: Cell, found: Fallen, levels: Array, clean: Array) -> tuple[Array, Array]:
    """Return whether each picture fools the model as it is saved, and the class the model sees in it."""
    if not len(found):
        return np.zeros(0, bool), np.zeros(0, np.int64)
    shield = arena.shields[cell.shield]
    x_adv, x = (torch.from_numpy(part).to(arena.device).float() / 255.0 for part in (levels, clean))
    threat = cell.core_threat
    verdict = judge(
        arena.oracle(shield),
        x_adv,
        x,
        torch.from_numpy(found.labels).to(arena.device),
        threat if cell.attack.kind == "fixed" else threat.with_eps(float("inf")),
        targets=torch.from_numpy(found.targets).to(arena.device) if threat.targeted else None,
        rule=arena.rule(shield),
        seed=arena.recipe.seed,
        ids=torch.from_numpy(found.ids),
    )
    return verdict.success.cpu().numpy(), verdict.predictions.cpu().numpy()
