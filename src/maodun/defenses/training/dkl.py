"""The divergence of TRADES taken apart (DKL) and put together better (IKL)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from maodun.defenses.training.adversarial import Adversarial


def spread(gap: Tensor, weight: Tensor) -> Tensor:
    """Return (N,) the weighted mean square error of all pairwise logit differences.

    With `gap` (N x C) = clean - adversarial logits and `weight` (N x C) = w summing to one per row, it is
    1/4 sum over j, k of w_j w_k (gap_j - gap_k)^2 = 1/2 Var_w(gap): C terms instead of C^2.
    """
    mean = (weight * gap).sum(1)
    return 0.5 * ((weight * gap.square()).sum(1) - mean.square())


@dataclass(frozen=True)
class DKL(Adversarial):
    """CE(f(x), y) + beta * [ weight * spread(clean - adv; p) + soft * CE(sg p(x), f(x')) ], p = softmax f(x).

    With `weight` = `soft` = 1 the gradient of the bracket is exactly that of KL(p(x) || p(x')): the first part (in
    which w = sg p, and the adversarial logits are held) moves the clean logits, the second the adversarial ones.
    `improved` makes it IKL: the first part reaches the adversarial logits too, and w becomes the mean probability
    vector of the sample's class, a running mean with `momentum`, uniform until a class has been seen.
    Source: Cui et al., "Decoupled Kullback-Leibler divergence loss", NeurIPS 2024 (equations 5 to 7).
    """

    beta: float = 6.0
    weight: float = 1.0
    soft: float = 1.0
    improved: bool = False
    momentum: float = 0.9
    smoothing: float = 0.0
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def of_logits(self, clean: Tensor, adv: Tensor, y: Tensor) -> Tensor:
        """Return the clean cross-entropy and the weighted bracket, then fold the batch into the class means."""
        own = clean.softmax(1).detach()
        if self.improved:
            w, gap = self._class_means(own)[y], clean - adv
        else:
            w, gap = own, clean - adv.detach()
        second = -(own * F.log_softmax(adv, dim=1)).sum(1)
        bracket = self.weight * spread(gap, w) + self.soft * second
        if self.improved:
            self._remember(own, y)
        return F.cross_entropy(clean, y, label_smoothing=self.smoothing) + self.beta * bracket.mean()

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run must know: the class means."""
        return dict(self.memory)

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state returned by `state`, forgetting what was learnt since."""
        self.memory.clear()
        if "means" in state:
            self.memory["means"] = state["means"]

    def _class_means(self, like: Tensor) -> Tensor:
        classes = like.shape[1]
        return self.memory.get("means", like.new_full((classes, classes), 1.0 / classes)).to(like)

    def _remember(self, probabilities: Tensor, y: Tensor) -> None:
        means = self._class_means(probabilities).clone()
        count = torch.bincount(y, minlength=means.shape[0]).to(means)
        total = torch.zeros_like(means).index_add_(0, y, probabilities)
        seen = count > 0
        fresh = total[seen] / count[seen].unsqueeze(1)
        means[seen] = self.momentum * means[seen] + (1 - self.momentum) * fresh
        self.memory["means"] = means
