"""Did it really succeed: every candidate scored anew, in float32, with draws the search never saw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maodun.core.errors import InputError, nearest
from maodun.core.oracle import Oracle, is_stochastic, randomness
from maodun.core.rejection import doubt, fold, may_reject
from maodun.core.sizing import automatic_batch_size
from maodun.core.streams import Stream
from maodun.core.threat import Threat

RULES = ("single", "mean", "majority", "worst")


@dataclass(frozen=True)
class Rule:
    """How K draws become one answer.

    single: one draw. majority: wrong when at least half of K draws are wrong (the literature's MV.Rob). worst: wrong
    when any of K draws is wrong (Wor.Rob). mean: the class of the mean softmax over K draws. For a deterministic model
    all rules agree and one draw is made. `name` is one of these, `draws` is K >= 1 (1 for single); else InputError.
    """

    name: str = "majority"
    draws: int = 10

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise InputError(f"rule '{self.name}'", "is not a verdict rule", nearest(self.name, list(RULES)))
        if self.draws < 1:
            raise InputError(f"draws {self.draws}", "a verdict needs at least one draw", "give draws >= 1")
        if self.name == "single" and self.draws != 1:
            object.__setattr__(self, "draws", 1)

    def wrong(self, flags: Tensor, probs: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
        """Return (N,) booleans from per-draw success `flags` (N x K) and mean probabilities (N x C)."""
        if self.name == "mean":
            predicted = probs.argmax(1)
            return predicted != y if targets is None else predicted == targets
        if self.name == "worst":
            return flags.any(1)
        return flags.float().mean(1) >= 0.5


@dataclass(frozen=True)
class Interval:
    """A share with its two-sided confidence interval; all in [0, 1]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}] (n={self.n})"


def interval(successes: int, n: int, confidence: float = 0.95, method: str = "exact") -> Interval:
    """Return the share successes / n with its Clopper-Pearson ("exact") or "wilson" interval, from scipy."""
    if n == 0:
        return Interval(float("nan"), 0.0, 1.0, 0)
    # scipy.stats takes a second to import, and most uses of this room never ask for an interval.
    from scipy.stats import binomtest

    bounds = binomtest(successes, n).proportion_ci(confidence, method)
    return Interval(successes / n, float(bounds.low), float(bounds.high), n)


@dataclass(frozen=True)
class Verdict:
    """The judgement on one set of candidates.

    `success` (N,): the adversary won under the rule and inside the threat. `flags` (N x K): per draw. `valid` (N,):
    inside ball and box. `probs` (N x C): mean softmax over the draws. `predictions` (N,): class of `probs`. `doubt`
    (N,): of a model that may reject, the draws' mean doubt (positive: rejected); an input that is rejected is no
    success, and its `probs` are those of `core.rejection.fold`. `robust`: share of samples on which the adversary
    did not win, with its interval.
    """

    success: Tensor
    flags: Tensor
    valid: Tensor
    probs: Tensor
    predictions: Tensor
    rule: Rule
    doubt: Tensor | None = None

    @property
    def robust(self) -> Interval:
        """Robust accuracy (untargeted) or resisted share (targeted) with a 95 % Clopper-Pearson interval."""
        n = self.success.shape[0]
        return interval(n - int(self.success.sum()), n)


def judge(
    model: nn.Module | Oracle,
    x_adv: Tensor,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    *,
    targets: Tensor | None = None,
    rule: Rule | None = None,
    seed: int = 0,
    ids: Tensor | None = None,
    batch_size: int | None = None,
    purpose: str = "verdict",
) -> Verdict:
    """Score candidates `x_adv` (N x ...) against clean `x` in float32 with fresh draws keyed by (seed, id, purpose).

    A candidate outside the ball or the box is not a success; what counts instead is the clean input, which the
    adversary may always send. So a clean mistake is a success at any radius. `rule` defaults to majority of 10.
    """
    rule = rule or Rule()
    oracle = model if isinstance(model, Oracle) else Oracle(model)
    ids = torch.arange(x.shape[0], device=x.device) if ids is None else ids.to(x.device)
    valid = threat.contains(x_adv, x)
    scored = torch.where(valid.reshape(-1, *([1] * (x.ndim - 1))), x_adv, x).clamp(0.0, 1.0)
    logits = fresh_logits(oracle, scored, seed=seed, ids=ids, draws=rule.draws, batch_size=batch_size, purpose=purpose)
    refusal = doubt(logits).mean(1) if may_reject(oracle.model) else None
    logits = logits if refusal is None else fold(logits, y)
    probs = logits.softmax(2).mean(1)
    predicted = logits.argmax(2)
    wide_y = y.unsqueeze(1)
    flags = predicted != wide_y if targets is None else predicted == targets.unsqueeze(1)
    return Verdict(rule.wrong(flags, probs, y, targets), flags, valid, probs, probs.argmax(1), rule, refusal)


def fresh_logits(
    oracle: Oracle,
    x: Tensor,
    *,
    seed: int,
    ids: Tensor,
    draws: int,
    batch_size: int | None = None,
    purpose: str = "verdict",
) -> Tensor:
    """Return N x K x C float32 logits of K fresh draws; K is 1 for a deterministic model."""
    if x.shape[0] == 0:
        return torch.zeros(0, 1, 1, device=x.device)
    model, stream = oracle.model, Stream(seed, purpose)
    with oracle.ready(), torch.no_grad():
        size = batch_size or oracle.batch_size or automatic_batch_size(model, x)
        keyed = is_stochastic(model)
        stochastic = keyed if oracle.stochastic is None else oracle.stochastic
        if oracle.stochastic is None and not keyed:
            stochastic = _differs(model, x, stream, ids)
        count = draws if stochastic else 1
        parts = []
        for start in range(0, x.shape[0], size):
            part, names = x[start : start + size], ids[start : start + size]
            row = []
            for draw in range(count):
                number = torch.full_like(names, draw)
                if stochastic:
                    with randomness(stream, names, number, keyed):
                        row.append(model(part).float())
                else:
                    row.append(model(part).float())
            parts.append(torch.stack(row, dim=1))
    return torch.cat(parts)


def _differs(model: nn.Module, x: Tensor, stream: Stream, ids: Tensor) -> bool:
    answers = []
    for number in (0, 1):
        with randomness(stream.child("probe"), ids[:8], torch.full_like(ids[:8], number), False):
            answers.append(model(x[:8]).float())
    return not torch.allclose(answers[0], answers[1], rtol=1e-3, atol=1e-5, equal_nan=True)


__all__ = ["RULES", "Interval", "Rule", "Verdict", "fresh_logits", "interval", "judge"]
