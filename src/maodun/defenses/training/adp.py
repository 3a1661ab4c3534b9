"""Adaptive diversity promoting: the members of an ensemble are trained together, and rewarded for disagreeing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.ensemble import member_answers
from maodun.core.errors import InputError
from maodun.defenses.training.objective import Batch

# The published code adds this much to the diagonal before the determinant, which may be zero.
_OFFSET = 1e-6


@dataclass(frozen=True)
class ADP:
    """sum_k CE(F_k, y) - alpha H(F) - beta log ED, mean over the batch, for an ensemble of K members (core.Ensemble).

    F_k are the members' probabilities (N x C) and F their mean; H(F) = -sum_c F^c log F^c. With m_k the vector F_k
    without the entry of the true class y, scaled to length one, and M = (m_1 ... m_K), the ensemble diversity is
    ED = det(M^T M + 1e-6 I). `alpha` (default 2) and `beta` (default 0.5) are the published weights, at least 0.
    InputError for negative weights, a model that is no ensemble, and (at the first call) fewer than K wrong classes,
    whose determinant is zero whatever the members say.

    Source: Pang, Xu, Du, Chen and Zhu, "Improving adversarial robustness via promoting ensemble diversity", ICML 2019,
    eqs. 3 to 6; broken by Tramer et al., NeurIPS 2020.
    """

    alpha: float = 2.0
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.alpha < 0 or self.beta < 0:
            raise InputError(f"weights {self.alpha}, {self.beta}", "must be at least 0", "use alpha=2.0, beta=0.5")

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss of the batch."""
        with member_answers(model) as answers:
            model(batch.x)
        logits = torch.stack(answers, dim=1)
        members, classes = logits.shape[1:]
        if members > classes - 1:
            reason = f"{members} members cannot all differ over {classes - 1} wrong classes"
            raise InputError("objective 'adp'", reason, f"train at most {classes - 1} members")
        entropies = F.cross_entropy(logits.flatten(0, 1), batch.y.repeat_interleave(members)) * members
        shares = logits.log_softmax(2).exp()
        reward: Tensor = self.alpha * entropy(shares) + self.beta * log_diversity(shares, batch.y)
        loss: Tensor = entropies - reward.mean()
        return loss


def entropy(shares: Tensor) -> Tensor:
    """Return the entropy of the members' mean probabilities, (N,), in nats; `shares` are N x K x C."""
    each: Tensor = torch.special.entr(shares.mean(1))
    return each.sum(1)


def log_diversity(shares: Tensor, y: Tensor) -> Tensor:
    """Return log det(M^T M + 1e-6 I) of the members' probabilities N x K x C over the classes that are not y, (N,)."""
    n, members, classes = shares.shape
    wrong = F.one_hot(y, classes).bool().logical_not().unsqueeze(1).expand_as(shares)
    rest = shares[wrong].reshape(n, members, classes - 1)
    # Far below the smallest sum of wrong probabilities that means anything: a sure member has no direction.
    unit = rest / rest.pow(2).sum(2, keepdim=True).clamp_min(1e-24).sqrt()
    gram = unit @ unit.transpose(1, 2) + _OFFSET * torch.eye(members, dtype=shares.dtype, device=shares.device)
    diversity: Tensor = torch.linalg.slogdet(gram)[1]
    return diversity
