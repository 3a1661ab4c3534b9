"""Training a task's network: AdamW, one cycle of the learning rate, random crops and mirrored images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.files import weights_of, write_whole
from maodun.tasks.base import Task
from maodun.tasks.data import Labelled, batches


@dataclass(frozen=True)
class FitSettings:
    """How long and how: `epochs` over the set, images per step, peak learning rate, `crop` (height, width) or None."""

    epochs: int = 20
    batch_size: int = 16
    rate: float = 3e-3
    decay: float = 1e-4
    crop: tuple[int, int] | None = None
    flip: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            reason = f"epochs {self.epochs} and batch size {self.batch_size} leave nothing to learn from"
            raise InputError("training", reason, "give at least 1 epoch and 2 images per step")


def fit_task(
    task: Task,
    model: nn.Module,
    data: Labelled,
    settings: FitSettings,
    *,
    seed: int = 0,
    on_epoch: Callable[[dict[str, float]], None] | None = None,
) -> nn.Module:
    """Train `model` in place on `data` and return it in evaluation mode.

    Every random choice follows from `seed`. `on_epoch` gets {epoch, loss, seconds}.
    """
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.rate, weight_decay=settings.decay)
    steps = settings.epochs * -(-len(data) // settings.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, settings.rate, total_steps=steps, pct_start=0.2)
    started = time.perf_counter()
    model.train()
    for epoch in range(settings.epochs):
        losses = []
        for rows in batches(len(data), settings.batch_size, generator):
            x, truth = augment(data.images(rows), data.truth[rows], settings, generator)
            value = task.loss(model(x), task.target(model, x, truth)).mean()
            optimiser.zero_grad(set_to_none=True)
            value.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            schedule.step()
            losses.append(value.detach())
        if on_epoch is not None:
            line = {"loss": float(torch.stack(losses).mean()), "seconds": time.perf_counter() - started}
            on_epoch({"epoch": float(epoch + 1), **line})
    return model.eval()


def augment(x: Tensor, truth: Tensor, settings: FitSettings, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return one random crop for the whole batch, mirrored or not; class maps and boxes follow."""
    if settings.crop is not None:
        high, wide = settings.crop
        top, left = (int(torch.randint(0, n - c + 1, (1,), generator=generator)) for n, c in
                     zip(x.shape[2:], settings.crop, strict=True))  # fmt: skip
        x = x[:, :, top : top + high, left : left + wide]
        if truth.ndim == 3 and truth.dtype == torch.int64:
            truth = truth[:, top : top + high, left : left + wide]
        elif truth.ndim == 3:
            truth = crop_boxes(truth, top, left, high, wide)
    if settings.flip and bool(torch.randint(0, 2, (1,), generator=generator)):
        x = x.flip(3)
        if truth.ndim == 3 and truth.dtype == torch.int64:
            truth = truth.flip(2)
        elif truth.ndim == 3:
            x0, y0, x1, y1 = truth.unbind(-1)
            there = x1 > x0
            mirrored = torch.stack([x.shape[3] - x1, y0, x.shape[3] - x0, y1], -1)
            truth = torch.where(there[..., None], mirrored, truth)
    return x, truth


def crop_boxes(boxes: Tensor, top: int, left: int, high: int, wide: int) -> Tensor:
    """Return boxes N x K x 4 cut to a crop; those that keep less than 40 % of their area become absent (-1)."""
    there = boxes[..., 2] > boxes[..., 0]
    moved = boxes - boxes.new_tensor([left, top, left, top])
    cut = torch.minimum(moved.clamp(min=0), boxes.new_tensor([wide, high, wide, high]))
    area, left_over = ((box[..., 2:] - box[..., :2]).clamp(min=0).prod(-1) for box in (boxes, cut))
    kept = there & (left_over >= 0.4 * area)
    return torch.where(kept[..., None], cut, torch.full_like(cut, -1.0))


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the weights in half precision, whole or not at all; integer buffers stay as they are."""
    write_whole(path, weights_of(model, torch.float16))


def load_weights(model: nn.Module, path: Path) -> nn.Module:
    """Return `model` with the weights of a file, in float32 and evaluation mode; InputError when they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in state.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        first = str(error).partition("\n")[0]
        raise InputError(f"weights '{path}'", f"do not fit ({first})", "delete the file to train anew") from error
    return model.eval()
