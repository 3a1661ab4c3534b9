"""What `maodun purify` does: one picture in, one picture out."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maodun.app.consoles import console
from maodun.core.errors import InputError
from maodun.core.files import write_whole


def purify(picture: str, out: str, *, score: str, seed: int, device: str, quiet: bool, **options: Any) -> None:
    """Purify the file `picture` into the PNG `out`; `options` are those of DiffusionFilter.

    InputError, before the network is loaded, for a picture that is missing, corrupt or cut short and for an output that
    is no .png; later for a score network of another size, or one that is not there.
    """
    target = Path(out).expanduser()
    if target.suffix.lower() != ".png":
        raise InputError(f"output '{out}'", "is no .png, and other formats lose what was gained", "name a .png")
    image = read_picture(picture)
    from maodun.arena.setup import usable_device
    from maodun.defenses.purification import DiffusionFilter
    from maodun.zoo.scores import find_score

    place = usable_device(device)
    defense = DiffusionFilter(find_score(score), **options).to(place)
    began = time.perf_counter()
    purified = defense.purify(as_tensor(image, defense.denoiser.shape).to(place), seed=seed)
    seconds = time.perf_counter() - began
    write_picture(purified[0].cpu(), target)
    if not quiet:
        console().print(f"{target}  ({defense.spec.nfe} network evaluations, {seconds:.2f} s)", soft_wrap=True)


def read_picture(path: str) -> Any:
    """Return the decoded Pillow image of a file; InputError when it is missing, no picture, cut short, or not 8 bit."""
    from PIL import Image, UnidentifiedImageError

    file = Path(path).expanduser()
    if not file.is_file():
        raise InputError(f"picture '{path}'", "there is no such file", "check the path")
    try:
        with Image.open(file) as image:
            image.load()
            picture = image.copy()
    except UnidentifiedImageError as error:
        raise InputError(f"picture '{path}'", "holds no picture of a known format", "give a PNG or JPEG") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = f"cannot be decoded ({str(error).splitlines()[0]})"
        raise InputError(f"picture '{path}'", reason, "it is corrupt or cut short: fetch it again") from error
    if picture.mode.startswith(("I", "F")):
        # Pillow's conversion would cut all above 255 off, which leaves a white picture.
        raise InputError(f"picture '{path}'", "holds more than 8 bits per value", "save it with 8 bits")
    return picture


def as_tensor(image: Any, shape: tuple[int, int, int] | None) -> Tensor:
    """Return a picture as 1 x C x H x W in [0, 1]: grey for a network on one channel, else RGB; alpha is dropped."""
    mode = "L" if shape is not None and shape[0] == 1 else "RGB"
    array = np.asarray(image.convert(mode), dtype=np.float32) / 255.0
    grid = torch.from_numpy(array)
    return (grid[None] if grid.ndim == 2 else grid.permute(2, 0, 1)).unsqueeze(0).contiguous()


def write_picture(x: Tensor, path: Path) -> Path:
    """Write C x H x W in [0, 1] as an 8-bit PNG, whole or not at all."""
    from PIL import Image

    levels = (x * 255.0).round().clamp(0, 255).to(torch.uint8)
    array = (levels[0] if levels.shape[0] == 1 else levels.permute(1, 2, 0)).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return write_whole(path, buffer.getvalue())
