"""What an attack sees of one run: its samples, its goal, and a model that counts and remembers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maodun.core.ensemble import members_of
from maodun.core.estimators import Estimator, Heads
from maodun.core.geometry import per_sample
from maodun.core.losses import DEPARTURES, LossFunction, get_loss, margin
from maodun.core.oracle import Session
from maodun.core.rejection import doubt, fold
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

CONFIRM_DRAWS = 10
# A search rests on a stochastic sample only when nearly all fresh draws are fooled: at six of ten, a verdict by the
# majority of ten others would often find the sample standing.
SURE = 0.9
# Logits of one input differ between batch sizes, memory layouts and machines by about this share of the largest one. A
# nearest candidate whose lead is smaller may stand on either side when it is scored anew.
ROUNDING = {"float32": 1e-5, "bf16": 1e-2}


class Ledger:
    """The best candidate of every sample of a run, noted at every model call so that no success stays silent.

    `best` starts as the clean input and only ever becomes an input that fooled the model; `distance` is its distance
    in the threat's norm (infinite until then); `share` is the share of fresh draws it fooled (1 for a deterministic
    model). Its status is `found` when it fools most draws; the search goes on until it fools nearly all. A
    sample is `finished` when `enough` says that its candidate needs no improvement.
    """

    def __init__(
        self, session: Session, x: Tensor, threat: Threat, minimum: bool, enough: float | None, stop: bool
    ) -> None:
        n, device = x.shape[0], x.device
        self.session, self.threat, self.minimum, self.enough, self.stop = session, threat, minimum, enough, stop
        self.best = x.clone()
        self.distance = torch.full((n,), torch.inf, device=device)
        self.share = torch.zeros(n, device=device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=device)
        self.status = torch.full((n,), int(Status.exhausted_steps), dtype=torch.uint8, device=device)
        self.flat = torch.ones(n, dtype=torch.bool, device=device)
        self.used_gradient = False
        self._any_flat = True

    def note(self, problem: Problem, x: Tensor, logits: Tensor) -> None:
        """Look at one evaluation: keep what fools the model, mark rows whose logits are not finite."""
        fooled = problem.is_adversarial(logits)
        # One sum tells that all is well; only when it does not are the rows looked at one by one.
        if not math.isfinite(float(logits.sum())):
            bad = ~torch.isfinite(logits).all(1)
            fooled &= ~bad
            rows = problem.rows[bad]
            self.finished[rows] = True
            self.status[rows] = int(Status.non_finite)
        self.keep(problem, x, fooled, logits)

    def keep(self, problem: Problem, x: Tensor, fooled: Tensor, logits: Tensor | None = None) -> None:
        """Keep the points `x` of the rows marked in `fooled` where they are the best so far.

        Of a nearest candidate the `logits`, where there are any, must say so clearly enough to survive another scoring.
        """
        hit = fooled.nonzero().squeeze(1)
        if hit.numel() and self.minimum and logits is not None:
            hit = hit[self._clearly(problem, hit, logits[hit])]
        if hit.numel() and not self.minimum:
            # Inside a ball one certain success is as good as another.
            hit = hit[self.share[problem.rows[hit]] < 1.0]
        if hit.numel():
            self._keep(problem, hit, x[hit])

    def _clearly(self, problem: Problem, hit: Tensor, logits: Tensor) -> Tensor:
        """Return booleans: the lead is more than what rounding may take away."""
        targets = None if problem.targets is None else problem.targets[hit]
        lead = margin(logits, problem.y[hit], targets)
        return lead > ROUNDING[self.session.oracle.precision] * logits.abs().amax(1)

    def retire(self, rows: Tensor) -> None:
        """Mark row numbers whose budget is spent; they leave the search, with what they have found."""
        self.finished[rows] = True
        unfound = rows[self.status[rows] == int(Status.exhausted_steps)]
        self.status[unfound] = int(Status.exhausted_budget)

    def _keep(self, problem: Problem, hit: Tensor, x: Tensor) -> None:
        rows = problem.rows[hit]
        clean = problem.x[hit]
        distance = self.threat.distance(x, clean)
        better = distance < self.distance[rows] if self.minimum else self.threat.contains(x, clean)
        share = None
        if self.session.stochastic and bool(better.any()):
            share = self._confirm(problem.select(hit), x)
            better &= share >= SURE if self.minimum else share > self.share[rows]
        pick = better.nonzero().squeeze(1)
        if problem.repeated:
            pick = self._one_per_row(rows, distance, pick)
        if pick.numel():
            chosen = rows[pick]
            self.best[chosen] = x[pick]
            self.distance[chosen] = distance[pick]
            self.share[chosen] = 1.0 if share is None else share[pick]
            self.status[chosen if share is None else chosen[share[pick] > 0.5]] = int(Status.found)
        if self.stop and not self.minimum:
            self.finished[rows] |= self.share[rows] >= SURE
        elif self.stop and self.enough is not None:
            self.finished[rows] |= self.distance[rows] <= self.enough

    def _one_per_row(self, rows: Tensor, distance: Tensor, pick: Tensor) -> Tensor:
        """Return the positions to keep: of several points `pick` of one row the nearest, the first among equals."""
        if self.minimum:
            pick = pick[distance[pick].argsort(stable=True)]
        order = torch.arange(pick.shape[0], device=rows.device)
        first = torch.full_like(self.status, 0, dtype=torch.int64).scatter_reduce_(
            0, rows[pick], order, "amin", include_self=False
        )
        return pick[first[rows[pick]] == order]

    def _confirm(self, problem: Problem, x: Tensor) -> Tensor:
        """Return the share of fresh draws in which each row fools a stochastic model: one lucky draw is no success."""
        self.session.purpose = "confirm"
        try:
            logits = self.session.draws(x, problem.rows, CONFIRM_DRAWS)
        finally:
            self.session.purpose = "search"
        wide = problem.repeat(CONFIRM_DRAWS)
        fooled = wide.is_adversarial(logits.flatten(0, 1))
        return fooled.reshape(-1, CONFIRM_DRAWS).float().mean(1)

    def settle(self, problem: Problem, x: Tensor) -> None:
        """Take the last iterate `x` as the answer, as a search on a surrogate does; what is not finite stays clean."""
        fit = torch.isfinite(x).flatten(1).all(1) & (self.status[problem.rows] != int(Status.non_finite))
        rows = problem.rows[fit]
        last = self.threat.project(x[fit], problem.x[fit])
        self.best[rows] = last
        self.distance[rows] = self.threat.distance(last, problem.x[fit])

    def offer(self, problem: Problem, x: Tensor) -> None:
        """Hand over where a search of a stochastic model ended without ever fooling its mean answer.

        It may fool one draw in a hundred all the same, more than the clean input does, and a rule that asks for any
        draw wants to know. Ten draws say how many, and with none of ten it is still the best there is.
        """
        open_ = (self.share[problem.rows] == 0) & (self.status[problem.rows] == int(Status.exhausted_steps))
        fit = (open_ & torch.isfinite(x).flatten(1).all(1)).nonzero().squeeze(1)
        if fit.numel():
            part = problem.select(fit)
            last = self.threat.project(x[fit], part.x)
            self.best[part.rows], self.distance[part.rows] = last, self.threat.distance(last, part.x)
            self._keep(part, torch.arange(fit.numel(), device=fit.device), last)

    def note_gradient(self, rows: Tensor, grads: list[Tensor]) -> None:
        """Remember which rows have ever had a gradient that is not exactly zero."""
        self.used_gradient = True
        if self._any_flat:
            for grad in grads:
                self.flat[rows[(grad.flatten(1) != 0).any(1)]] = False
            self._any_flat = bool(self.flat.any())


@dataclass(frozen=True)
class Problem:
    """The samples an attack still works on, with everything it may ask about them.

    `x` N x ... in [0, 1], `y` (N,) labels, `targets` (N,) or None, `ids` (N,) sample ids, `rows` (N,) row numbers in
    the run, `threat` the ball, `clean_logits` (N x C) those of `x` when the run knows them. Attacks never meet the
    model itself. A row may stand several times (`repeat`, noted in `repeated`): its points share one account and one
    best candidate. A `quiet` problem counts its calls but notes no candidate.
    """

    x: Tensor
    y: Tensor
    targets: Tensor | None
    ids: Tensor
    rows: Tensor
    threat: Threat
    session: Session
    ledger: Ledger
    clean_logits: Tensor | None = None
    repeated: bool = False
    quiet: bool = False

    def select(self, index: Tensor) -> Problem:
        """Return the problem of the rows `index` (positions or booleans)."""
        targets = None if self.targets is None else self.targets[index]
        return Problem(
            self.x[index],
            self.y[index],
            targets,
            self.ids[index],
            self.rows[index],
            self.threat,
            self.session,
            self.ledger,
            None if self.clean_logits is None else self.clean_logits[index],
            self.repeated,
            self.quiet,
        )

    def repeat(self, times: int) -> Problem:
        """Return the problem with every row standing `times` times in a row (to score several points of a sample)."""
        wide = self.select(torch.arange(len(self), device=self.rows.device).repeat_interleave(times))
        return replace(wide, repeated=True)

    def members(self) -> list[Problem]:
        """Return one problem per member of an ensemble: same samples, same account; this one for any other model.

        What fools one member alone is no candidate, so those problems are quiet.
        """
        models = members_of(self.session.oracle.model)
        if len(models) == 1:
            return [self]
        return [replace(self, session=self.session.member(model), clean_logits=None, quiet=True) for model in models]

    def __len__(self) -> int:
        return self.x.shape[0]

    @property
    def targeted(self) -> bool:
        """Whether a given class is to be reached."""
        return self.targets is not None

    def stream(self, purpose: str) -> Stream:
        """Return the random stream of a purpose; draws are keyed by the sample ids."""
        return self.session.noise(purpose)

    def is_adversarial(self, logits: Tensor) -> Tensor:
        """Return (N,) booleans: another class than y, or the target when there is one."""
        return self.is_reached(logits.argmax(1))

    def is_reached(self, labels: Tensor) -> Tensor:
        """Return (N,) booleans: the predicted class is another than y, or the target when there is one."""
        return labels != self.y if self.targets is None else labels == self.targets

    def affords(self, queries: int = 1) -> Tensor | None:
        """Return (N,) booleans: the row's budget allows `queries` more; None when there is no limit.

        Attacks that ask several times in a step look here first: a call that one row cannot pay for is refused to all.
        """
        return self.session.affords(self.rows, queries)

    def clean(self) -> Tensor:
        """Return the logits of the unperturbed samples: those the run already has, or a query per row."""
        return self.logits(self.x) if self.clean_logits is None else self.clean_logits

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of `x` (a query per row) and note what fools the model."""
        logits = self.session.logits(x, self.rows, self.session.oracle.gradient.draws if self.session.stochastic else 1)
        if not self.quiet:
            self.ledger.note(self, x, logits)
        return logits

    def decisions(self, x: Tensor) -> Tensor:
        """Return the predicted classes of `x` (a query per row) and note what fools the model."""
        labels = self.session.decisions(x, self.rows)
        if not self.quiet:
            self.ledger.keep(self, x, self.is_reached(labels))
        return labels

    def gradient(
        self,
        x: Tensor,
        loss: str | LossFunction,
        targets: Tensor | None = None,
        estimator: Estimator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N x C), losses (N,) and the gradient of each sample's loss at `x`.

        `loss` is a name or a function of (logits, y, targets); the names kl and square measure the departure from the
        clean logits instead. `targets` overrides the problem's own, as multi-targeted attacks on an untargeted goal
        need; `estimator` the oracle's own.
        """
        if isinstance(loss, str) and loss in DEPARTURES:
            departure, clean = DEPARTURES[loss], self.clean()
            logits, values, grads = self.values_and_gradients(
                x, lambda logits, index: departure(logits, clean[index]).unsqueeze(1), estimator
            )
            return logits, values[:, 0], grads[0]
        function = get_loss(loss) if isinstance(loss, str) else loss
        aims = self.targets if targets is None else targets

        def heads(logits: Tensor, index: Tensor) -> Tensor:
            return function(logits, self.y[index], None if aims is None else aims[index]).unsqueeze(1)

        logits, values, grads = self.values_and_gradients(x, heads, estimator)
        return logits, values[:, 0], grads[0]

    def apart(self, x: Tensor, loss: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what classifier and detector say of `x` apart, for attacks that weigh them themselves.

        That is: (N,) whether the classes' own logits are on the adversary's side, the gradient of `loss` on these,
        (N,) doubt (positive: rejected) and its gradient. A model that never rejects has doubt -inf and gradient 0.
        """
        function, session, rejects = get_loss(loss), self.session, self.session.labels is not None

        def heads(answer: Tensor, index: Tensor) -> Tensor:
            logits = answer[:, :-1] if rejects else answer
            climb = function(logits, self.y[index], None if self.targets is None else self.targets[index])
            return torch.stack([climb, doubt(answer)], dim=1) if rejects else climb.unsqueeze(1)

        session.apart = True
        try:
            answer, values, grads = session.estimate(x, self.rows, heads)
        finally:
            session.apart = False
        self.ledger.note_gradient(self.rows, grads)
        if not rejects:
            self.ledger.note(self, x, answer)
            never = torch.full_like(values[:, 0], -torch.inf)
            return self.is_adversarial(answer), grads[0], never, torch.zeros_like(grads[0])
        self.ledger.note(self, x, fold(answer, self.y))
        return self.is_adversarial(answer[:, :-1]), grads[0], values[:, 1], grads[1]

    def values_and_gradients(
        self, x: Tensor, heads: Heads, estimator: Estimator | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return logits, values (N x K) and K gradients of `heads(logits, index) -> (B, K)` at `x`.

        `index` (B,) are positions in this problem, so heads may look up per-sample tensors. One forward, K backwards.
        """
        logits, values, grads = self.session.estimate(x, self.rows, heads, estimator)
        if not self.quiet:
            self.ledger.note(self, x, logits)
        self.ledger.note_gradient(self.rows, grads)
        return logits, values, grads

    def per_sample(self, value: Tensor | float) -> Tensor:
        """Shape a number or an (N,) tensor to broadcast over the samples."""
        return per_sample(value, self.x)
