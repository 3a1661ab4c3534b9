"""Sharp: what AutoAttack finds, for a ninth to a sixth of its time, by giving up early where nothing will be found.

Most of AutoAttack's cost is spent on samples that are far from any boundary and on repeating what one attack has
already shown. Here every sample gets a short run; how far it moved the margin, and how much the gradient at its best
point still promises, say whether more runs can pay; only the few samples where they can get many targets, restarts and
queries. The prediction is audited: a random share of the samples given up gets the full AutoAttack, and the result says
how often the prediction was wrong.

Learnt from: minimum-margin attack (Gao et al., ICML 2022: targets ordered by margin), adaptive auto attack (Liu et al.,
CVPR 2022: short runs, hard samples are left early), AutoAE (Liu et al., AAAI 2023: cheap members first), probability
margin attack (Xie et al., arXiv 2411.15210). New here are the rule by the
Frank-Wolfe gap, the widened ball and the audit.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maodun.attacks.gradient.apgd import likely_targets
from maodun.attacks.gradient.climb import finite
from maodun.attacks.gradient.sweep import Sweep, promise, sweep
from maodun.attacks.query import windows
from maodun.attacks.query.square import Square, SquareState
from maodun.attacks.recipes import AutoAttack
from maodun.core.engine import Attack, Candidates, Progress, State
from maodun.core.errors import InputError
from maodun.core.losses import margin
from maodun.core.oracle import Budget, Oracle
from maodun.core.problem import Problem
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import interval


@dataclass(frozen=True)
class Lane:
    """One run of a round: towards the wrong class of some `rank` (None: cross-entropy), from `start`.

    Rank 0 is the likeliest wrong class at the best point so far, the next are those the gradient there promises most.

    `start` is "random" (a point of the ball) or "best" (the sample's best point so far).
    """

    rank: int | None = None
    start: str = "random"


@dataclass(frozen=True)
class Round:
    """Runs of `steps` steps side by side, or `queries` of random search, and who goes on afterwards.

    With g the margin still missing and d how far the search has moved it from the clean input, a sample goes on while
    g <= keep * d and ascent can pay. For each of the likeliest wrong classes the gradient at the best point promises at
    most h (the Frank-Wolfe gap) where g is missing: h must reach need * g for the nearest class or turn * g for
    another. A smooth margin leaves no h at its best point, a rugged one does. `wide` runs begin in a larger ball; the
    first does not, for nothing found out there counts, and most samples that fall do so in a few steps.
    """

    steps: int = 0
    lanes: tuple[Lane, ...] = ()
    queries: int = 0
    keep: float = math.inf
    need: float = 0.0
    turn: float = math.inf
    wide: bool = True


_CE, _CE_BEST = Lane(), Lane(start="best")


def _towards(*ranks: int) -> tuple[Lane, ...]:
    return tuple(Lane(rank) for rank in ranks)


ROUNDS = (
    Round(8, (_CE,), wide=False),
    Round(20, (_CE,), keep=1.5, need=0.25, turn=0.7),
    Round(15, _towards(0, 1, 2), keep=1.1, need=0.25),
    Round(30, _towards(0, 1, 2), keep=0.8, need=0.3),
    Round(50, (_CE, *_towards(0, 1, 2, 3)), keep=0.5, need=0.4),
    Round(80, (_CE, _CE_BEST, *_towards(0, 1)), keep=0.3, need=0.6),
    Round(80, (_CE, _CE_BEST, *_towards(0, 2)), keep=0.3, need=0.8),
    Round(queries=1500),
)
"""The search, measured on models and images other than those reported (docs/attacks/sharp.md)."""


@dataclass(frozen=True)
class SharpCandidates(Candidates):
    """Candidates with the account of the audit; counts include it.

    `audited` and `overturned` (N,) are booleans: a sample that was given up and got the full AutoAttack, and one on
    which that succeeded. `notes` are sentences.
    """

    audited: Tensor | None = None
    overturned: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass
class SharpState(State):
    """`x` is the best point of every sample, `margin` its margin, `logits` its logits; `clean` the clean margin.

    `rivals` (N, T) are the classes worth climbing to, best first; `reach` (N, T) is what first-order ascent from `x`
    promises towards each, over what is missing. `sweep` or `query` is the search of the `round`-th round under way.
    """

    margin: Tensor
    clean: Tensor
    logits: Tensor
    rivals: Tensor
    reach: Tensor
    round: int
    sweep: Sweep | None
    query: SquareState | None


@dataclass(frozen=True, kw_only=True)
class Sharp(Attack[SharpState]):
    """Short runs for all, long ones for the few that are close, and an audit of those given up (own recipe).

    Inputs N x ..., values in [0, 1]; linf, l2; targeted too. `patience` scales the rule by which samples go on (2
    keeps those twice as far away). `audit` is the share of given-up samples, drawn by sample id, on which the full
    AutoAttack runs; 0 leaves it out. `widen` is the share of eps by which the ball is larger when a run begins.
    Costs 32 forwards and 32 backwards for every robust sample at least; the rest depends on how close samples are.
    """

    name: ClassVar[str] = "sharp"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")

    patience: float = 1.0
    audit: float = 0.05
    widen: float = 0.2

    def __post_init__(self) -> None:
        for option in ("patience", "audit", "widen"):
            if not getattr(self, option) >= 0.0:
                raise InputError(f"{option} {getattr(self, option)}", "must not be negative", "give a number >= 0")
        if self.audit > 1.0:
            raise InputError(f"audit {self.audit}", "is a share of the samples", "give a number in [0, 1]")

    @property
    def rounds(self) -> tuple[Round, ...]:
        """The rounds, in order."""
        return ROUNDS

    @property
    def total_steps(self) -> int:
        """One step per point of a run or per query."""
        return sum(entry.queries or entry.steps + 1 for entry in self.rounds)

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
    ) -> SharpCandidates:
        """Search, then audit; arguments, results and errors are those of `Attack.run` (`enough` has no use).

        No audit is made under a budget, which it would break, nor with `stop_early=False`.
        """
        started = time.perf_counter()
        found = super().run(
            oracle, x, y, threat, targets=targets, seed=seed, ids=ids, enough=enough, clean_logits=clean_logits,
            stop_early=stop_early, check_model=check_model, progress=progress,
        )  # fmt: skip
        account = {entry.name: getattr(found, entry.name) for entry in dataclasses.fields(found)}
        nobody = torch.zeros_like(found.found)
        result = SharpCandidates(**account, audited=nobody, overturned=nobody.clone())
        if self.audit == 0.0 or not stop_early or oracle.budget != Budget():
            note = "No audit was made: the share of samples given up too early is unknown."
            return dataclasses.replace(result, notes=(note,))
        ids = torch.arange(x.shape[0], device=x.device) if ids is None else ids.to(x.device)
        standing = (found.status == int(Status.exhausted_steps)) | (found.status == int(Status.zero_gradient))
        drawn = Stream(seed, "sharp/audit").uniform(ids, ()) < self.audit
        chosen = (standing & drawn).nonzero().squeeze(1)
        if chosen.numel():
            full = AutoAttack().run(
                oracle, x[chosen], y[chosen], threat, targets=None if targets is None else targets[chosen], seed=seed,
                ids=ids[chosen], clean_logits=None if found.clean_logits is None else found.clean_logits[chosen],
                check_model=False, progress=progress,
            )  # fmt: skip
            _merge(result, chosen, full)
        return dataclasses.replace(
            result, seconds=time.perf_counter() - started, notes=(_sentence(int(standing.sum()), result),)
        )

    def init(self, problem: Problem) -> SharpState:
        """Note the clean margins and begin the first round."""
        problem = dataclasses.replace(problem, threat=finite(problem.threat, problem.x))
        logits = problem.clean()
        value = margin(logits, problem.y, problem.targets)
        rivals = _rivals(problem, logits)
        return SharpState(
            x=problem.x, done=torch.zeros_like(value, dtype=torch.bool), margin=value, clean=value, logits=logits,
            rivals=rivals, reach=torch.zeros_like(rivals, dtype=value.dtype), round=0, sweep=None, query=None,
        )  # fmt: skip

    def step(self, problem: Problem, state: SharpState) -> SharpState:
        """Advance the round under way; at its end let go whom it shows to be out of reach."""
        plan = self.rounds[state.round]
        problem = dataclasses.replace(problem, threat=finite(problem.threat, problem.x))
        if state.sweep is None and state.query is None:
            self._begin(problem, state, plan)
        over = True
        if state.query is not None:
            state.query = _square(plan).step(problem, state.query)
            over = state.query.query >= _square(plan).queries
        elif state.sweep is not None:
            state.sweep.advance()
            over = state.sweep.over
        if over:
            self._harvest(problem, state)
            last = state.round + 1 == len(self.rounds) or problem.threat.eps == 0.0
            if not last and plan.keep < math.inf:
                _look_ahead(problem, state)
            state.done = torch.ones_like(state.done) if last else ~self.hopeful(plan, state)
            state.round += 1
        return state

    def finish(self, problem: Problem, state: SharpState) -> None:
        """Nothing is left to look at: every point has been scored."""

    def hopeful(self, plan: Round, state: SharpState) -> Tensor:
        """Return (N,) booleans: little is missing beside what was moved, and the gradient promises enough."""
        if plan.keep == math.inf:
            return torch.ones_like(state.done)
        moved = state.margin - state.clean
        near = -state.margin <= self.patience * plan.keep * moved
        bar = torch.full_like(state.reach, plan.turn)
        bar[:, 0] = plan.need
        near &= (self.patience * state.reach >= bar).any(1)
        # A search that could not move the margin at all has learnt nothing: gradients may be masked.
        return near | (moved <= 1e-6 * state.clean.abs())

    def _begin(self, problem: Problem, state: SharpState, plan: Round) -> None:
        if plan.queries and problem.x.ndim == 4:
            state.query = SquareState(
                state.x.clone(), torch.zeros_like(state.done), state.margin,
                problem.threat.distance(state.x, problem.x), windows.none(problem.x), _QUERIES_SKIPPED,
            )  # fmt: skip
        elif plan.lanes:
            state.sweep = self._sweep(problem, state, plan)

    def _sweep(self, problem: Problem, state: SharpState, plan: Round) -> Sweep:
        lanes, device = len(plan.lanes), problem.x.device
        view = problem if lanes == 1 else problem.repeat(lanes)
        number = torch.arange(lanes, device=device).repeat(len(problem)) + 100 * state.round
        start = problem.threat.random_start(view.x, problem.stream("sharp/start"), view.ids, number)
        reuse = torch.tensor([lane.start == "best" for lane in plan.lanes], device=device).repeat(len(problem))
        start = torch.where(view.per_sample(reuse).to(torch.bool), state.x.repeat_interleave(lanes, 0), start)
        return sweep(
            view, start, _aims(problem, state, plan), state.clean.repeat_interleave(lanes), plan.steps, lanes=lanes,
            widen=self.widen if plan.wide else 0.0, classes=state.logits.shape[1],
        )  # fmt: skip

    @staticmethod
    def _harvest(problem: Problem, state: SharpState) -> None:
        if state.query is not None:
            state.x, state.margin = state.query.x, state.query.loss
        elif state.sweep is not None:
            x, value, logits = state.sweep.top()
            better = value > state.margin
            state.x = torch.where(problem.per_sample(better).to(torch.bool), x, state.x)
            state.logits = torch.where(better.unsqueeze(1), logits, state.logits)
            state.margin = torch.maximum(value, state.margin)
        state.sweep, state.query = None, None


_QUERIES_SKIPPED = 200
_RIVALS = 4


def _square(plan: Round) -> Square:
    """Return the random search of a round: it begins with the window of query 200, for it begins near success."""
    return Square(queries=plan.queries + _QUERIES_SKIPPED)


def _rivals(problem: Problem, logits: Tensor) -> Tensor:
    """Return the likeliest wrong classes (N, up to 4), likeliest first; for a targeted threat the target alone."""
    if problem.targets is not None:
        return problem.targets.unsqueeze(1)
    return likely_targets(logits, problem.y, _RIVALS)


def _look_ahead(problem: Problem, state: SharpState) -> None:
    """Ask the gradient at the best points what it promises towards each likely class; one forward, T backwards."""
    rivals = _rivals(problem, state.logits)

    def heads(logits: Tensor, index: Tensor) -> Tensor:
        y = problem.y[index]
        if problem.targets is not None:
            return margin(logits, y, problem.targets[index]).unsqueeze(1)
        return logits.gather(1, rivals[index]) - logits.gather(1, y.unsqueeze(1))

    _, values, grads = problem.values_and_gradients(state.x, heads)
    gains = torch.stack([promise(problem.threat, grad, state.x, problem.x) for grad in grads], 1)
    reach = gains / (-values).clamp(min=torch.finfo(values.dtype).tiny)
    # The nearest class stays first; the others follow by what is promised.
    order = torch.cat([reach.new_full((len(problem), 1), math.inf), reach[:, 1:]], 1).argsort(1, descending=True)
    state.rivals, state.reach = rivals.gather(1, order), reach.gather(1, order)


def _aims(problem: Problem, state: SharpState, plan: Round) -> Tensor:
    """Return the class each lane climbs to (N * lanes,); -1 for the cross-entropy."""
    choice = state.rivals.shape[1]
    columns = [
        torch.full_like(problem.y, -1) if lane.rank is None else state.rivals[:, lane.rank % choice]
        for lane in plan.lanes
    ]
    return torch.stack(columns, 1).flatten()


def _merge(result: SharpCandidates, chosen: Tensor, full: Candidates) -> None:
    """Write what the audit found and cost into the result."""
    for name in ("forwards", "backwards", "queries"):
        getattr(result, name)[chosen] += getattr(full, name)
    won = full.status == int(Status.found)
    rows = chosen[won]
    result.x_adv[rows], result.distance[rows] = full.x_adv[won], full.distance[won]
    result.status[rows] = int(Status.found)
    if result.audited is not None and result.overturned is not None:
        result.audited[chosen], result.overturned[rows] = True, True


def _sentence(standing: int, result: SharpCandidates) -> str:
    if result.audited is None or result.overturned is None:
        return ""
    checked, wrong = int(result.audited.sum()), int(result.overturned.sum())
    if checked == 0:
        return f"Of {standing} samples given up none was drawn for the audit."
    share = interval(wrong, checked)
    return (
        f"Of {standing} samples given up {checked} were audited by the full AutoAttack, which overturned {wrong} "
        f"({100 * share.value:.1f} %, 95 % interval {100 * share.low:.1f} to {100 * share.high:.1f})."
    )
