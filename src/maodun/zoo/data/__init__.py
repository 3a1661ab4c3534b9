"""Data sets by one line of text: what to read, from where, and which columns."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from maodun.core.errors import InputError, nearest
from maodun.zoo.data.arrays import load_npz
from maodun.zoo.data.base import DataInfo, Dataset, same_samples
from maodun.zoo.data.digits import load_digits
from maodun.zoo.data.hub import load_hub
from maodun.zoo.data.idx import load_mnist
from maodun.zoo.data.images import load_folder
from maodun.zoo.data.tables import find_split, load_parquet

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
KINDS = ("digits", "mnist", "cifar10", "folder", "parquet", "npz", "hf")
_SAMPLES = ("folder:photos/", "parquet:test-*.parquet", "npz:data.npz", "hf:user/name")


def data_root(spec: str) -> Path:
    """Return the folder MAODUN_DATA points at. Errors: InputError when it is unset or no folder."""
    value = os.environ.get("MAODUN_DATA")
    if not value:
        raise InputError(
            f"'{spec}'",
            "it is read from the folder that MAODUN_DATA names, and that is unset",
            f"export MAODUN_DATA=/path, or give the path itself: {spec.partition(':')[0]}:/path",
        )
    root = Path(value).expanduser()
    if not root.is_dir():
        raise InputError(f"MAODUN_DATA='{value}'", "it is not a folder", "point it at the folder with the data")
    return root


def load_data(spec: str, *, split: str = "test", limit: int | None = None) -> Dataset:
    """Return the data set that `spec` names.

    Specs: `digits` · `mnist[:DIR]` · `cifar10[:DIR]` (default $MAODUN_DATA/mnist and /cifar10) · `folder:DIR` ·
    `parquet:FILE,FILE` · `npz:FILE` · `hf:ID_OR_DIR`. `parquet` and `hf` take options after `#`:
    `#image=COLUMN,label=COLUMN` (`hf` also `config=NAME`). `limit` reads only the first samples; for the benchmark
    sets these are the first of the original order.
    Errors: InputError naming what is wrong for anything that cannot be read, is not in [0, 1], or is mislabelled.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit {limit}", "a data set of no samples cannot be evaluated", "ask for 1 or more")
    kind, _, rest = spec.partition(":")
    target, options = _options(rest, spec)
    if kind not in KINDS:
        raise InputError(f"data '{spec}'", f"there is no kind '{kind}'", nearest(kind, [*KINDS, *_SAMPLES]))
    if kind == "digits":
        return load_digits(spec, split, limit)
    if kind == "mnist":
        return load_mnist(Path(target) if target else data_root(spec) / "mnist", spec, split, limit)
    if kind == "cifar10":
        root = Path(target) if target else data_root(spec) / "cifar10"
        files = find_split(root, split, spec)
        return load_parquet(files, spec, limit, name="cifar10", options=options, classes=CIFAR10_CLASSES)
    if not target:
        raise InputError(f"data '{spec}'", "nothing follows the colon", "for example " + " or ".join(_SAMPLES))
    if kind == "folder":
        return load_folder(target, spec, split, limit)
    if kind == "npz":
        return load_npz(target, spec, split, limit)
    if kind == "hf":
        return load_hub(target, spec, split, limit, options)
    return load_parquet(target.split(","), spec, limit, options=options)


def _options(rest: str, spec: str) -> tuple[str, dict[str, str]]:
    """Split `target#key=value,key=value` into the target and its options."""
    target, mark, tail = rest.partition("#")
    if not mark:
        return rest, {}
    options: dict[str, str] = {}
    for pair in tail.split(","):
        key, equals, value = pair.partition("=")
        if not equals or key not in ("image", "label", "config"):
            raise InputError(f"data '{spec}'", f"'{pair}' is no option", "use #image=COLUMN,label=COLUMN,config=NAME")
        options[key] = value
    return target, options


def list_data() -> list[DataInfo]:
    """Return the data sets known by name and the kinds of files that can be read, with what is available now."""
    value = os.environ.get("MAODUN_DATA")
    root = Path(value).expanduser() if value else None
    digits = importlib.util.find_spec("sklearn") is not None
    hub = importlib.util.find_spec("datasets") is not None
    return [
        DataInfo("digits", "1,797 handwritten 8 x 8 digits, 797 train / 1,000 test (scikit-learn)", digits),
        DataInfo("mnist", "MNIST, idx files in $MAODUN_DATA/mnist", bool(root and (root / "mnist").is_dir())),
        DataInfo("cifar10", "CIFAR-10, Parquet in $MAODUN_DATA/cifar10", bool(root and (root / "cifar10").is_dir())),
        DataInfo("folder:DIR", "pictures in DIR/<class>/", True),
        DataInfo("parquet:FILES", "encoded pictures and labels in Parquet files", True),
        DataInfo("npz:FILE", "arrays x and y in a NumPy archive", True),
        DataInfo("hf:DIR", "a local copy of a hub data set", True),
        DataInfo("hf:ID", "a data set of the Hugging Face hub (datasets library)", hub),
    ]


__all__ = ["CIFAR10_CLASSES", "KINDS", "DataInfo", "Dataset", "data_root", "list_data", "load_data", "same_samples"]
