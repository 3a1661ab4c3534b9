"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import hashlib
import io
import os
import time
import uuid
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError

_STALE = 3600.0


def write_whole(path: str | Path, content: bytes) -> Path:
    """Write `content` to `path` under a temporary name, then rename it, and return the path; makes its folder.

    What stood there before stays until the new file is whole on the disk. InputError when it cannot be written (a full
    disk, a folder that is not writable); then nothing is left behind.
    """
    file = Path(path).expanduser()
    # A name of its own: two that write the same file at once do not meet in a half-written one.
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(file)
        with temporary.open("wb") as out:
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(file)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        remedy = "free space or choose another place; what stood there is kept"
        raise InputError(f"file '{file}'", f"it cannot be written ({error.strerror})", remedy) from error
    return file


def _remove_stale(file: Path) -> None:
    """Remove what a killed process has left half-written beside `file`; what is being written is younger."""
    for left in file.parent.glob(f"{escape(file.name)}.*.part"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _STALE:
                left.unlink()


def save_whole(path: str | Path, content: Any) -> Path:
    """Write what torch.load reads with weights_only (tensors, numbers, text, dicts, lists) to `path`, whole."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return write_whole(path, buffer.getvalue())


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return what `save_whole` wrote of a training, tensors on `device`; it has a signature.

    InputError for a file that cannot be read, is damaged, or is no checkpoint; no code in it is run.
    """
    thing, remedy = f"checkpoint '{path}'", "remove it, or start with --restart"
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a damaged file can fail in any way, seldom in words for its owner
        raise InputError(thing, "cannot be read: it is damaged, or no checkpoint", remedy) from error
    if not isinstance(content, dict) or "signature" not in content:
        raise InputError(thing, "holds no training that could go on", remedy)
    return content


def weights_of(model: nn.Module, kind: torch.dtype = torch.float32) -> bytes:
    """Return the state dict as the bytes of a safetensors file; floating-point values as `kind`."""
    from safetensors.torch import save

    state = model.state_dict().items()
    return bytes(save({k: (v.to(kind) if v.is_floating_point() else v).contiguous() for k, v in state}))


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 over names, types, shapes and values of a model's state dict, in hexadecimal.

    A module whose weights are elsewhere adds its `fingerprint`.
    """
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(mark := getattr(module, "fingerprint", None), str):
            digest.update(f"fingerprint|{mark}|".encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            plain = value.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()
