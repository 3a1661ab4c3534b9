"""Gradients made for purifiers: one that gives up on hopeless draws, one that also leads the purifier astray."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.core.errors import InputError
from maodun.core.estimators import BPDA, Estimate, Exact, Heads, Port, Surrogate, _value_and_grads

Direction = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Selective:
    """The gradient that is best for those of `draws` draws that it can hope to turn (DiffHammer; NeurIPS 2024).

    Averaging draws whose gradients contradict each other helps against none of them. Here each draw i has a loss l_i
    (above 0: fooled) and a gradient g_i; along a direction d of the ball of radius `reach` its loss is expected at
    l_i + reach <d, g_i>. From the best draw's direction, `rounds` times: weights sigmoid(`sharpness` times the expected
    loss), then the steepest direction of the weighted mean. No round lowers the sum of the softplus of the expected
    losses. `steepest` (B x ... to unit steps) is the threat's. Reconstruction: the published code's rounds do not
    change its result; the sum of ELUs there only chooses the start. Every draw's gradient is taken through the whole
    model by `inner`, so nothing is grafted. Losses must be margins; InputError for fewer than two draws.
    """

    steepest: Direction
    reach: float
    inner: Exact | BPDA | Surrogate = field(default_factory=Exact)
    draws: int = 10
    rounds: int = 5
    sharpness: float = 5.0
    needs: str = field(default="gradient", init=False)

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise InputError(f"draws {self.draws}", "there is nothing to select from", "use 10")

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return mean logits, mean values and, for the first head, the selected gradient; others are means."""
        rows, done = x.shape[0], 0
        parts: list[list[Tensor]] = []
        with self.inner.around(port.model):
            while done < self.draws:
                ahead = min(self.draws - done, max(1, port.batch_size // rows))
                wide = index.repeat_interleave(ahead)
                found = _value_and_grads(port, x.repeat_interleave(ahead, 0), wide, heads, ahead, self.inner.members)
                flat = (found[0], found[1], *found[2])
                parts.append([each.reshape(rows, ahead, *each.shape[1:]) for each in flat])
                done += ahead
        logits, values, *grads = [torch.cat(each, dim=1) for each in zip(*parts, strict=True)]
        chosen = self.select(values[:, :, 0], grads[0])
        return logits.mean(1), values.mean(1), [chosen, *(grad.mean(1) for grad in grads[1:])]

    def select(self, losses: Tensor, grads: Tensor) -> Tensor:
        """Return B x ... from losses (B x D) and gradients (B x D x ...) of D draws."""
        best = self._start(losses, grads)
        for _ in range(self.rounds):
            weights = torch.sigmoid(self.sharpness * self.expected(losses, grads, best))
            weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-12)
            best = (weights.reshape(*weights.shape, *([1] * (grads.ndim - 2))) * grads).sum(1)
        return best

    def expected(self, losses: Tensor, grads: Tensor, towards: Tensor) -> Tensor:
        """Return the losses of the draws (B x D) after the steepest step along `towards` (B x ...), to first order."""
        step = self.reach * self.steepest(towards).flatten(1)
        return losses + torch.einsum("bp,bdp->bd", step, grads.flatten(2))

    def objective(self, losses: Tensor, grads: Tensor, towards: Tensor) -> Tensor:
        """Return what no round lowers (B,): the sum over the draws of softplus(sharpness * expected loss)."""
        return F.softplus(self.sharpness * self.expected(losses, grads, towards)).sum(1)

    def _start(self, losses: Tensor, grads: Tensor) -> Tensor:
        scores = [F.elu(self.expected(losses, grads, grads[:, a])).sum(1) for a in range(grads.shape[1])]
        rows = torch.arange(grads.shape[0], device=grads.device)
        return grads[rows, torch.stack(scores).argmax(0)]


@dataclass(frozen=True)
class Deviating:
    """The mean gradient over `draws` of the loss plus `weight` times how far a purifier strays (DiffAttack).

    A module offers its deviations as a context manager `observed()` that collects one (B,) tensor per call; without any
    this is EOT. Values and gradients are those of the sum. InputError for no draw.
    """

    weight: float = 1.0
    draws: int = 10
    needs: str = field(default="gradient", init=False)

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise InputError(f"draws {self.draws}", "there has to be at least one", "use 10")

    def estimate(self, port: Port, x: Tensor, index: Tensor, heads: Heads) -> Estimate:
        """Return mean logits, mean values and mean gradients of the loss with the deviation."""
        rows, done = x.shape[0], 0
        sums: list[Tensor] = []
        with ExitStack() as stack:
            offers = [getattr(module, "observed", None) for module in port.model.modules()]
            collected = [stack.enter_context(offer()) for offer in offers if offer is not None]

            def astray(logits: Tensor, at: Tensor) -> Tensor:
                strayed = [torch.stack(each).mean(0) for each in collected if each]
                for each in collected:
                    each.clear()
                extra = sum(strayed, start=torch.zeros_like(logits[:, 0]))
                return heads(logits, at) + self.weight * extra.unsqueeze(1)

            while done < self.draws:
                ahead = min(self.draws - done, max(1, port.batch_size // rows))
                wide = index.repeat_interleave(ahead)
                logits, values, grads = _value_and_grads(port, x.repeat_interleave(ahead, 0), wide, astray, ahead)
                found = [each.reshape(rows, ahead, *each.shape[1:]).sum(1) for each in (logits, values, *grads)]
                sums = found if not sums else [old + new for old, new in zip(sums, found, strict=True)]
                done += ahead
        logits, values, *grads = [each / self.draws for each in sums]
        return logits, values, grads
