"""Adversarial examples as small pictures: clean, adversarial and their magnified difference, as embedded PNGs."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from maodun.arena.store import Store
from maodun.core.errors import MaodunError
from maodun.report.words import threat_sign

if TYPE_CHECKING:
    from maodun.arena.summary import Picture, RunSummary

_BUDGET = 6 * 2**20
_MOST = 60

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Shown:
    """A picture ready for the page: three data URIs and the words beside them.

    `gain` is the magnification of the difference, `turn` the picture's number among those of its cell.
    """

    shield: str
    spear: str
    clean: str
    adversarial: str
    difference: str
    gain: float
    label: str
    clean_word: str
    adversarial_word: str
    clean_right: bool
    fooled: bool
    distance: float
    threat: str
    sample_id: int
    size: str
    turn: int


def pixels(values: _Array) -> _Array | None:
    """Return an input in [0, 1] as H x W or H x W x 3 float array, None when it is not a picture.

    C x H x W with 1 or 3 channels and H x W are pictures; a vector is one row of pixels.
    Values that are not finite become 0.
    """
    image: _Array = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=1.0, neginf=0.0)
    if image.ndim == 1 and image.size:
        return image[None, :]
    if image.ndim == 2 and image.size:
        return image
    if image.ndim == 3 and image.shape[0] in (1, 3):
        return image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
    return None


def difference(clean: _Array, adversarial: _Array) -> tuple[_Array, float]:
    """Return the signed change magnified to full scale, as H x W x 3 in [0, 1], and the magnification.

    Without change everything is white (grey pictures) or mid grey (colour) and the magnification is 1.
    Grey pictures: blue is darker than before, orange is lighter, white is unchanged.
    """
    change = adversarial - clean
    most = float(np.abs(change).max()) if change.size else 0.0
    gain = 1.0 / most if most > 0 else 1.0
    scaled = change * gain
    if scaled.ndim == 3:
        return 0.5 + 0.5 * scaled, gain
    white, less, more = np.ones(3), np.array([0.0, 0.447, 0.698]), np.array([0.835, 0.369, 0.0])
    weight = np.abs(scaled)[..., None]
    towards = np.where(scaled[..., None] < 0, less, more)
    return (1 - weight) * white + weight * towards, gain


def png_uri(image: _Array) -> str:
    """Return an H x W (x 3) array in [0, 1] as a PNG data URI at its own resolution."""
    levels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _turns(pictures: list[Picture]) -> list[tuple[int, Picture]]:
    """Number the pictures of each cell, and order them so that every cell has its first before any its second."""
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.cell, []).append(picture)
    longest = max((len(group) for group in groups.values()), default=0)
    return [(turn, group[turn]) for turn in range(longest) for group in groups.values() if turn < len(group)]


def load_pictures(summary: RunSummary, run_dir: str | Path) -> tuple[list[Shown], list[str]]:
    """Return the pictures of a run that could be drawn, and a sentence for each reason why others were not.

    Reads the npz parts that `summary.pictures` points at below `run_dir`; at most 60 pictures and 6 MiB are
    embedded, fairly over the cells.
    """
    store = Store(run_dir)
    parts: dict[str, dict[str, _Array]] = {}
    threats = {cell.cell: threat_sign(cell.norm, cell.eps, targeted=cell.targeted) for cell in summary.cells}
    shown: list[Shown] = []
    reasons: dict[str, int] = {}
    spent = 0
    for turn, picture in _turns(summary.pictures):
        if len(shown) >= _MOST or spent > _BUDGET:
            reason = f"left out to keep this page small ({_MOST} pictures or {_BUDGET // 2**20} MiB at most)"
        else:
            one = _draw(picture, turn, summary.classes, threats.get(picture.cell, ""), store, parts)
            if isinstance(one, Shown):
                shown.append(one)
                spent += len(one.clean) + len(one.adversarial) + len(one.difference)
                continue
            reason = one
        reasons[reason] = reasons.get(reason, 0) + 1
    shields = [*(cell.shield for cell in summary.cells), *(one.shield for one in shown)]
    spears = [*(cell.spear for cell in summary.cells), *(one.spear for one in shown)]
    shown.sort(key=lambda one: (shields.index(one.shield), spears.index(one.spear)))
    return shown, [f"{total} {'picture' if total == 1 else 'pictures'}: {reason}." for reason, total in reasons.items()]


def _draw(
    picture: Picture, turn: int, classes: list[str], threat: str, store: Store, parts: dict[str, dict[str, _Array]]
) -> Shown | str:
    """Return the drawn picture or the reason why there is none."""
    name = _part_path(picture, store)
    if name is None:
        return "its adversarial inputs are not in the run's folder"
    if name not in parts:
        # Parts may be large: only the last one stays in memory, and pictures of one part come close together.
        parts.clear()
        try:
            parts[name] = store.read_arrays(name)
        except (MaodunError, ValueError, OSError, KeyError) as error:
            return f"{name} cannot be read ({type(error).__name__})"
    arrays = parts[name]
    if not {"x", "x_adv"} <= arrays.keys() or not 0 <= picture.row < min(len(arrays["x"]), len(arrays["x_adv"])):
        return f"{name} does not hold the row that the summary names"
    clean, attacked = pixels(arrays["x"][picture.row]), pixels(arrays["x_adv"][picture.row])
    if clean is None or attacked is None or clean.shape != attacked.shape:
        return f"inputs of shape {' × '.join(map(str, arrays['x'].shape[1:]))} are not pictures"
    change, gain = difference(clean, attacked)

    def word(index: int) -> str:
        if classes and index == len(classes):
            # The class after the last is a refusal to answer.
            return "refused"
        return classes[index] if 0 <= index < len(classes) else str(index)

    return Shown(
        shield=picture.shield,
        spear=picture.spear,
        clean=png_uri(clean),
        adversarial=png_uri(attacked),
        difference=png_uri(change),
        gain=gain,
        label=word(picture.label),
        clean_word=word(picture.clean_pred),
        adversarial_word=word(picture.adv_pred),
        clean_right=picture.clean_pred == picture.label,
        fooled=picture.adv_pred != picture.label,
        distance=picture.distance,
        threat=threat,
        sample_id=picture.sample_id,
        turn=turn,
        size=" × ".join(map(str, clean.shape[:2])),
    )


def _part_path(picture: Picture, store: Store) -> str | None:
    """Return the part's path inside the store; a path that leaves the store counts as absent."""
    stem = picture.part.removesuffix(".npz")
    for name in (f"{stem}.npz", f"adversarials/{picture.cell}/{stem}.npz"):
        if ".." not in Path(name).parts and not Path(name).is_absolute() and store.exists(name):
            return name
    return None
