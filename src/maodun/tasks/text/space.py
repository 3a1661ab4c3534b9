"""A text classifier seen from its embeddings, so that every attack on [0, 1] inputs can be run on it unchanged."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.tasks.text.data import PAD
from maodun.tasks.text.nets import TextNet


class EmbeddingSpace(nn.Module):
    """Maps points u in [0, 1] (N x L x (D + 1)) to the logits of `net` at embeddings (u - 1/2) span.

    The last column says whether a word stands there (1) or padding (0); it is read as a yes or no and has no gradient,
    and what is added to padding changes nothing. One span for all dimensions keeps balls round: it is
    2 (max |embedding| + `reach`), so no l2 ball of a radius up to `reach` around a text meets the box. `reach` > 0 in
    units of the embeddings, else InputError.
    """

    def __init__(self, net: TextNet, reach: float) -> None:
        super().__init__()
        if not (math.isfinite(reach) and reach > 0):
            raise InputError(f"eps {reach}", "is no radius to attack with", "give a positive number, as 1.0")
        self.net, self.reach = net, reach
        with torch.no_grad():
            self.span = 2.0 * (float(net.embedding.table().abs().max()) + reach)

    def radius(self, eps: float) -> float:
        """Return the l2 radius in u that is `eps` in embeddings; InputError unless 0 < eps <= reach."""
        if not 0 < eps <= self.reach * (1 + 1e-9):
            raise InputError(f"eps {eps}", f"is not within 0 and the reach {self.reach}", "give a larger reach")
        return eps / self.span

    def enter(self, tokens: Tensor) -> Tensor:
        """Return the points (N x L x (D + 1)) of word numbers N x L."""
        with torch.no_grad():
            points = 0.5 + self.net.embedding(tokens) / self.span
        return torch.cat([points, (tokens != PAD).unsqueeze(2).to(points.dtype)], dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits N x C."""
        return self.net.of_embeddings((x[..., :-1] - 0.5) * self.span, x[..., -1:] > 0.5)
