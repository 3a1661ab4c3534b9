"""Fewer grey levels (feature squeezing; Xu, Evans and Qi, 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense, DefenseSpec


class BitDepth(Defense):
    """Round every value to the nearest of 2 ** bits levels between 0 and 1; any shape.

    `bits` is 1 to 8 (default 3). Its derivative is zero almost everywhere, so a plain gradient attack goes blind; the
    BPDA partner is the identity, which is never further away than half a level.
    """

    name = "bit_depth"
    spec = DefenseSpec(differentiable=False)

    def __init__(self, bits: int = 3) -> None:
        super().__init__()
        if not 1 <= bits <= 8:
            raise InputError(f"bits {bits}", "a picture has 1 to 8 bits per value", "use for example 3")
        self.bits = bits
        self.levels = 2**bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the squeezed inputs."""
        squeezed: Tensor = torch.round(x * self.levels) / self.levels
        return squeezed

    def extra_repr(self) -> str:
        """Return what rebuilds it."""
        return f"bits={self.bits}"
