"""Score networks as files: safetensors, which hold no code, with everything needed to rebuild the network as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.files import write_whole
from maodun.defenses.purification.levels import parse_levels
from maodun.defenses.purification.network import Core, ScoreNetwork, build_unet

_FORMAT, _HEADER, _KIND = 1, "maodun", "score"


def save_score(network: ScoreNetwork, path: str | Path, kind: torch.dtype = torch.float16) -> Path:
    """Write a score network to `path`, whole or not at all, its weights as `kind`; return the path.

    The header holds the U-Net's configuration, the parametrisation, the levels, the image shape, the trained range, the
    provenance and the SHA-256 of the tensors. InputError when it cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        name: value.detach().cpu().to(kind).clone(memory_format=torch.contiguous_format)
        for name, value in network.core.unet.state_dict().items()
    }
    about = {key: value for key, value in network.about.items() if key != "config"}
    header = {
        "format": _FORMAT,
        "kind": _KIND,
        "architecture": "UNet2DModel",
        "config": network.about["config"],
        "form": network.core.form,
        "patch": network.core.patch,
        "spread": network.core.spread,
        "levels": network.levels.name,
        "top": network.top if math.isfinite(network.top) else None,
        "shape": list(network.shape or ()),
        "sha256": digest(tensors),
        "about": about,
    }
    return write_whole(path, bytes(save(tensors, {_HEADER: json.dumps(header, sort_keys=True)})))


def digest(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors: names, shapes, types and bytes in the order of the names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.numpy().tobytes(order="C"))
    return total.hexdigest()


def load_artifact(path: str | Path) -> ScoreNetwork:
    """Return the score network of a file that `save_score` wrote, frozen, in float32.

    Errors: InputError when the file is missing, cut short, of another kind or format, changed since it was written,
    or when diffusers is not installed.
    """
    file, where = Path(path).expanduser(), f"score network '{path}'"
    tensors, header = read_artifact(file, where)
    if digest(tensors) != header["sha256"]:
        raise InputError(where, "its tensors are not those it was written with", "fetch or train it again")
    unet = build_unet(header["config"])
    try:
        unet.load_state_dict({name: value.float() for name, value in tensors.items()})
        core = Core(unet, parse_levels(header["levels"]), header["form"], int(header["patch"]), float(header["spread"]))
        colours, height, width = header["shape"]
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        reason = f"its parts do not fit together ({str(error).splitlines()[0]})"
        raise InputError(where, reason, "save it again") from error
    top = math.inf if header["top"] is None else float(header["top"])
    about = {**header["about"], "config": header["config"], "sha256": header["sha256"]}
    network = ScoreNetwork(core, (colours, height, width), top, file.stem, about)
    network.freeze()
    return network


def read_artifact(file: Path, where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and header of a score file; InputError about `where` when it is none."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise InputError(where, "there is no such file", "check the path, or train it: maodun train recipes/score/...")
    try:
        with safe_open(file, framework="pt") as content:
            text = (content.metadata() or {}).get(_HEADER)
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(where, f"is not a whole safetensors file ({error})", "fetch or save it again") from error
    try:
        header = json.loads(text or "")
        known = header["kind"] == _KIND and header["format"] == _FORMAT
    except (ValueError, KeyError, TypeError):
        known, header = False, {}
    if not known:
        raise InputError(
            where, "holds no score network of a format known here", "give a file that 'maodun train' wrote"
        )
    return tensors, header
