"""Gradient masking as a defence: it exists to be seen through, and to see whether an evaluation does.

On the logits: LogitScale, QuantisedLogits, SquashedLogits · in place of the ReLUs: KWTA, NoiseLayers, Saturating · on
the derivative alone: TruncatedGradient.
"""

from __future__ import annotations

from maodun.defenses.masking.base import ActivationMask, Mask, OutputMask
from maodun.defenses.masking.masks import (
    KWTA,
    LogitScale,
    NoiseLayers,
    QuantisedLogits,
    Saturating,
    SquashedLogits,
    TruncatedGradient,
)

MASKS: tuple[type[Mask], ...] = (
    NoiseLayers,
    KWTA,
    Saturating,
    TruncatedGradient,
    QuantisedLogits,
    SquashedLogits,
    LogitScale,
)

__all__ = [
    "KWTA",
    "MASKS",
    "ActivationMask",
    "LogitScale",
    "Mask",
    "NoiseLayers",
    "OutputMask",
    "QuantisedLogits",
    "Saturating",
    "SquashedLogits",
    "TruncatedGradient",
]
