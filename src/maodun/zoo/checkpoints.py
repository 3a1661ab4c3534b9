"""Weights in and out of files without ever unpickling: safetensors, or PyTorch's restricted reader."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.files import state_sha256

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights", "params", "ema")
_PREFIXES = ("module.", "_orig_mod.", "_forward_module.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file, or of a PyTorch checkpoint read with `weights_only=True`.

    Checkpoints may wrap the weights in a dictionary (state_dict, model, net, ...), and names may carry the prefixes of
    DataParallel, torch.compile or Fabric; both are undone. Errors: InputError when the file is missing, would run code
    on reading, or holds no weights.
    """
    file = Path(path).expanduser()
    thing = f"weights '{path}'"
    if not file.is_file():
        raise InputError(thing, "there is no such file", "check the path")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(file))
        except (SafetensorError, OSError) as error:
            raise InputError(
                thing, f"it is not a whole safetensors file ({error})", "fetch or save it again"
            ) from error
    return _strip(_unwrap(restricted_load(file.read_bytes(), thing), thing))


def restricted_load(content: bytes, thing: str) -> Any:
    """Return what a PyTorch checkpoint holds, tensors and plain containers only.

    Errors: InputError when it holds anything else: to read that would mean to run code of the file's choosing.
    """
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise InputError(
            thing,
            f"it is not a plain file of tensors, and reading it otherwise could run code ({reason})",
            "save the state dict alone, best with safetensors.torch.save_file",
        ) from error


def _unwrap(content: Any, thing: str) -> dict[str, Tensor]:
    for _ in range(3):
        if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
            return {str(name): value for name, value in content.items()}
        if not isinstance(content, Mapping):
            break
        key = next((key for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        content = content[key]
    raise InputError(thing, "no dictionary of named tensors was found in it", "save model.state_dict()")


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def apply_weights(model: nn.Module, state: Mapping[str, Tensor], thing: str) -> None:
    """Copy `state` into `model`, every name and shape matched exactly.

    Errors: InputError naming the missing, unexpected and misshapen entries.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in state]
    # Counters of batch norm only matter in training, and older checkpoints lack them.
    counters = [name for name in missing if name.endswith("num_batches_tracked")]
    missing = [name for name in missing if name not in counters]
    unexpected = [name for name in state if name not in own]
    shaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        f"{label}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        for label, names in (("missing keys", missing), ("unexpected keys", unexpected), ("wrong shapes", shaped))
        if names
    ]
    if problems:
        raise InputError(
            thing, "; ".join(problems).replace("; ", " and "), "give the weights of this very architecture"
        )
    model.load_state_dict({**{name: own[name] for name in counters}, **state})


__all__ = ["apply_weights", "read_weights", "restricted_load", "state_sha256"]
