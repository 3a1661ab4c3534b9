"""Input-gradient regularisation: a loss that changes little with the input, at least to first order."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.defenses.training.objective import Batch


@dataclass(frozen=True)
class InputGradient:
    """CE(f(x), y) + weight * |grad_x CE(f(x), y)|_2^2, mean over the batch ("double backpropagation").

    `weight` at least 0 (default 1), the gradient in units of [0, 1] inputs; `smoothing` is label smoothing. It flattens
    the loss where it stands, which is a little robustness and a lot of masking: attack it with many steps, a margin
    loss and the ladder's query attacks. InputError for a negative weight.

    Source: Drucker and LeCun, 1992; as a defence Ross and Doshi-Velez, "Improving the adversarial robustness and
    interpretability of deep neural networks by regularizing their input gradients", AAAI 2018, eq. 5.
    """

    weight: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise InputError(f"weight {self.weight}", "must be at least 0", "use for example 1.0")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch."""
        x = batch.x.detach().requires_grad_(True)
        each = F.cross_entropy(model(x), batch.y, label_smoothing=self.smoothing, reduction="none")
        (slope,) = torch.autograd.grad(each.sum(), x, create_graph=True)
        return each.mean() + self.weight * slope.flatten(1).pow(2).sum(1).mean()
