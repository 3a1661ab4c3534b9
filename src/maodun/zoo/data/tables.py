"""Data sets that are Parquet files with encoded pictures, as the Hugging Face hub stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maodun.core.errors import InputError
from maodun.zoo.data.base import Dataset, make_dataset
from maodun.zoo.data.images import decode, stack

_LABELS = ("label", "labels", "fine_label", "y", "target", "class")


def _columns(schema: Any, options: dict[str, str], thing: str) -> tuple[str, str, list[str] | None]:
    """Return the picture column, the label column and, when the metadata names them, the classes."""
    import pyarrow as pa

    names = [field.name for field in schema]
    pictures = [f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    image = options.get("image", pictures[0] if pictures else "")
    label = options.get("label", next((name for name in _LABELS if name in names), ""))
    for role, column in (("image", image), ("label", label)):
        if column not in names:
            raise InputError(
                thing, f"no {role} column '{column}' among {', '.join(names)}", f"name it: ...parquet#{role}=COLUMN"
            )
    described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = described.get("info", {}).get("features", {}).get(label, {})
    return image, label, feature.get("names") if isinstance(feature, dict) else None


def load_parquet(
    files: Sequence[str | Path],
    spec: str,
    limit: int | None,
    *,
    name: str = "",
    options: dict[str, str] | None = None,
    classes: Sequence[str] | None = None,
) -> Dataset:
    """Read rows of {image: struct{bytes, path}, label: integer} in file order; ids are row numbers.

    `files` may hold glob patterns; `options` may name the columns `image` and `label`. Only the first `limit` pictures
    are decoded. Errors: InputError for missing or unreadable files, columns, pictures and labels.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    paths = [path for file in files for path in _expand(Path(file).expanduser())]
    pixels: list[tuple[str, np.ndarray[Any, Any]]] = []
    labels: list[int] = []
    found = list(classes) if classes is not None else None
    for path in paths:
        thing = f"parquet file '{path}'"
        try:
            with pq.ParquetFile(path) as file:
                image, label, listed = _columns(file.schema_arrow, options or {}, thing)
                found = found or listed
                for batch in file.iter_batches(512, columns=[image, label]):
                    encoded = batch.column(0 if batch.schema.names[0] == image else 1)
                    for content in encoded.to_pylist()[: None if limit is None else limit - len(pixels)]:
                        place = f"row {len(pixels)} of '{path}'"
                        data = content["bytes"] if isinstance(content, dict) else content
                        pixels.append((place, decode(data if isinstance(data, bytes) else b"", place)))
                    labels.extend(batch.column(label).to_pylist())
                    if limit is not None and len(pixels) >= limit:
                        break
        except (OSError, pa.ArrowException) as error:
            raise InputError(thing, f"it cannot be read ({error})", "check the path and the file") from error
        if limit is not None and len(pixels) >= limit:
            break
    if not pixels:
        raise InputError(f"data '{spec}'", "the files hold no rows", "check the files")
    values = np.asarray([-1 if value is None else value for value in labels[: len(pixels)]])
    return make_dataset(name or paths[0].stem, spec, stack(pixels), values, found)


def _expand(pattern: Path) -> list[Path]:
    """Return the files a pattern in the last part of a path stands for, or the path itself when there are none."""
    return sorted(pattern.parent.glob(pattern.name)) or [pattern]


def find_split(root: Path, split: str, spec: str) -> list[Path]:
    """Return the Parquet files of `split` under `root`: those whose name begins with it, at any depth.

    Errors: InputError when there are none.
    """
    files = sorted(path for path in root.rglob("*.parquet") if path.name.startswith(split))
    if not files:
        raise InputError(
            f"data '{spec}'", f"no {split}*.parquet under '{root}'", "point it at the folder with the Parquet files"
        )
    return files
