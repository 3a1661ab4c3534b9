"""The page of a multi-task experiment: a table of tasks by attacks, and what the networks see before and after."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from maodun.arena.multitask import CLEAN, Line, summarise_multitask
from maodun.arena.multitask_recipe import MultitaskRecipe, load_multitask_recipe
from maodun.arena.multitask_stage import Stage
from maodun.arena.recipe import format_radius
from maodun.report.files import write_text
from maodun.report.html import package_version, page
from maodun.tasks import TASKS

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

_COLOURS = (
    (128, 170, 220), (150, 90, 80), (190, 190, 160), (110, 80, 130), (220, 130, 180), (90, 150, 60),
    (200, 160, 60), (120, 110, 100), (60, 60, 200), (200, 40, 40), (40, 170, 170), (0, 0, 0),
)  # fmt: skip
_SURE = 0.3
_SHOWN = 2


def headers() -> list[str]:
    """Return the column titles of the table."""
    named = [f"{name}, {kind.metric}" for name, kind in TASKS.items()]
    return ["attack", *named, "mean drop [95 %]", "least hurt task", "reference minus this [95 %]", "p", "CPU s"]


def words(line: Line) -> list[str]:
    """Return one line of the table as text; drops stand in brackets behind the metric."""
    cells = [f"{line.metrics[task]:.3f} ({100 * line.drops[task]:+.0f} %)" for task in TASKS]
    if line.name == CLEAN:
        return [line.name, *(f"{line.metrics[task]:.3f}" for task in TASKS), "", "", "", "", ""]
    mean = f"{100 * line.score:.1f} [{100 * line.score_low:.1f}, {100 * line.score_high:.1f}]"
    gap = f"{100 * line.margin:+.1f} [{100 * line.low:+.1f}, {100 * line.high:+.1f}]"
    # The reference against itself says nothing.
    beside = ["", ""] if line.low == line.high == 0.0 else [gap, f"{line.p:.3g}"]
    return [line.name, *cells, mean, line.worst, *beside, f"{line.seconds:.0f}"]


def to_table(lines: list[Line]) -> Table:
    """Return the lines as a table for a terminal."""
    from rich.table import Table as RichTable

    table = RichTable(title="One set of images, every task (metric, drop)")
    for header in headers():
        table.add_column(header)
    for line in lines:
        table.add_row(*words(line))
    return table


def write_multitask(recipe: MultitaskRecipe | str | Path, folder: str | Path, out_path: str | Path) -> Path | str:
    """Write the page of the run in `folder` and return its path; InputError without Jinja2 or a place to write."""
    described = recipe if isinstance(recipe, MultitaskRecipe) else load_multitask_recipe(recipe)
    lines = summarise_multitask(described, Path(folder))
    content = {
        "name": described.name,
        "radius": format_radius(described.eps),
        "images": described.images.model_dump(),
        "resamples": described.resamples,
        "reference": described.reference,
        "headers": headers(),
        "rows": [(line.name == described.reference, words(line)) for line in lines],
        "albums": albums(described, Path(folder), [line.name for line in lines]),
        "version": package_version(),
    }
    return write_text(out_path, page("multitask.html.j2", content, []))


def albums(recipe: MultitaskRecipe, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """Return, per picture, every row's image and what its task's network makes of it, as data URIs."""
    from safetensors.torch import load_file

    stage = Stage(recipe, lambda _: None)
    made = {name: load_file(folder / f"{name}.images.safetensors") for name in names}
    found = []
    for group, task in (("street", "segmentation"), ("people", "detection"), ("things", "reconstruction")):
        for number in range(_SHOWN):
            tiles = []
            for name in names:
                picture = made[name][group][number]
                tiles.append({"name": name, "image": _uri(_array(picture)), "seen": _seen(stage, task, picture)})
            found.append({"group": group, "task": task, "number": number, "tiles": tiles})
    return found


def _seen(stage: Stage, task: str, picture: Tensor) -> str:
    """Return what the task's network makes of an 8-bit image, as a picture."""
    model = stage.players[task].model
    with torch.no_grad():
        output = model(picture.unsqueeze(0).float() / 255.0)
    if task == "segmentation":
        return _uri(np.asarray(_COLOURS, np.uint8)[output[0].argmax(0).numpy()])
    if task == "reconstruction":
        return _uri(_array((output[0] * 255.0).round().byte()))
    from maodun.tasks import Detection

    scores, boxes = Detection().decode(output)
    return _uri(_boxed(_array(picture), boxes[0][scores[0] >= _SURE].numpy()))


def _boxed(image: np.ndarray[Any, Any], boxes: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    from PIL import Image, ImageDraw

    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    for box in boxes:
        x0, y0, x1, y1 = (float(v) for v in box)
        pen.rectangle((x0, y0, x1, y1), outline=(255, 60, 40), width=1)
    return np.asarray(canvas)


def _array(picture: Tensor) -> np.ndarray[Any, Any]:
    return picture.permute(1, 2, 0).contiguous().numpy()


def _uri(image: np.ndarray[Any, Any]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
