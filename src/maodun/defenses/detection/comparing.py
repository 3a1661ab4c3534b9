"""Detectors that change the input a little and look at how much the answer moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.defenses.detection.base import Detector, Seen
from maodun.defenses.preprocessing.base import Defense, DefenseSpec
from maodun.defenses.preprocessing.bit_depth import BitDepth
from maodun.defenses.preprocessing.median import Median


def moved(seen: Seen, x: Tensor) -> Tensor:
    """Return (N,) l1 distances between the softmax of the inputs seen and of `x`, in [0, 2]."""
    logits: Tensor = seen.model(x)
    return (seen.logits.softmax(1) - logits.softmax(1)).abs().sum(1)


class FeatureSqueezing(Detector):
    """Refuse where squeezing the input moves the softmax far (Xu, Evans and Qi, NDSS 2018).

    The score is the largest l1 distance between the softmax of the input and of a squeezed one: bit depth reduced to
    `bits`, and a median filter of side `median` (odd; 0 leaves it out, as inputs that are no images need). The paper's
    CIFAR-10 set has a 2 x 2 median and non-local means besides. Costs a forward per squeezer. Breaker: attack
    classifier and score together, with gradient bpda (He et al., WOOT 2017).
    """

    name = "feature_squeezing"
    spec = DefenseSpec(may_reject=True, nfe=2)

    def __init__(
        self,
        bits: int = 5,
        median: int = 3,
        fpr: float = 0.05,
        samples: int = 2000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file)
        self.squeezers = nn.ModuleList([BitDepth(bits), *([Median(median)] if median else [])])
        self.bits, self.median = bits, median

    def measures(self) -> str:
        """Return the squeezers."""
        return f"bits={self.bits}, median={self.median}"

    def score(self, seen: Seen) -> Tensor:
        """Return the largest distance over the squeezers."""
        return torch.stack([moved(seen, squeezer(seen.x)) for squeezer in self.squeezers]).amax(0)


class PurifyCompare(Detector):
    """Refuse where a purifier's output is classified differently from its input (MagNet's divergence detector, 2017).

    `purifier` is the name of any defence that maps inputs to inputs, with its defaults, or such a defence itself; the
    score is the l1 distance of the two softmax outputs, in [0, 2]. Costs the purifier and a forward. Breaker: attack
    both together, through the purifier's own gradient, bpda or eot as it declares.
    """

    name = "purify_compare"
    spec = DefenseSpec(may_reject=True, nfe=1)

    def __init__(
        self,
        purifier: str | Defense = "jpeg",
        fpr: float = 0.05,
        samples: int = 2000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file)
        if isinstance(purifier, str):
            from maodun.defenses.registry import build_defense

            purifier = build_defense(purifier)
        if type(purifier).wrap is not Defense.wrap:
            raise InputError(f"purifier '{purifier.name}'", "does not map inputs to inputs", "take jpeg or a purifier")
        self.purifier = purifier

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` with this detector in front of its answers; the purifier learns which model that is."""
        self.purifier.attach(model)
        return super().wrap(model)

    def measures(self) -> str:
        """Return the purifier with its options."""
        return f"{self.purifier.name}({self.purifier.extra_repr()})"

    def score(self, seen: Seen) -> Tensor:
        """Return the distance."""
        # Noise of its own: the same purifier may stand behind this detector as well.
        with context.part(self.name):
            purified: Tensor = self.purifier(seen.x)
        return moved(seen, purified)
