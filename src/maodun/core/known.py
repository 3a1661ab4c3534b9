"""An adversary who knows the seed: the draw that a stochastic model will make is no secret to the search."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.streams import Stream


class KnownDraw(nn.Module):
    """A stochastic model whose every call makes the verdict's first draw under `seed`: a fixed function per sample.

    Separates what randomness gives a defence from what the rest of it gives: with the noise known, nothing is left to
    average over, and what still stands is not owed to chance. It must be called inside a draw, as the Oracle does.
    """

    def __init__(self, model: nn.Module, seed: int, purpose: str = "verdict") -> None:
        super().__init__()
        self.model, self.stream = model, Stream(seed, purpose)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of `x` in the verdict's first draw, keyed by the ids of the call that is under way."""
        under_way = context.current()
        ids = torch.arange(x.shape[0], device=x.device) if under_way is None else under_way.ids
        with context.draw(self.stream, ids, torch.zeros_like(ids)):
            logits: Tensor = self.model(x)
        return logits
