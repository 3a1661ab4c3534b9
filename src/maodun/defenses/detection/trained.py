"""A detector that has seen attacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.defenses.detection.base import Detector, Seen

_STEPS = 300
_RATE = 0.01
_DECAY = 1e-4


class TrainedDetector(Detector):
    """Refuse what a small network on the classifier's features takes for attacked (after Metzen et al., ICLR 2017).

    The network has one hidden layer of `hidden` units, sees standardised features of `layers` (default: what enters the
    last linear layer) and is trained on clean samples and on what an adversary makes of them: in the arena PGD of ten
    steps in the recipe's first threat. The score is its logit. Metzen et al. branch off a convolutional network
    earlier: a reconstruction. Breaker: an attack it has not seen, such as the joint one (Carlini and Wagner, AISec
    2017).
    """

    name = "trained_detector"
    needs_features = True
    needs_adversary = True
    learnt = ("centre", "scale", "first", "first_bias", "second")
    centre: Tensor
    scale: Tensor
    first: Tensor
    first_bias: Tensor
    second: Tensor

    def __init__(
        self,
        hidden: int = 32,
        layers: str = "",
        fpr: float = 0.05,
        samples: int = 1000,
        validation: str = "train",
        file: str = "",
    ) -> None:
        super().__init__(fpr, samples, validation, file, layers)
        if hidden < 1:
            raise InputError(f"hidden {hidden}", "a network has at least one unit", "give for example 32")
        self.hidden = hidden

    def learn(self, seen: Seen, y: Tensor, adversarial: Seen | None) -> None:  # noqa: ARG002 - the common shape
        """Train the network by full batches of Adam from a start of its own generator."""
        if adversarial is None:
            raise InputError(f"detector '{self.name}'", "learns from attacked samples", "give adversary=...")
        clean, attacked = torch.cat(seen.features, 1).detach(), torch.cat(adversarial.features, 1).detach()
        both, truth = torch.cat([clean, attacked]), torch.cat([clean.new_zeros(len(clean)), clean.new_ones(len(clean))])
        self.keep(centre=both.mean(0), scale=both.std(0).clamp(min=1e-6))
        source = torch.Generator().manual_seed(0)
        width = both.shape[1]
        first = torch.randn(width, self.hidden, generator=source).to(both) * (2.0 / width) ** 0.5
        second = torch.randn(self.hidden, generator=source).to(both) * (1.0 / self.hidden) ** 0.5
        weights = [first, both.new_zeros(self.hidden), second]
        with torch.enable_grad():
            for weight in weights:
                weight.requires_grad_(True)
            optimiser = torch.optim.AdamW(weights, lr=_RATE, weight_decay=_DECAY)
            for _ in range(_STEPS):
                optimiser.zero_grad()
                loss = F.binary_cross_entropy_with_logits(self._logit(both, *weights), truth)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        self.keep(first=weights[0], first_bias=weights[1], second=weights[2])

    def score(self, seen: Seen) -> Tensor:
        """Return the network's logit; no bias at the end, which the threshold makes up for."""
        return self._logit(torch.cat(seen.features, 1), self.first, self.first_bias, self.second)

    def _logit(self, features: Tensor, first: Tensor, bias: Tensor, second: Tensor) -> Tensor:
        hidden = F.relu(((features - self.centre) / self.scale) @ first + bias)
        logit: Tensor = hidden @ second
        return logit
