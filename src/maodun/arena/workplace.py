"""What every training keeps in order: its folder, its checkpoint, its sides of the data, the line that repeats it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.training import split_holdout
from maodun.zoo.data import Dataset, load_data, same_samples

_FEW = 16


def usable_folder(out: str | Path) -> Path:
    """Return the folder `out`, made where it was missing; InputError when it cannot be."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"folder '{folder}'", f"it cannot be made ({error.strerror})", "choose another") from error
    return folder


def checkpoint_in(folder: Path, name: str, *, resume: bool) -> Path:
    """Return the checkpoint NAME.ckpt of a training in `folder`; without `resume` an old one is removed."""
    checkpoint = folder / f"{name}.ckpt"
    if not resume:
        checkpoint.unlink(missing_ok=True)
    return checkpoint


def two_sides(data: Dataset, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows of `data` to learn from and those held out, `share` of every class but at least one of it.

    InputError when nothing is left to learn from.
    """
    kept, held = split_holdout(data.y, share, seed)
    if not kept.numel():
        reason = f"of {len(data)} samples one of every class is held out, and none is left to learn from"
        raise InputError(f"data '{data.spec}'", reason, "give more samples")
    return kept, held


def refuse_one_split(data: Dataset) -> None:
    """Raise InputError when `data`, to be learnt from, are the samples that its test split begins with.

    What is measured there would have been trained on. Asked before any training; so is whether there is a test split.
    """
    test = load_data(data.spec, split="test", limit=min(len(data), _FEW))
    if same_samples(data, test):
        remedy = (
            "give both: x_train and x_test in an npz, folders train and test, or a folder of train*.parquet and so on"
        )
        raise InputError(f"data '{data.spec}'", "has no test split apart from what is trained on", remedy)


def origin(recipe: object, name: str) -> str:
    """Return how a result names the recipe it came from: the file as it was given, else by its `name`."""
    return str(recipe) if isinstance(recipe, str | Path) else f"recipe {name}"


__all__ = ["checkpoint_in", "origin", "refuse_one_split", "two_sides", "usable_folder"]
