"""Data sets that are NumPy archives."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from maodun.core.errors import InputError
from maodun.zoo.data.base import Dataset, make_dataset

_PIXELS, _LABELS = ("x", "images", "data"), ("y", "labels", "label", "targets")
_CHANNELS = (1, 3, 4)


def load_npz(path: str, spec: str, split: str, limit: int | None) -> Dataset:
    """Read arrays `x` (or images, data) and `y` (or labels, targets) of an .npz file, optionally `classes` and `ids`.

    Names with the split appended (x_test, y_test) come first. `x` is N x ..., uint8 or float in [0, 1]; pictures
    stored N x H x W x C are turned to N x C x H x W. Object arrays are refused: reading them would unpickle.
    """
    file = Path(path).expanduser()
    thing = f"npz file '{path}'"
    try:
        loaded = np.load(file, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise InputError(thing, "it is a single array", "save images and labels: np.savez(file, x=..., y=...)")
        with loaded as archive:
            names = set(archive.files)
            picks = {}
            for role, candidates in (("x", _PIXELS), ("y", _LABELS)):
                wanted = [f"{key}_{split}" for key in candidates] + list(candidates)
                key = next((key for key in wanted if key in names), None)
                if key is None:
                    raise InputError(
                        thing, f"no array '{role}' among {', '.join(sorted(names))}", "np.savez(file, x=..., y=...)"
                    )
                picks[role] = archive[key][:limit]
            classes = [str(name) for name in archive["classes"]] if "classes" in names else None
            ids = archive["ids"][:limit] if "ids" in names else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(thing, f"it cannot be read ({error})", "save plain arrays with np.savez") from error
    x = picks["x"]
    if x.ndim == 4 and x.shape[-1] in _CHANNELS and x.shape[1] not in _CHANNELS:
        x = x.transpose(0, 3, 1, 2)
    return make_dataset(file.stem, spec, x, picks["y"], classes, ids)
