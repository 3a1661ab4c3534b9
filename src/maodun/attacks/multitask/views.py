"""Which relations to keep, second answer: those between views of one image (instance discrimination, no labels).

A reconstruction's alternative: the neighbours of an image are its own shifted, mirrored, recoloured and partly hidden
copies, not the images with alike texture. Pixels are never resampled, so that fine detail stays part of the relation.
The loss is InfoNCE over both views of a batch (van den Oord et al., 2018; Chen et al., ICML 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.attacks.multitask.module import PATCH, RelationModule, settle
from maodun.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ViewsFit:
    """Steps of AdamW on batches of unlabelled patches (two views each), its rate, and the temperature of InfoNCE.

    The rate rises for `warmup` steps and falls to zero along half a cosine; `shift` and `hole` are those of `view`.
    """

    steps: int = 350
    batch_size: int = 192
    rate: float = 3e-3
    warmup: int = 50
    temperature: float = 0.2
    shift: int = 10
    hole: int = 11

    def __post_init__(self) -> None:
        if min(self.steps, self.warmup) < 1 or self.batch_size < 2 or not self.temperature > 0:
            reason = "needs steps and warmup >= 1, batches of 2 or more and a temperature above 0"
            raise InputError("view training", reason, "correct the settings")


def view(x: Tensor, generator: torch.Generator, shift: int = 10, hole: int = 11) -> Tensor:
    """Return one random view of each of N x 3 x H x W images in [0, 1], same shape and range.

    A shift by up to `shift` whole pixels (the border mirrored), a mirror image for every second one, saturation times 0
    to 1.6 (none for every fifth), contrast times 0.6 to 1.4, brightness +- 0.2, and a square of `hole` pixels that has
    the image's mean.
    """
    n, device = x.shape[0], x.device

    def uniform() -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=generator).to(device)

    height, width = x.shape[2:]
    padded = F.pad(x, (shift,) * 4, mode="reflect")
    offsets = torch.randint(0, 2 * shift + 1, (2, n, 1, 1, 1), generator=generator).to(device)
    rows = offsets[0] + torch.arange(height, device=device).reshape(-1, 1)
    columns = offsets[1] + torch.arange(width, device=device)
    every = torch.arange(n, device=device).reshape(-1, 1, 1, 1)
    moved = padded[every, torch.arange(x.shape[1], device=device).reshape(-1, 1, 1), rows, columns]
    moved = torch.where(uniform() < 0.5, moved.flip(3), moved)
    grey = moved.mean(1, keepdim=True)
    saturation = 1.6 * uniform() * (uniform() >= 0.2)
    moved = grey + (moved - grey) * saturation
    mean = moved.mean((1, 2, 3), keepdim=True)
    moved = ((moved - mean) * (0.6 + 0.8 * uniform()) + mean + 0.4 * (uniform() - 0.5)).clamp(0.0, 1.0)
    top, left = (uniform() * side for side in (height, width))
    near_row = (torch.arange(height, device=device).reshape(-1, 1) - top).abs() <= hole / 2
    near_column = (torch.arange(width, device=device) - left).abs() <= hole / 2
    return torch.where(near_row & near_column, moved.mean((2, 3), keepdim=True), moved)


def view_loss(z: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE of codes 2B x m of length one, where row i and row i + B are views of one image."""
    rows = z.shape[0]
    similar = (z @ z.T / temperature).masked_fill(torch.eye(rows, dtype=torch.bool, device=z.device), -math.inf)
    partner = (torch.arange(rows, device=z.device) + rows // 2) % rows
    return F.cross_entropy(similar, partner)


def fit_views(
    module: RelationModule,
    patches: Tensor,
    settings: ViewsFit,
    *,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> RelationModule:
    """Train the encoder of a "views" module in place on patches N x 3 x 32 x 32 in [0, 1]; fill the bank; return it.

    `on_step` gets the step and the loss, every 25 steps. InputError for another kind of module, or other patches.
    """
    if module.kind != "views":
        raise InputError(f"relation module '{module.kind}'", "does not learn from views", "build one of kind 'views'")
    if tuple(patches.shape[1:]) != (3, PATCH, PATCH):
        raise InputError("patches", f"are of shape {tuple(patches.shape[1:])}", f"give 3 x {PATCH} x {PATCH}")
    generator = torch.Generator().manual_seed(seed)
    # A fifth cheaper on a CPU, and the same numbers.
    module.encoder.to(memory_format=torch.channels_last).requires_grad_(True).train()  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(module.encoder.parameters(), lr=settings.rate, weight_decay=1e-4)
    for step in range(settings.steps):
        for group in optimiser.param_groups:
            rise, fall = min(1.0, (step + 1) / settings.warmup), 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))
            group["lr"] = settings.rate * rise * fall
        x = patches[torch.randint(patches.shape[0], (settings.batch_size,), generator=generator)]
        both = torch.cat([view(x, generator, settings.shift, settings.hole) for _ in range(2)])
        loss = view_loss(module.codes(both).flatten(1), settings.temperature)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if on_step is not None and (step + 1) % 25 == 0:
            on_step(step + 1, float(loss.detach()))
    module.encoder.eval().requires_grad_(False)
    settle(module, patches)
    return module
