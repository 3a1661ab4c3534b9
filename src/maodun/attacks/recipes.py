"""AutoAttack: several attacks in a fixed order, each on the samples that the earlier ones left standing."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from maodun.attacks.gradient.apgd import APGD, APGDT
from maodun.attacks.gradient.climb import finite
from maodun.attacks.minimum.fab import FAB
from maodun.attacks.query.square import Square
from maodun.core import admission
from maodun.core.engine import Attack, Candidates, Progress, State
from maodun.core.errors import InputError, nearest
from maodun.core.estimators import BPDA, EOT, Exact
from maodun.core.oracle import Budget, Oracle
from maodun.core.status import Status
from maodun.core.threat import Threat

VERSIONS = ("standard", "plus", "rand")

Member = tuple[str, Attack[Any]]


@dataclass(frozen=True)
class AutoAttackCandidates(Candidates):
    """Candidates of a recipe; counts are summed over its members.

    `members` are their names in order; `winner` (N,) int64 is the place of the member that broke a sample, -1 where
    none did or none was needed; `notes` are sentences about how far the recipe suits the model.
    """

    members: tuple[str, ...] = ()
    winner: Tensor | None = None
    notes: tuple[str, ...] = ()

    @property
    def by(self) -> list[str]:
        """The name of the member that broke each sample, empty where none did."""
        places = [] if self.winner is None else self.winner.tolist()
        return [self.members[place] if place >= 0 else "" for place in places]


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack[State]):
    """AutoAttack: APGD-CE, APGD-T, FAB-T and Square in turn on what is left standing (Croce and Hein, ICML 2020).

    Inputs N x ..., values in [0, 1]; linf, l2, l1. `version` is standard, plus (five restarts, APGD-DLR and untargeted
    FAB besides) or rand (APGD-CE and APGD-DLR on the mean gradient of `eot` draws, for stochastic models). `steps` and
    `queries` are those of each member; the published values are the defaults. In l1, APGD has five restarts, both
    APGDs spend their first steps in larger balls, and APGD-T takes five targets (Croce and Hein, ICML 2021). Targets
    are fewer where classes are, Square is left out where inputs are not images, and `notes` say so.
    """

    name: ClassVar[str] = "autoattack"

    version: str = "standard"
    steps: int = 100
    queries: int = 5000
    eot: int = 20

    def __post_init__(self) -> None:
        if self.version not in VERSIONS:
            hint = nearest(self.version, list(VERSIONS))
            raise InputError(f"version '{self.version}'", "is not a version of AutoAttack", hint)
        for option in ("steps", "queries", "eot"):
            if getattr(self, option) < 1:
                raise InputError(f"{option} {getattr(self, option)}", "must be at least 1", "give a positive number")

    @property
    def total_steps(self) -> int:
        """The steps of all members together, in linf and l2."""
        return sum(attack.total_steps for _, attack in self.members("linf"))

    def members(self, norm: str, images: bool = True) -> list[Member]:
        """Return the published members under `norm`, in order; without Square where inputs are not images."""
        sparse, many = norm == "l1", self.version == "plus"
        base: dict[str, Any] = {"steps": self.steps, "larger_eps": sparse and self.version != "rand"}
        restarts = 1 if self.version == "rand" or not (sparse or many) else 5
        ce = ("apgd-ce", APGD(loss="ce", restarts=restarts, **base))
        dlr = ("apgd-dlr", APGD(loss="dlr", restarts=restarts, **base))
        if self.version == "rand":
            return [ce, dlr]
        towards = ("apgd-t", APGDT(targets=5 if sparse and not many else 9, **base))
        boundary = ("fab-t", FAB(steps=self.steps, targets=9))
        query = [("square", Square(queries=self.queries))] if images else []
        if self.version == "standard":
            return [ce, towards, boundary, *query]
        return [
            ce,
            dlr,
            ("fab", FAB(steps=self.steps, targets=None, sweep=False, restarts=5)),
            *query,
            towards,
            boundary,
        ]

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
        enough: float | None = None,  # noqa: ARG002 - the ball says it
        clean_logits: Tensor | None = None,
        stop_early: bool = True,
        check_model: bool = True,
        progress: Progress | None = None,
    ) -> AutoAttackCandidates:
        """Run the members in order; arguments, results and errors are those of `Attack.run` (`enough` has no use)."""
        started = time.perf_counter()
        self.check(x, threat)
        x, y, targets, ids = admission.check_samples(x, y, targets, ids, threat)
        threat = finite(threat, x) if x.shape[0] else threat
        oracle, notes = self._prepare(oracle, x, ids, seed)
        images = x.ndim == 4
        if not images and self.version != "rand":
            notes.append("Inputs are not images, so Square was left out.")
        tally = _Tally(x, clean_logits)
        members = self.members(threat.norm, images)
        for place, (label, attack) in enumerate(members):
            index = tally.standing()
            if place and index.numel() == 0:
                break
            within = _remaining(oracle, tally, index)
            if within is None:
                tally.status[index] = int(Status.exhausted_budget)
                break
            found = attack.run(
                within, x[index], y[index], threat, targets=None if targets is None else targets[index], seed=seed,
                ids=ids[index], enough=threat.eps,
                clean_logits=None if tally.clean_logits is None else tally.clean_logits[index],
                stop_early=stop_early, check_model=check_model and place == 0,
                progress=None if progress is None else _named(progress, f"{self.name}: {label}"),
            )  # fmt: skip
            tally.add(place, index, found, threat.contains(found.x_adv, x[index]), attack.access)
        return tally.candidates(threat, x, [label for label, _ in members], notes, time.perf_counter() - started)

    def _prepare(self, oracle: Oracle, x: Tensor, ids: Tensor, seed: int) -> tuple[Oracle, list[str]]:
        """Settle once what every member would find out anew: randomness, batch size, draws per gradient."""
        with oracle.ready():
            session = oracle.session(x, ids, seed)
            stochastic = session.stochastic
            if oracle.stochastic is None:
                stochastic = stochastic or admission.looks_stochastic(session, x)
        oracle = dataclasses.replace(oracle, stochastic=stochastic, batch_size=session.batch_size)
        notes = []
        if stochastic and self.version != "rand":
            notes.append(
                "The model is stochastic: autoattack-rand, which averages gradients over draws, is meant for it."
            )
        if self.version == "rand" and not stochastic:
            notes.append("The model is deterministic, so one draw per gradient was taken; autoattack is meant for it.")
        elif self.version == "rand" and isinstance(oracle.gradient, Exact | BPDA):
            oracle = dataclasses.replace(oracle, gradient=EOT(oracle.gradient, self.eot))
        return oracle, notes


@dataclass(frozen=True, kw_only=True)
class AutoAttackPlus(AutoAttack):
    """AutoAttack's plus version: five restarts, and APGD-DLR and untargeted FAB besides (Croce and Hein, 2020)."""

    name: ClassVar[str] = "autoattack-plus"

    version: str = "plus"


@dataclass(frozen=True, kw_only=True)
class AutoAttackRand(AutoAttack):
    """AutoAttack's version for stochastic models: APGD-CE and APGD-DLR on mean gradients (Croce and Hein, 2020).

    Loss, success and gradient come from the same `eot` draws, and a success must hold in most of ten fresh draws; the
    published code reads loss and success from the last single draw and so counts luck. An oracle that already averages
    (EOT) keeps its own number of draws.
    """

    name: ClassVar[str] = "autoattack-rand"

    version: str = "rand"


class _Tally:
    """What the members have found and cost so far."""

    def __init__(self, x: Tensor, clean_logits: Tensor | None) -> None:
        n = x.shape[0]
        self.x_adv, self.clean_logits = x.clone(), clean_logits
        self.status = torch.full((n,), int(Status.exhausted_steps), dtype=torch.uint8, device=x.device)
        self.winner = torch.full((n,), -1, dtype=torch.int64, device=x.device)
        self.forwards, self.backwards, self.queries = (torch.zeros_like(self.winner) for _ in range(3))

    def standing(self) -> Tensor:
        """Return the rows that no member has broken yet."""
        over = (self.status == int(Status.found)) | (self.status == int(Status.skipped_misclassified))
        return (~over).nonzero().squeeze(1)

    def add(self, place: int, index: Tensor, found: Candidates, inside: Tensor, access: str) -> None:
        """Enter what the member at `place` found and spent on the rows `index`."""
        self.forwards[index] += found.forwards
        self.backwards[index] += found.backwards
        self.queries[index] += found.queries
        if self.clean_logits is None:
            self.clean_logits = found.clean_logits
        old, won = self.status[index], (found.status == int(Status.found)) & inside
        # A minimum-norm member may only know of a point outside the ball.
        beyond = (found.status == int(Status.found)) & ~inside
        new = torch.where(beyond, torch.full_like(old, int(Status.exhausted_steps)), found.status)
        self.x_adv[index[won]] = found.x_adv[won]
        self.winner[index[won]] = place
        # A search without gradients cannot deny that gradients were zero; otherwise the latest ending stands.
        blind = (old == int(Status.zero_gradient)) & (new == int(Status.exhausted_steps)) & (access != "gradient")
        stays = blind | ((old == int(Status.non_finite)) & ~won)
        self.status[index] = torch.where(stays, old, new)

    def candidates(
        self, threat: Threat, x: Tensor, members: list[str], notes: list[str], seconds: float
    ) -> AutoAttackCandidates:
        """Return the account as the recipe's candidates."""
        distance = threat.distance(self.x_adv, x) if x.shape[0] else torch.zeros(0, device=x.device)
        return AutoAttackCandidates(
            self.x_adv, distance, self.status, self.forwards, self.backwards, self.queries, seconds, self.clean_logits,
            tuple(members), self.winner, tuple(notes),
        )  # fmt: skip


def _remaining(oracle: Oracle, tally: _Tally, index: Tensor) -> Oracle | None:
    """Return the oracle with what the costliest standing sample has left of its budget; None when that is nothing."""
    left: dict[str, int] = {}
    for name in ("forwards", "backwards", "queries"):
        limit = getattr(oracle.budget, name)
        if limit is not None:
            spent = getattr(tally, name)[index]
            left[name] = limit - (int(spent.max()) if spent.numel() else 0)
    if any(rest <= 0 for rest in left.values()):
        return None
    return dataclasses.replace(oracle, budget=Budget(**left)) if left else oracle


def _named(progress: Progress, name: str) -> Progress:
    return lambda _, done, steps, left: progress(name, done, steps, left)
