"""Training against perturbations of word embeddings: random, adversarial and virtual adversarial (Miyato et al.)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.geometry import unit_l2
from maodun.core.losses import divergence
from maodun.core.modes import evaluation_mode
from maodun.core.streams import Stream
from maodun.defenses.training.augment import NoAugmentation
from maodun.defenses.training.objective import Batch, bare

UNLABELLED = -1


@dataclass(frozen=True)
class Trim(NoAugmentation):
    """Cut the padding (0, behind) that no sequence of the batch needs off word numbers N x L."""

    def __call__(self, x: Tensor, rows: Tensor, epoch: int, seed: int) -> Tensor:  # noqa: ARG002 - the others need it
        """Return N x l, l the length of the longest sequence of the batch."""
        return x[:, : int((x != 0).sum(1).max())]


@dataclass(frozen=True)
class EmbeddingObjective:
    """Cross-entropy of the labelled samples: the baseline, and what its subclasses add a perturbed term to.

        L = -1/N_l sum_{labelled} log p(y | s) + weight * perturbed term

    The model is called as model(tokens) and model(tokens, offset), the offset (N x L x D) being added to the N x L x D
    embeddings s, and names D as `width`. Labels of UNLABELLED (-1) mark samples without one. Dropout of both passes is
    keyed by (`seed`, row, step): the two see the same smaller network, and a continued run draws what an undisturbed
    one does. `eps` > 0 is the l2 radius for a whole sequence, in units of the embeddings. InputError otherwise.
    """

    eps: float = 1.0
    weight: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise InputError(f"eps {self.eps}", "is no radius to train with", "give a positive number, as 1.0")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"weight {self.weight}", "is no weight", "give a number >= 0")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the batch, a scalar with a graph to the model's parameters."""
        clean = self.answer(model, batch)
        loss = supervised(clean, batch.y)
        term = self.term(model, batch, clean)
        return loss if term is None else loss + self.weight * term

    def answer(self, model: nn.Module, batch: Batch, offset: Tensor | None = None) -> Tensor:
        """Return the logits at the perturbed embeddings, with the batch's own dropout."""
        with context.draw(Stream(self.seed, "train/dropout"), batch.rows, torch.full_like(batch.rows, batch.step)):
            logits: Tensor = model(batch.x) if offset is None else model(batch.x, offset)
        return logits

    def term(self, model: nn.Module, batch: Batch, clean: Tensor) -> Tensor | None:  # noqa: ARG002 - for subclasses
        """Return the perturbed term, None for none; `clean` (N x C) are the logits without a perturbation."""
        return None

    def direction(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return N x L x D directions of length one over the words of each sequence, uniform, keyed by row and step."""
        shape = (batch.x.shape[1], int(bare(model).width))  # type: ignore[arg-type]
        drawn = Stream(self.seed, f"train/{type(self).__name__}").coarse_normal(batch.rows, shape, batch.step)
        like: Tensor = next(bare(model).parameters())
        # Number 0 is padding: the model reads nothing there.
        return unit_l2(drawn.to(like) * (batch.x != 0).unsqueeze(2))


@dataclass(frozen=True)
class EmbeddingNoise(EmbeddingObjective):
    """The control: cross-entropy at embeddings moved by eps in a random direction instead of the worst one.

    L = CE(s) + weight * CE(s + eps d),  d uniform on the unit sphere
    """

    def term(self, model: nn.Module, batch: Batch, clean: Tensor) -> Tensor:  # noqa: ARG002 - the common shape
        """Return the cross-entropy at the random perturbation."""
        return supervised(self.answer(model, batch, self.eps * self.direction(model, batch)), batch.y)


@dataclass(frozen=True)
class EmbeddingAdversarial(EmbeddingObjective):
    """Adversarial training on embeddings, its worst case linearised: one backward pass finds the perturbation.

        r = -eps g / ||g||_2,  g = grad_s log p(y | s; theta^),  L = CE(s) + weight * CE(s + r)

    theta^ are the weights as they are, in evaluation mode and without a gradient to them; the norm is over the whole
    sequence. Unlabelled samples add nothing. Miyato, Dai and Goodfellow, "Adversarial training methods for
    semi-supervised text classification", ICLR 2017, equations 2 to 4.
    """

    def term(self, model: nn.Module, batch: Batch, clean: Tensor) -> Tensor:  # noqa: ARG002 - the common shape
        """Return the cross-entropy at the adversarial perturbation."""
        return supervised(self.answer(model, batch, self.craft(model, batch)), batch.y)

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return r, N x L x D without a graph."""
        own = bare(model)
        with evaluation_mode(own):
            zero = torch.zeros_like(self.direction(model, batch))
            gradient = _slope(lambda r: F.cross_entropy(own(batch.x, r), batch.y.clamp(min=0), reduction="sum"), zero)
        return self.eps * unit_l2(gradient)


@dataclass(frozen=True)
class VirtualAdversarial(EmbeddingObjective):
    """Virtual adversarial training: the answer must not move, whatever it is, so no label is needed.

        d <- g / ||g||_2,  g = grad_r KL(p(. | s; theta^) || p(. | s + r; theta^)) at r = xi d,  `iterations` times
        L = CE(s) + weight * 1/N sum_{all} KL(p(. | s; theta^) || p(. | s + eps d; theta))

    from a random unit d: power iteration with finite difference `xi` for the direction of largest curvature. The target
    p(. | s; theta^) carries no gradient. All samples count, labelled or not. Miyato et al., ICLR 2017, equations 5 and
    6, and IEEE TPAMI 2018, algorithm 1. InputError for xi <= 0 or fewer than one iteration.
    """

    xi: float = 0.1
    iterations: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.xi) and self.xi > 0):
            raise InputError(f"xi {self.xi}", "is no finite difference", "give a small positive number, as 0.1")
        if self.iterations < 1:
            raise InputError(f"iterations {self.iterations}", "find no direction", "give 1 or more")

    def term(self, model: nn.Module, batch: Batch, clean: Tensor) -> Tensor:
        """Return the mean divergence at the virtual adversarial perturbation."""
        moved = self.answer(model, batch, self.craft(model, batch))
        return divergence(moved, clean.detach()).mean()

    def craft(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return eps d, N x L x D without a graph."""
        own, direction = bare(model), self.direction(model, batch)
        with evaluation_mode(own):
            target: Tensor = own(batch.x).detach()
            for _ in range(self.iterations):
                gradient = _slope(lambda r: divergence(own(batch.x, r), target).sum(), self.xi * direction)
                direction = unit_l2(gradient)
        return self.eps * direction


def supervised(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy over the samples with a label; zero when there are none."""
    total = F.cross_entropy(logits, y, ignore_index=UNLABELLED, reduction="sum")
    return total / (y != UNLABELLED).sum().clamp(min=1)


def _slope(function: Any, point: Tensor) -> Tensor:
    with torch.enable_grad():
        place = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(function(place), place)
    return gradient.detach()
