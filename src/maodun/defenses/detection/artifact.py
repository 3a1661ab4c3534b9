"""Fitted detectors as files: safetensors, which hold no code; options and provenance stand in the header as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from maodun.core.errors import InputError
from maodun.core.files import state_sha256, write_whole
from maodun.defenses.detection.base import Detector, RejectingClassifier

_HEADER = "maodun-detector"


def save_detector(rejecting: RejectingClassifier, path: str | Path) -> Path:
    """Write the fitted detector of `rejecting` to `path` (.safetensors), with the digest of the model it was fitted to.

    InputError when it has no threshold or the file cannot be written.
    """
    from safetensors.torch import save

    detector = rejecting.detector
    if not detector.fitted:
        raise InputError(
            f"detector '{detector.name}'", "has no threshold and nothing to keep", "fit_detector(...) first"
        )
    about = {
        "name": detector.name, "fpr": detector.fpr, "model": detector.fitted_to, "measures": detector.measures()
    }  # fmt: skip
    names = ("threshold", "spread", *detector.learnt)
    tensors = {name: getattr(detector, name).detach().cpu().contiguous() for name in names}
    return write_whole(path, save(tensors, metadata={_HEADER: json.dumps(about, sort_keys=True)}))


def load_detector(path: str | Path, detector: Detector, model: nn.Module) -> RejectingClassifier:
    """Fill `detector` with what was fitted and return it in front of `model`.

    InputError for a file that is none of ours, of another kind of detector or one with other options, or fitted to a
    model with other weights.
    """
    from safetensors import SafetensorError, safe_open

    thing = f"detector file '{path}'"
    try:
        with safe_open(str(path), framework="pt") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safetensors' own
    except (OSError, SafetensorError) as error:
        raise InputError(thing, f"cannot be read ({str(error).splitlines()[0]})", "give a saved detector") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise InputError(thing, "holds no fitted detector", "save one with save_detector or fit-detector") from error
    if about["name"] != detector.name:
        raise InputError(thing, f"holds a {about['name']}", f"use defense {about['name']}, or fit {detector.name}")
    # Files of before this was kept do not say.
    if about.get("measures", own := detector.measures()) != own:
        reason = f"was fitted with '{about['measures']}', not with '{own}'"
        raise InputError(thing, reason, "give the options it was fitted with, or fit it anew")
    found = state_sha256(model)
    if about["model"] != found:
        reason = f"was fitted to a model whose weights begin {about['model'][:12]}, not {found[:12]}"
        raise InputError(thing, reason, "fit it to this model, or give the model it belongs to")
    missing = [name for name in ("threshold", "spread", *detector.learnt) if name not in tensors]
    if missing:
        raise InputError(thing, f"lacks {', '.join(missing)}", "fit it anew")
    device = next((value.device for value in model.state_dict().values()), None)
    detector.keep(**{name: value if device is None else value.to(device) for name, value in tensors.items()})
    detector.fpr, detector.fitted_to = float(about["fpr"]), about["model"]
    return RejectingClassifier(model, detector).eval()


__all__ = ["load_detector", "save_detector"]
