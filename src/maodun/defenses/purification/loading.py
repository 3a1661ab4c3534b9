"""Score networks by one line of text; no file is ever unpickled into code, and nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from maodun.core.errors import InputError
from maodun.defenses.purification.denoiser import Denoiser
from maodun.defenses.purification.levels import Levels, vp_cosine, vp_discrete, vp_scaled
from maodun.defenses.purification.network import Core, Preconditioning, ScoreNetwork, need_diffusers

_PREDICTIONS: dict[str, Preconditioning] = {"epsilon": "eps", "sample": "x0", "v_prediction": "velocity"}


def load_score(score: str | Denoiser) -> Denoiser:
    """Return the denoiser that `score` is or names.

    A .safetensors file that `maodun train` wrote; a .pt state dict of the MNIST witness; a folder of a diffusers
    pipeline or UNet2DModel; or the hub id of one ("google/ddpm-cifar10-32") that lies in the local hub cache. Errors:
    InputError for anything else, files that cannot be read, architectures and schedules not known here, and without
    diffusers where it is needed.
    """
    if isinstance(score, Denoiser):
        return score
    where = f"score network '{score}'"
    if not score:
        remedy = "give score=FILE.safetensors, a diffusers folder, or zoo:score-mnist and the like"
        raise InputError("score network", "none is named", remedy)
    if score.startswith(("zoo:", "witness:")):
        remedy = "name the file here, or maodun.zoo.scores.find_score(name)"
        raise InputError(where, "names of the zoo are known to recipes and the command line only", remedy)
    path = Path(score).expanduser()
    if path.suffix == ".safetensors":
        from maodun.defenses.purification.artifact import load_artifact

        return load_artifact(path)
    if path.suffix in (".pt", ".pth") and path.is_file():
        from maodun.defenses.purification.witness import load_witness

        return load_witness(path, where)
    return load_diffusers(path if path.is_dir() else _cached(score, where), where)


def _cached(name: str, where: str) -> Path:
    """Return the folder of a hub id in the local cache."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(where, "there is no such file or folder", "check the path")
    need_diffusers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        reason = "is neither a folder here nor a model in the local hub cache, and nothing is downloaded at run time"
        raise InputError(where, reason, f"fetch it first: hf download {name}") from error


def load_diffusers(folder: Path, where: str) -> ScoreNetwork:
    """Return the UNet2DModel of a diffusers folder (or its unet/) with the chain of its scheduler."""
    unet2d = need_diffusers()
    home = folder / "unet" if (folder / "unet").is_dir() else folder
    config = _json(home / "config.json", where)
    if config.get("_class_name") != "UNet2DModel":
        reason = f"its config.json describes {config.get('_class_name', 'no class')}"
        raise InputError(where, reason, "give an unconditional UNet2DModel")
    levels, form = _schedule(folder, where)
    try:
        unet: nn.Module = unet2d.from_pretrained(
            home, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = f"its weights cannot be read ({str(error).splitlines()[0]})"
        raise InputError(where, reason, "it needs diffusion_pytorch_model.safetensors beside config.json") from error
    side, colours = config["sample_size"], config["in_channels"]
    height, width = (side, side) if isinstance(side, int) else side
    if config["out_channels"] != colours:
        reason = f"predicts {config['out_channels']} channels for {colours}"
        raise InputError(where, reason, "networks that predict their variance are not supported")
    return ScoreNetwork(Core(unet, levels, form), (colours, height, width), name=folder.name)


def _schedule(folder: Path, where: str) -> tuple[Levels, Preconditioning]:
    """Return the chain and the prediction of the scheduler's configuration; DDPM's defaults where there is none."""
    places = (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json")
    file = next((place for place in places if place.is_file()), None)
    config = {} if file is None else _json(file, where)
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 2e-2))
    count, kind = int(config.get("num_train_timesteps", 1000)), str(config.get("beta_schedule", "linear"))
    tables = {"linear": vp_discrete, "scaled_linear": vp_scaled}
    prediction = str(config.get("prediction_type", "epsilon"))
    if kind not in (*tables, "squaredcos_cap_v2") or config.get("trained_betas") or prediction not in _PREDICTIONS:
        reason = f"its schedule '{kind}' predicting '{prediction}' is not known here"
        raise InputError(where, reason, "use linear, scaled_linear or squaredcos_cap_v2 with epsilon, sample or v")
    table = vp_cosine(count=count) if kind not in tables else tables[kind](first, last, count)
    return table, _PREDICTIONS[prediction]


def _json(file: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            where, f"'{file.name}' cannot be read ({error.strerror})", "give a diffusers folder"
        ) from error
    except ValueError as error:
        raise InputError(where, f"'{file.name}' is not JSON", "fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(where, f"'{file.name}' describes no model", "fetch it again")
    return content
