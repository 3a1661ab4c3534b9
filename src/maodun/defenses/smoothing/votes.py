"""Votes of a classifier under Gaussian noise, counted in micro-batches of draws and samples at once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.modes import conv_weights_channels_last, evaluation_mode
from maodun.core.sizing import automatic_batch_size
from maodun.core.streams import Stream
from maodun.defenses.smoothing.bounds import check_sigma


def count_votes(
    model: nn.Module,
    x: Tensor,
    ids: Tensor,
    *,
    sigma: float,
    draws: int,
    stream: Stream,
    batch_size: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Return N x C int64: how often `model` answers each class over `draws` of x + sigma * n, n standard normal.

    `x` N x ... in [0, 1] with sample `ids` (N,); the noisy input is not clipped, because the theorem wants the noise
    whole. Draw k of a sample is a pure function of (stream, id, k), and so is whatever a stochastic `model` draws
    inside, whatever the batch. `batch_size` counts evaluations (None: chosen). `on_batch` hears (done, all).
    """
    check_sigma(sigma)
    if x.shape[0] == 0:
        return torch.zeros(0, 1, dtype=torch.int64, device=x.device)
    noise, inner = stream.child("noise"), stream.child("model")
    total, counts = x.shape[0] * draws, None
    with evaluation_mode(model), conv_weights_channels_last(model), torch.no_grad():
        size = batch_size or _size(model, x, ids, inner)
        for start in range(0, total, size):
            place = torch.arange(start, min(start + size, total), device=x.device)
            row = torch.div(place, draws, rounding_mode="floor")
            names, number = ids[row], place - row * draws
            noisy = x[row] + sigma * noise.normal(names, tuple(x.shape[1:]), number).to(x)
            with context.draw(inner, names, number):
                logits: Tensor = model(noisy)
            if counts is None:
                counts = torch.zeros(x.shape[0], logits.shape[1], dtype=torch.int64, device=x.device)
            counts.index_put_((row, logits.argmax(1)), torch.ones_like(row), accumulate=True)
            if on_batch is not None:
                on_batch(min(start + size, total), total)
    return torch.zeros(0, 1, dtype=torch.int64) if counts is None else counts


def _size(model: nn.Module, x: Tensor, ids: Tensor, stream: Stream) -> int:
    with context.draw(stream, ids[:1], torch.zeros_like(ids[:1])):
        return automatic_batch_size(model, x)
