"""From the bytes of an answer to numbers, or to one sentence that says why that cannot be done."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from maodun.zoo.foreign.base import Array

# Where scores are looked for when no path is given, and what they are taken for there.
USUAL = {"logits": "logits", "scores": "scores", "probabilities": "probabilities", "label": "label", "labels": "label"}


class GarbageError(ValueError):
    """An answer that cannot be read; the text says why."""


def find(content: bytes, output: str | None, kind: str) -> tuple[Any, str]:
    """Return the part of an answer that holds the scores, and its kind.

    `content` is JSON, or an array in NumPy's format. `output` is the dotted path of the part; None tries the usual
    keys. `kind` "auto" is told by the key. Raises GarbageError.
    """
    if content.startswith(b"\x93NUMPY"):
        return foreign(_numpy, content), "scores" if kind == "auto" else kind
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise GarbageError(f"it is no JSON ({excerpt(content)})") from None
    if output is None:
        return _usual(value, kind)
    for part in output.split("."):
        value = _inside(value, part, output)
    return value, _kind(output.rpartition(".")[2], kind)


def foreign(read: Callable[[bytes], Any], content: bytes) -> Any:
    """Return what `read` makes of an answer; whatever it raises becomes a GarbageError."""
    try:
        return read(content)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise GarbageError(f"it cannot be read ({reason})") from error


def _numpy(content: bytes) -> Array:
    return np.asarray(np.load(io.BytesIO(content), allow_pickle=False))


def _usual(value: Any, kind: str) -> tuple[Any, str]:
    if not isinstance(value, dict):
        return value, "scores" if kind == "auto" else kind
    key = next((key for key in USUAL if key in value and (USUAL[key] == "label") == (kind == "label")), None)
    if key is not None:
        return value[key], _kind(key, kind)
    if any(USUAL.get(key) == "label" for key in value):
        raise GarbageError("it tells labels only, which kind=label and classes=N have to announce")
    held = ", ".join(map(str, value))[:120] or "nothing"
    raise GarbageError(f"it holds {held}, and none of {', '.join(USUAL)}; output=PATH says where the scores are")


def _kind(key: str, kind: str) -> str:
    if kind != "auto":
        return kind
    found = USUAL.get(key, "scores")
    if found == "label":
        raise GarbageError("it tells labels only, which kind=label and classes=N have to announce")
    return found


def _inside(value: Any, part: str, path: str) -> Any:
    if isinstance(value, dict) and part in value:
        return value[part]
    if isinstance(value, list) and part.isdigit() and int(part) < len(value):
        return value[int(part)]
    raise GarbageError(f"it has nothing at '{path}'")


def rows(value: Any, n: int) -> Array:
    """Return `value` as float32 n x C; for one image a plain list of C numbers will do. Raises GarbageError."""
    try:
        with np.errstate(over="ignore"):
            array = np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        raise GarbageError("its scores are not a table of numbers") from None
    if n == 1 and array.ndim == 1:
        array = array[None]
    if array.ndim != 2 or array.shape[0] != n or array.shape[1] < 2:
        raise GarbageError(f"its scores have shape {tuple(array.shape)} instead of ({n}, classes)")
    if not np.isfinite(array).all():
        raise GarbageError("its scores are not all finite")
    return array


def labels(value: Any, n: int, classes: int | Sequence[str] | None) -> Array:
    """Return class numbers or names as float32 n x 1 numbers; GarbageError for anything that is no class."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    flat = value if isinstance(value, list) else [value]
    if len(flat) != n:
        raise GarbageError(f"it holds {len(flat)} labels for {n} images")
    names = () if classes is None or isinstance(classes, int) else tuple(classes)
    count = classes if isinstance(classes, int) else len(names)
    numbers = [names.index(label) if label in names else label for label in flat]
    for number in numbers:
        whole = isinstance(number, int) and not isinstance(number, bool)
        if not whole or not 0 <= number < count:
            raise GarbageError(f"'{str(number)[:40]}' is none of its {count} classes")
    return np.asarray(numbers, dtype=np.float32)[:, None]


def excerpt(content: bytes) -> str:
    """Return the beginning of an answer as printable text for an error message."""
    text = " ".join(content[:200].decode("utf-8", "replace").split())
    return "".join(mark if mark.isprintable() else "?" for mark in text)[:80] or "empty"
