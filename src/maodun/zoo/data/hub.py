"""Data sets of the Hugging Face hub: a local copy of one, or an id that the `datasets` library fetches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from maodun.core.errors import InputError
from maodun.zoo.data.base import Dataset, make_dataset
from maodun.zoo.data.images import stack
from maodun.zoo.data.tables import find_split, load_parquet


def load_hub(target: str, spec: str, split: str, limit: int | None, options: dict[str, str]) -> Dataset:
    """Read `target`, a folder with <split>*.parquet files or a hub id.

    `options`: image, label (column names) and config (the hub's configuration name). Errors: InputError when the id
    needs the `datasets` library and it is missing or fails.
    """
    root = Path(target).expanduser()
    if root.is_dir():
        return load_parquet(find_split(root, split, spec), spec, limit, name=root.name, options=options)
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"data '{spec}'",
            f"'{target}' is no local folder, and hub ids need the datasets library",
            "pip install 'maodun[hf]', or give a folder with Parquet files",
        ) from error
    wanted = split if limit is None else f"{split}[:{limit}]"
    try:
        rows = datasets.load_dataset(target, options.get("config"), split=wanted)
    except Exception as error:
        raise InputError(f"data '{spec}'", f"the hub did not give it ({error})", "check id, split, network") from error
    return _from_rows(rows, target, spec, options)


def _from_rows(rows: Any, target: str, spec: str, options: dict[str, str]) -> Dataset:
    """Return the Dataset of a `datasets.Dataset` with a picture column and a class column."""
    features = rows.features
    image = options.get("image") or next((k for k, f in features.items() if type(f).__name__ == "Image"), None)
    label = options.get("label") or next((k for k, f in features.items() if type(f).__name__ == "ClassLabel"), None)
    for role, column in (("image", image), ("label", label)):
        if column not in features:
            raise InputError(
                f"data '{spec}'", f"no {role} column among {', '.join(features)}", f"name it: {spec}#{role}=COLUMN"
            )
    pictures = (
        (f"row {k} of '{target}'", np.asarray(row.convert("L" if row.mode in ("1", "L") else "RGB")))
        for k, row in enumerate(rows[image])
    )
    return make_dataset(
        target.rsplit("/", 1)[-1], spec, stack(pictures), rows[label], getattr(features[label], "names", None)
    )
