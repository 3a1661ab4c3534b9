"""Gradient masking: ways to hide from an attack without resisting it, and the way to see through each."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maodun.core.errors import InputError
from maodun.defenses.preprocessing.base import Defense

_RELUS = frozenset({F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_})


class Mask(Defense):
    """A defence that exists to be seen through; `mitigation` says how, in a sentence.

    Its BPDA partner is what the adversary, who knows the mask, takes instead of it. `lifted` means that the mask
    changes no decision, or hardly one, so that the partner's value may stand for its own as well.
    """

    lifted: ClassVar[bool] = False
    mitigation: ClassVar[str] = ""


class OutputMask(Mask):
    """A mask on the logits: `forward` maps N x C logits to N x C logits. Lifting it leaves the bare logits."""

    lifted = True

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the classifier with its logits masked."""
        return nn.Sequential(model, self)


class ActivationMask(Mask):
    """A mask in place of every ReLU of the classifier: `forward` maps activations of any shape to the same shape.

    The classifier itself is not changed: its ReLUs, modules or functions, are exchanged for the duration of a call.
    `place` counts them within a call from 0. InputError, at the first call, for a classifier without any.
    """

    innermost = True

    def activation(self, x: Tensor, place: int) -> Tensor:
        """Return the activations of ReLU number `place` for its inputs `x` (N x ...)."""
        raise NotImplementedError("a subclass replaces ReLUs by something")

    def forward(self, x: Tensor, place: int = 0) -> Tensor:
        """Return what stands for the ReLU of `x`."""
        return self.activation(x, place)

    def bpda_partner(self, x: Tensor) -> Tensor:
        """Return the ReLU."""
        return F.relu(x)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the classifier with its ReLUs exchanged."""
        return Inside(model, self)


class Inside(nn.Module):
    """A classifier whose ReLUs are another function, N x ... in [0, 1] to logits."""

    def __init__(self, model: nn.Module, mask: ActivationMask) -> None:
        super().__init__()
        self.model, self.mask = model, mask

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of the changed classifier."""
        with _Exchange(self.mask) as exchange:
            logits: Tensor = self.model(x)
        if not exchange.place:
            reason = "the classifier has no ReLU to put it in the place of"
            raise InputError(f"defence '{self.mask.name}'", reason, "use a mask on inputs or logits")
        return logits


class _Exchange(TorchFunctionMode):
    """Calls a mask where a ReLU is called, for as long as the context lasts, and counts the places."""

    def __init__(self, mask: ActivationMask) -> None:
        super().__init__()
        self.mask, self.place = mask, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RELUS:
            return func(*args, **(kwargs or {}))
        self.place += 1
        return self.mask(args[0] if args else (kwargs or {})["input"], self.place - 1)
