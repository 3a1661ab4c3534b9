"""A small fixed subset on which a shield can be tried quickly, with every call counted."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maodun.arena.plan import estimator
from maodun.arena.recipe import SpearSpec, ThreatSpec
from maodun.arena.setup import Arena, Shield
from maodun.attacks.gradient.pgd import PGD, PGDState
from maodun.core.engine import Attack, State
from maodun.core.estimators import EOT, Estimator
from maodun.core.losses import get_loss
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.problem import Problem
from maodun.core.rejection import fold, may_reject
from maodun.core.threat import Threat
from maodun.core.verdict import fresh_logits, judge

SUBSET = 64
THOROUGH = 128
STEPS = 20
_MOST_DRAWS = 4


@dataclass(frozen=True, kw_only=True)
class RandomNoise(Attack[State]):
    """Draws random points of the ball: what any search must beat. Costs `draws` queries per sample."""

    name: ClassVar[str] = "random-noise"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0", "flow")
    access: ClassVar[str] = "scores"

    draws: int = 64

    @property
    def total_steps(self) -> int:
        """One step per draw."""
        return self.draws

    def init(self, problem: Problem) -> State:
        """Start at the clean input."""
        return State(x=problem.x, done=torch.zeros(len(problem), dtype=torch.bool, device=problem.x.device))

    def step(self, problem: Problem, state: State) -> State:
        """Look at one more point of the ball."""
        number = int(problem.session.meter.forwards[problem.rows].max())
        noisy = problem.threat.random_start(problem.x, problem.stream(f"{self.name}/start"), problem.ids, number)
        problem.logits(noisy)
        return state

    def finish(self, problem: Problem, state: State) -> None:
        """Every point has been looked at."""


class Tempered(nn.Module):
    """The logits of a model divided by a temperature: the same decisions, other gradients of the cross-entropy."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, x: Tensor) -> Tensor:
        """Return logits / temperature (N x C)."""
        logits: Tensor = self.model(x)
        return logits / self.temperature


@dataclass(frozen=True, kw_only=True)
class Traced(PGD):
    """PGD that keeps what it climbed: per step the row numbers and losses of the samples still searched."""

    history: list[tuple[Tensor, Tensor]] = field(default_factory=list, compare=False, repr=False)

    def slope(self, problem: Problem, state: PGDState) -> tuple[Tensor, PGDState]:
        """Return the gradient, and note the losses."""
        _, losses, gradient = problem.gradient(state.x, self.loss)
        self.history.append((problem.rows, losses.detach()))
        return gradient, state


@dataclass(frozen=True)
class Way:
    """Another way to a gradient: through `model` in the shield's place, by `gradient`; `name` says what is remedied."""

    name: str
    model: nn.Module
    gradient: Estimator


@dataclass
class Laboratory:
    """One shield, one threat and one gradient estimator on the first `size` samples of the run.

    `spear` names the estimator's owner in findings, `adaptive` tells the one that deserves the long trials; `twin` is
    a model to transfer from, if there is one. `forwards` and `backwards` add up what the trials cost.
    """

    shield: Shield
    threat: Threat
    arena: Arena
    spec: SpearSpec
    spear: str | None
    adaptive: bool = True
    size: int = SUBSET
    twin: nn.Module | None = None
    forwards: int = 0
    backwards: int = 0
    claimed: int = 0
    refused: int = 0
    slopes: list[tuple[float, float]] = field(default_factory=list)
    _base: dict[Any, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data, device = self.arena.data, self.arena.device
        self.x, self.y = data.x[: self.size].to(device), data.y[: self.size].to(device)
        self.ids = data.ids[: self.size].to(device)
        self.n = int(self.y.shape[0])
        self.rule = self.arena.rule(self.shield)
        self.trace = Traced(steps=STEPS)

    @property
    def estimator(self) -> Estimator:
        """The spear's estimator, with few enough draws to stay cheap."""
        own = estimator(self.spec)
        return EOT(own.inner, min(own.draws, _MOST_DRAWS)) if isinstance(own, EOT) else own

    def oracle(self, temperature: float = 1.0, *, whole: bool = False, way: Way | None = None) -> Oracle:
        """Return the shield with divided logits; `whole` keeps all draws of the spear's estimator.

        `way` replaces model and estimator.
        """
        model = self.shield.model if way is None else way.model
        model = model if temperature == 1.0 else Tempered(model, temperature)
        gradient = (estimator(self.spec) if whole else self.estimator) if way is None else way.gradient
        size, random = self.arena.recipe.compute.batch_size, self.shield.stochastic or is_stochastic(model)
        return Oracle(model, gradient=gradient, stochastic=random, batch_size=size)

    def plain(self) -> Tensor:
        """Return who falls to the attack that remedies are measured by: PGD on the cross-entropy (n,)."""
        return self.fell(self.trace)

    def fell(
        self, attack: Attack[Any], eps: float | None = None, temperature: float = 1.0, way: Way | None = None
    ) -> Tensor:
        """Attack the subset and return, per fresh verdict, who fell (n,); equal questions are asked once.

        The search goes `way`. The verdict is on the shield itself, with draws that neither the search nor the main
        verdict uses; `claimed` and `refused` count the successes that searches of the shield itself believed in, and
        those of them that the verdict did not grant.
        """
        key = (attack, eps, temperature, None if way is None else way.name)
        if key not in self._base:
            threat = self.threat if eps is None else self.threat.with_eps(eps)
            # Scores suffice for query attacks; granting gradients does not change what they ask.
            oracle = dataclasses.replace(self.oracle(temperature, way=way), access="gradient")
            seed = self.arena.recipe.seed
            found = attack.run(oracle, self.x, self.y, threat, seed=seed, ids=self.ids, check_model=False)
            verdict = judge(
                self.arena.oracle(self.shield),
                found.x_adv,
                self.x,
                self.y,
                threat,
                rule=self.rule,
                seed=seed,
                ids=self.ids,
                purpose="diagnostics",
            )
            self.forwards += int(found.forwards.sum()) + verdict.flags.numel()
            self.backwards += int(found.backwards.sum())
            self._base[key] = verdict.success
            if way is None:
                self.claimed += int(found.found.sum())
                self.refused += int((found.found & ~verdict.success).sum())
        return self._base[key]

    def clean_wrong(self) -> Tensor:
        """Return who is answered wrongly without an attack, under the main verdict's own draws (n,)."""
        oracle, seed = self.arena.oracle(self.shield), self.arena.recipe.seed
        logits = fresh_logits(oracle, self.x, seed=seed, ids=self.ids, draws=self.rule.draws)
        self.forwards += logits.shape[0] * logits.shape[1]
        logits = fold(logits, self.y) if may_reject(self.shield.model) else logits
        return self.rule.wrong(logits.argmax(2) != self.y[:, None], logits.softmax(2).mean(1), self.y, None)

    def gradients(self, loss: str, times: int = 1, *, whole: bool = False) -> list[Tensor]:
        """Return the gradients (n x d) of a loss at the clean inputs, drawn `times` times."""
        oracle, function = self.oracle(whole=whole), get_loss(loss)
        with oracle.ready():
            session = oracle.session(self.x, self.ids, self.arena.recipe.seed, self.y)
            rows = torch.arange(self.n, device=self.x.device)
            found = [
                session.estimate(self.x, rows, lambda logits, at: function(logits, self.y[at], None).unsqueeze(1))
                for _ in range(times)
            ]
        self.forwards += int(session.meter.forwards.sum())
        self.backwards += int(session.meter.backwards.sum())
        return [gradients[0].flatten(1) for _, _, gradients in found]


def everything(threat: Threat, x: Tensor) -> float:
    """Return the radius at which the threat's ball holds the whole box around every input like `x` (N x ...)."""
    size = float(x[0].numel())
    if threat.norm == "flow":
        # A flow can never make every image; this one may fetch every pixel from anywhere.
        return float(max(x.shape[2:]))
    return {"linf": 1.0, "l2": math.sqrt(size), "l1": size, "l0": size}[threat.norm]


def trial_threat(spec: ThreatSpec, x: Tensor) -> Threat:
    """Return the untargeted threat the trials use; without a radius, a tenth of the box in every direction."""
    if math.isinf(spec.eps):
        return Threat(spec.norm, 0.1 * everything(Threat(spec.norm), x))
    return Threat(spec.norm, spec.eps)


def stronger(suspect: Tensor, expected: Tensor) -> tuple[int, int, float]:
    """Compare who fell to a suspect and to an attack expected to be at least as strong, on the same samples (n,).

    Returns how many fell to the suspect only, to the expected one only, and the one-sided p-value of the sign test
    (McNemar's, exact) that the suspect is the stronger.
    """
    from scipy.stats import binomtest

    only, other = int((suspect & ~expected).sum()), int((expected & ~suspect).sum())
    p = 1.0 if only + other == 0 else float(binomtest(only, only + other, alternative="greater").pvalue)
    return only, other, p
