"""What a rejecting classifier is worth: how often it answers, how rightly, and how well its score tells attacks."""

from __future__ import annotations

import torch
from torch import Tensor


def auroc(clean: Tensor, attacked: Tensor) -> float:
    """Return the chance that an attacked input scores above a clean one, ties counted half; NaN without either.

    `clean` (N,) and `attacked` (M,) are scores. The area under the ROC curve, as Mann and Whitney's U over N M.
    """
    if clean.numel() == 0 or attacked.numel() == 0:
        return float("nan")
    order = clean.double().sort().values
    below = torch.searchsorted(order, attacked.double().contiguous())
    up_to = torch.searchsorted(order, attacked.double().contiguous(), right=True)
    return float((below + up_to).double().mean() / (2 * clean.numel()))


def risk_coverage(score: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return coverages (N,) and the risks at them: the share of mistakes among the k least doubted inputs, k = 1..N.

    `score` (N,) is higher for more doubt, `right` (N,) says whether the answer is right. El-Yaniv and Wiener (JMLR
    2010). Inputs of equal score keep their order.
    """
    wrong = (~right[score.argsort(stable=True)]).double()
    answered = torch.arange(1, len(wrong) + 1, dtype=torch.float64, device=wrong.device)
    return answered / len(wrong), wrong.cumsum(0) / answered


def area_under_risk_coverage(score: Tensor, right: Tensor) -> float:
    """Return the mean risk over all coverages (AURC); 0 for a model that is always right."""
    return float(risk_coverage(score, right)[1].mean())


__all__ = ["area_under_risk_coverage", "auroc", "risk_coverage"]
