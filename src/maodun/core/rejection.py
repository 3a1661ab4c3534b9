"""Models that may refuse to answer: one logit more than classes, the last, which wins exactly on rejected inputs.

An attack on such a model wins only with an input that is accepted *and* wrong. To be rejected is for the adversary as
bad as to be classified rightly, so `fold` gives the label the larger of its own logit and that of rejection: the
result is N x C logits on which every loss, decision and verdict means what it always means, and every attack is
an attack on classifier and detector at once (the C + 1 class construction of Carlini and Wagner, AISec 2017).
"""

from __future__ import annotations

from torch import Tensor, cat, nn


def may_reject(model: nn.Module) -> bool:
    """Tell whether any submodule declares `may_reject = True`: the last of the model's logits stands for rejection."""
    return any(getattr(module, "may_reject", False) is True for module in model.modules())


def join(logits: Tensor, doubt: Tensor) -> Tensor:
    """Return N x (C + 1) logits from N x C ones and (N,) `doubt`, which is positive where the input is rejected."""
    return cat([logits, (logits.amax(1) + doubt).unsqueeze(1)], dim=1)


def doubt(answer: Tensor) -> Tensor:
    """Return how far the last of ... x (C + 1) logits is above the best class; positive where rejected."""
    return answer[..., -1] - answer[..., :-1].amax(-1)


def fold(answer: Tensor, y: Tensor) -> Tensor:
    """Return ... x C logits out of ... x (C + 1): the label's is the larger of its own and that of rejection.

    `y` are labels (N,) of the first axis. The largest is another than the label's only where the input is accepted and
    answered wrongly.
    """
    logits, refusal = answer[..., :-1], answer[..., -1:]
    place = y.reshape(-1, *([1] * (answer.ndim - 1))).expand(*answer.shape[:-1], 1)
    return logits.scatter(-1, place, logits.gather(-1, place).maximum(refusal))


__all__ = ["doubt", "fold", "join", "may_reject"]
