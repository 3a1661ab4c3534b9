"""Randomised smoothing's two promises: a prediction that is probably the smoothed one, and a radius around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.smoothing.bounds import check_confidence, lower_bound, radius, surely_ahead
from maodun.defenses.smoothing.votes import count_votes

ABSTAIN = -1
"""The prediction of a smoothed classifier that will not say."""


@dataclass(frozen=True)
class Certificate:
    """What is certain about each sample, with probability 1 - alpha per sample.

    `prediction` (N,) int64 is the smoothed classifier's class, ABSTAIN where the bound does not pass one half.
    `radius` (N,) float64: no l2 change smaller than this changes it (0 where it abstains). `share` (N,) float64 is the
    lower bound on that class's probability under noise; `votes` (N,) int64 were counted for it out of `draws`.
    """

    prediction: Tensor
    radius: Tensor
    share: Tensor
    votes: Tensor
    draws: int
    sigma: float
    alpha: float


def certify(
    model: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    draws: int = 10_000,
    guesses: int = 100,
    alpha: float = 0.001,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Certificate:
    """Certify the classifier argmax_c P(model(x + n) = c), n ~ N(0, sigma^2), around every row of `x` (N x ...).

    `guesses` draws choose the class, `draws` others estimate its probability, so that the bound is not spoilt by
    having looked. With fewer draws the radius can only be smaller: at most sigma * PhiInv(alpha ** (1 / draws)). A
    `model` that draws noise itself (a purifier) is certified as the randomised function it is. The promise is about
    l2, and about the smoothed classifier, not about `model` alone. InputError for sigma, alpha or draws that cannot be.
    Source: Cohen, Rosenfeld and Kolter, ICML 2019, CERTIFY.
    """
    check_confidence(alpha)
    _check_draws(draws=draws, guesses=guesses)
    ids = torch.arange(x.shape[0], device=x.device) if ids is None else ids.to(x.device)
    all_draws = x.shape[0] * (draws + guesses)

    def told(before: int) -> Callable[[int, int], None] | None:
        return None if on_batch is None else (lambda done, _: on_batch(before + done, all_draws))

    def counted(purpose: str, times: int, before: int) -> Tensor:
        return count_votes(
            model, x, ids, sigma=sigma, draws=times, stream=Stream(seed, f"smoothing/{purpose}"),
            batch_size=batch_size, on_batch=told(before),
        )  # fmt: skip

    guess = counted("select", guesses, 0).argmax(1)
    votes = counted("estimate", draws, x.shape[0] * guesses).gather(1, guess[:, None])[:, 0]
    share = lower_bound(votes.cpu().numpy(), draws, alpha)
    sure = torch.from_numpy(share > 0.5).to(x.device)
    return Certificate(
        prediction=torch.where(sure, guess, torch.full_like(guess, ABSTAIN)),
        radius=torch.from_numpy(radius(share, sigma)).to(x.device),
        share=torch.from_numpy(np.asarray(share)).to(x.device),
        votes=votes,
        draws=draws,
        sigma=sigma,
        alpha=alpha,
    )


def predict(
    model: nn.Module,
    x: Tensor,
    *,
    sigma: float,
    draws: int = 1000,
    alpha: float = 0.001,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Return the smoothed classifier's class for every row of `x` (N x ...), ABSTAIN where the votes do not settle it.

    A class that is returned is another than the smoothed classifier's with probability at most `alpha`: the leading
    two classes' votes are tested against a tie. Source: Cohen et al., ICML 2019, PREDICT.
    """
    check_confidence(alpha)
    _check_draws(draws=draws)
    ids = torch.arange(x.shape[0], device=x.device) if ids is None else ids.to(x.device)
    stream = Stream(seed, "smoothing/predict")
    counts = count_votes(model, x, ids, sigma=sigma, draws=draws, stream=stream, batch_size=batch_size)
    best = counts.topk(min(2, counts.shape[1]), dim=1)
    first, last = best.values[:, 0].cpu().numpy(), best.values[:, -1].cpu().numpy()
    sure = surely_ahead(first, last if counts.shape[1] > 1 else np.zeros_like(first), alpha)
    leader = best.indices[:, 0]
    return torch.where(torch.from_numpy(sure).to(x.device), leader, torch.full_like(leader, ABSTAIN))


def _check_draws(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise InputError(f"{name} {value}", "certification counts at least one draw", "use for example 1000")
