"""The one loop that drives every attack: init, step, drop what is finished, stop, report.

An attack is an immutable object with `init(problem) -> state` and `step(problem, state) -> state`. It knows neither the
model nor the data set. Everything that is the same for all attacks lives here: skipping what is already wrong,
compaction, budgets, early stopping, progress and status.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from maodun.core import admission
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import BudgetExceededError, Oracle
from maodun.core.problem import Ledger, Problem
from maodun.core.status import Status
from maodun.core.threat import Threat

Progress = Callable[[str, int, int, int], None]
"""Called as progress(attack name, steps done, steps in all, samples still searched)."""


@dataclass
class State:
    """What an attack carries from step to step: `x` the current iterate, plus whatever a subclass adds.

    Tensor fields whose first axis is the batch are compacted by the engine; fields that are not tensors are shared by
    all rows. A field named in `shared` is never compacted. `done` (N,) marks rows that need no further step.
    """

    x: Tensor
    done: Tensor
    shared: ClassVar[tuple[str, ...]] = ()

    def select(self, index: Tensor) -> Self:
        """Return the state of the rows `index`; nested states and lists of tensors follow."""
        changed: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            if entry.name not in self.shared:
                changed[entry.name] = _select(getattr(self, entry.name), index)
        return dataclasses.replace(self, **changed)


def _select(value: Any, index: Tensor) -> Any:
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, State):
        return value.select(index)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        return [entry[index] for entry in value]
    return value


@dataclass(frozen=True)
class Candidates:
    """What a search hands to the verdict, one row per sample, in the order given.

    `x_adv` is the best candidate, or the clean input where nothing was found (of a search on a surrogate, and of one in
    a ball of a stochastic model: where it ended); `distance` its distance in the threat's norm (0 for a clean input);
    `status` (uint8) are Status values; counts are int64; `seconds` is the whole run's wall time; `clean_logits` are
    those of the unperturbed inputs when the run computed or was given them.
    """

    x_adv: Tensor
    distance: Tensor
    status: Tensor
    forwards: Tensor
    backwards: Tensor
    queries: Tensor
    seconds: float
    clean_logits: Tensor | None = None

    @property
    def found(self) -> Tensor:
        """(N,) booleans: the search believes that it succeeded, or the clean input was already wrong."""
        return (self.status == int(Status.found)) | (self.status == int(Status.skipped_misclassified))


S = TypeVar("S", bound=State)


@dataclass(frozen=True, kw_only=True)
class Attack(Generic[S]):
    """Base of all attacks: a frozen description of a search; its repr rebuilds it.

    Class attributes declare what it offers: `name`; `norms` (the norms it searches in); `kind` "fixed" (best loss
    inside a ball) or "minimum" (least distance); `can_target`; `access` (gradient, scores, decision); `images_only`
    (needs N x C x H x W); `min_classes`.
    """

    name: ClassVar[str] = "attack"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    kind: ClassVar[str] = "fixed"
    can_target: ClassVar[bool] = True
    access: ClassVar[str] = "gradient"
    images_only: ClassVar[bool] = False
    min_classes: ClassVar[int] = 2

    @property
    def total_steps(self) -> int:
        """The most engine steps a sample can take (for progress and the end of the loop)."""
        raise NotImplementedError("an attack says how many steps it takes")

    def init(self, problem: Problem) -> S:
        """Return the state before the first step."""
        raise NotImplementedError("an attack starts somewhere")

    def step(self, problem: Problem, state: S) -> S:
        """Return the state after one more step."""
        raise NotImplementedError("an attack moves somehow")

    def finish(self, problem: Problem, state: S) -> None:
        """Look at the last iterate, which no step has evaluated; attacks that have done so override this."""
        problem.logits(state.x)

    def answer(self, state: S) -> Tensor:
        """Return where the search stands: what a search on a surrogate hands over; the iterate, unless overridden."""
        return state.x

    def check(self, x: Tensor, threat: Threat) -> None:
        """Refuse what this attack does not offer, with a reason, before any model call."""
        if threat.norm not in self.norms:
            raise UnsupportedError(
                f"attack '{self.name}'",
                f"does not search in {threat.norm}",
                f"use one of {', '.join(self.norms)}, or another attack",
            )
        if threat.targeted and not self.can_target:
            raise UnsupportedError(
                f"attack '{self.name}'", "cannot be targeted", "leave out the targets or use pgd, apgd or cw"
            )
        if self.kind == "fixed" and threat.eps == float("inf") and self.access != "gradient":
            raise UnsupportedError(f"attack '{self.name}'", "needs a finite eps", "give eps in [0, 1] input units")
        if self.images_only and x.ndim != 4:
            raise UnsupportedError(
                f"attack '{self.name}'",
                f"needs images N x C x H x W, got {tuple(x.shape)}",
                "use an attack without spatial structure",
            )

    def run(
        self,
        oracle: Oracle,
        x: Tensor,
        y: Tensor,
        threat: Threat,
        *,
        targets: Tensor | None = None,
        seed: int = 0,
        ids: Tensor | None = None,
        enough: float | None = None,
        clean_logits: Tensor | None = None,
        stop_early: bool = True,
        check_model: bool = True,
        progress: Progress | None = None,
    ) -> Candidates:
        """Search an adversarial example for every row of `x` (N x ..., [0, 1]) with labels `y` (N,).

        `targets` (N,) are required exactly when the threat is targeted. `ids` key the randomness (default 0..N-1).
        `enough`: minimum-norm attacks stop on a sample once its candidate is this near. `clean_logits` saves the clean
        pass. `stop_early=False` keeps every sample to the last step and makes no clean pass: the fixed price at
        which attacks are compared, and the way of every search on a surrogate. `check_model=False` skips the refusals
        about the model's outputs.
        Raises InputError for inputs, labels or models that cannot be meant, UnsupportedError for combinations
        this attack does not offer.
        """
        started = time.perf_counter()
        self.check(x, threat)
        oracle.refuse(self.access)
        x, y, targets, ids = admission.check_samples(x, y, targets, ids, threat)
        stop_early = stop_early and not oracle.surrogate
        with oracle.ready():
            session = oracle.session(x, ids, seed, y)
            if check_model and oracle.stochastic is None:
                session.stochastic = session.stochastic or admission.looks_stochastic(session, x)
            ledger = Ledger(session, x, threat, self.kind == "minimum", enough, stop_early)
            rows = torch.arange(x.shape[0], device=x.device)
            problem = Problem(x, y, targets, ids, rows, threat, session, ledger)
            if stop_early and x.shape[0]:
                problem, clean_logits = self._skip_wrong(problem, clean_logits, check_model)
            if len(problem):
                self._drive(problem, progress)
        return _collect(ledger, session.meter, time.perf_counter() - started, clean_logits)

    def _skip_wrong(self, problem: Problem, logits: Tensor | None, check_model: bool) -> tuple[Problem, Tensor]:
        session, ledger = problem.session, problem.ledger
        if logits is None:
            draws = session.oracle.gradient.draws if session.stochastic else 1
            if session.oracle.access == "decision":
                labels = session.decisions(problem.x, problem.rows)
                # A model that always says class 0 still has another class.
                classes = max(int(labels.max()), int(problem.y.max()), 1) + 1
                logits = torch.nn.functional.one_hot(labels, classes).float()
            else:
                logits = session.logits(problem.x, problem.rows, draws)
        if check_model:
            admission.check_outputs(logits, problem.y, problem.targets, session.oracle.access)
        classes = logits.shape[1]
        if classes < self.min_classes:
            ledger.status.fill_(int(Status.unsupported))
            ledger.finished.fill_(True)
        bad = ~torch.isfinite(logits).all(1)
        ledger.status[bad], ledger.finished[bad] = int(Status.non_finite), True
        wrong = problem.is_adversarial(logits) & ~bad
        if session.stochastic:
            # One unlucky draw must not excuse a sample from the attack: only what is mostly wrong is skipped.
            wrong &= _mostly_wrong(problem)
        ledger.status[wrong], ledger.finished[wrong], ledger.distance[wrong] = (
            int(Status.skipped_misclassified),
            True,
            0.0,
        )
        problem = dataclasses.replace(problem, clean_logits=logits)
        return problem.select((~ledger.finished).nonzero().squeeze(1)), logits

    def _drive(self, problem: Problem, progress: Progress | None) -> None:
        state: S | None = None
        steps = self.total_steps
        done = 0
        # Most steps finish nobody, and versions tell so without a look at every row.
        seen: tuple[int, Tensor | None, int] = (-1, None, 0)
        while done <= steps and len(problem):
            try:
                if state is None:
                    state = self.init(problem)
                elif done < steps:
                    state = self.step(problem, state)
                    done += 1
                else:
                    self.finish(problem, state)
                    done += 1
            except BudgetExceededError as spent:
                problem.ledger.retire(spent.rows)
            if progress is not None:
                progress(self.name, min(done, steps), steps, len(problem))
            version = problem.ledger.finished._version
            done_now = None if state is None else state.done
            if version != seen[0] or done_now is not seen[1] or (done_now is not None and done_now._version != seen[2]):
                seen = (version, done_now, 0 if done_now is None else done_now._version)
                problem, state = self._compact(problem, state)
        self._settle(problem, state)

    def _settle(self, problem: Problem, state: S | None) -> None:
        """Hand over where a search in a ball ended: always on a surrogate, else where a stochastic model still stands.

        A least-distance search has its own answer.
        """
        if self.kind != "fixed" or state is None or not len(problem):
            return
        if problem.session.oracle.surrogate:
            problem.ledger.settle(problem, self.answer(state))
        elif problem.session.stochastic:
            try:
                problem.ledger.offer(problem, self.answer(state))
            except BudgetExceededError as spent:
                problem.ledger.retire(spent.rows)

    def _compact(self, problem: Problem, state: S | None) -> tuple[Problem, S | None]:
        leave = problem.ledger.finished[problem.rows]
        if state is not None:
            leave = leave | state.done
        if not bool(leave.any()):
            return problem, state
        if (problem.session.oracle.surrogate or problem.session.stochastic) and state is not None:
            gone = leave.nonzero().squeeze(1)
            self._settle(problem.select(gone), state.select(gone))
        keep = (~leave).nonzero().squeeze(1)
        return problem.select(keep), None if state is None else state.select(keep)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other options; InputError for an option that does not exist."""
        known = [entry.name for entry in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise InputError(f"option '{name}'", f"is not an option of {self.name}", "known: " + ", ".join(known))
        return dataclasses.replace(self, **changes)


def _mostly_wrong(problem: Problem) -> Tensor:
    draws = 10
    logits = problem.session.draws(problem.x, problem.rows, draws)
    wrong = problem.repeat(draws).is_adversarial(logits.flatten(0, 1))
    return wrong.reshape(-1, draws).float().mean(1) > 0.5


def _collect(ledger: Ledger, meter: Any, seconds: float, clean_logits: Tensor | None) -> Candidates:
    if ledger.used_gradient:
        stuck = ledger.flat & (ledger.status == int(Status.exhausted_steps)) & (meter.backwards > 0)
        ledger.status[stuck] = int(Status.zero_gradient)
    distance = torch.where(torch.isfinite(ledger.distance), ledger.distance, torch.zeros_like(ledger.distance))
    return Candidates(
        x_adv=ledger.best,
        distance=distance,
        status=ledger.status,
        forwards=meter.forwards,
        backwards=meter.backwards,
        queries=meter.queries,
        seconds=seconds,
        clean_logits=clean_logits,
    )
