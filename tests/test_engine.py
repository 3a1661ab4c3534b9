"""The engine: compaction changes nothing, every ending has its status, and no success stays silent."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.gradient.pgd import PGD
from maodun.core import context
from maodun.core.engine import Attack, State
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import EOT, Exact, Oracle
from maodun.core.problem import Problem
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

N, D = 96, 10
IDS = torch.arange(N)


class Net(nn.Module):
    """A small fixed non-linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(Stream(0, "a").normal(torch.arange(16), (D,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(4), (16,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.a.T) @ self.b.T


def _data() -> tuple[Tensor, Tensor]:
    x = Stream(0, "x").uniform(IDS, (D,))
    return x, Net()(x).argmax(1)


def test_batch_split_and_order_change_nothing():
    x, y = _data()
    whole = PGD(steps=10, restarts=2).run(Oracle(Net(), batch_size=64), x, y, Threat("l2", 0.15))
    for size in (1, 7):
        other = PGD(steps=10, restarts=2).run(Oracle(Net(), batch_size=size), x, y, Threat("l2", 0.15))
        assert (whole.found == other.found).float().mean() >= 0.999
        assert torch.allclose(whole.x_adv, other.x_adv, atol=1e-4)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = PGD(steps=10, restarts=2).run(Oracle(Net()), x[order], y[order], Threat("l2", 0.15), ids=IDS[order])
    assert torch.equal(shuffled.found, whole.found[order])
    assert torch.allclose(shuffled.x_adv, whole.x_adv[order], atol=1e-4)
    assert 0.1 < whole.found.float().mean() < 0.9


def test_finished_samples_cost_nothing_more():
    x, y = _data()
    steps = 12
    found = PGD(steps=steps).run(Oracle(Net()), x, y, Threat("linf", 0.08))
    survivors = found.status == int(Status.exhausted_steps)
    assert (found.backwards[survivors] == steps).all()
    assert (found.forwards[survivors] == steps + 2).all()
    assert (found.forwards[~survivors] < steps + 2).any()
    # Replaying the trajectory of every sample without stopping tells the samples that were really needed.
    free = PGD(steps=steps).run(Oracle(Net()), x, y, Threat("linf", 0.08), stop_early=False)
    assert (free.backwards == steps).all() and (free.forwards == steps + 1).all()
    assert torch.equal(free.found, found.found)


def test_misclassified_samples_are_skipped_and_returned_clean():
    x, y = _data()
    wrong = y.clone()
    wrong[:5] = (y[:5] + 1) % 4
    found = PGD(steps=5).run(Oracle(Net()), x, wrong, Threat("linf", 0.05))
    assert (found.status[:5] == int(Status.skipped_misclassified)).all()
    assert torch.equal(found.x_adv[:5], x[:5])
    assert (found.backwards[:5] == 0).all() and (found.forwards[:5] == 1).all()


def test_clean_logits_given_save_the_clean_pass():
    x, y = _data()
    with torch.no_grad():
        logits = Net()(x)
    given = PGD(steps=5).run(Oracle(Net()), x, y, Threat("linf", 0.02), clean_logits=logits)
    without = PGD(steps=5).run(Oracle(Net()), x, y, Threat("linf", 0.02))
    assert torch.equal(without.forwards - given.forwards, torch.ones(N, dtype=torch.int64))
    assert torch.equal(given.x_adv, without.x_adv)


def test_failure_returns_the_clean_input():
    x, y = _data()
    found = PGD(steps=3).run(Oracle(Net()), x, y, Threat("linf", 1e-6))
    assert torch.equal(found.x_adv, x) and (found.distance == 0).all()


def test_zero_gradient_is_named():
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :3] * 10).round() * 1.0

    x = 0.25 + 0.5 * Stream(0, "x").uniform(IDS, (D,))
    y = Flat()(x).argmax(1)
    found = PGD(steps=3, random_start=False).run(Oracle(Flat()), x, y, Threat("linf", 0.01))
    assert (found.status == int(Status.zero_gradient)).any()
    assert not (found.status == int(Status.exhausted_steps)).any()


def test_non_finite_logits_are_named_and_do_no_harm():
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = Net()(x)
            return torch.where(x[:, :1] > 0.9, torch.full_like(z, math.nan), z)

    x, y = _data()
    found = PGD(steps=5).run(Oracle(Broken()), x, y, Threat("linf", 0.01))
    bad = x[:, 0] > 0.9
    assert bool(bad.any()) and (found.status[bad] == int(Status.non_finite)).all()
    assert torch.isfinite(found.x_adv).all()


def test_a_success_seen_in_passing_is_kept():
    @dataclass(frozen=True, kw_only=True)
    class Passing(Attack[State]):
        """Steps through an adversarial point and ends on a harmless one."""

        name: ClassVar[str] = "passing"

        @property
        def total_steps(self) -> int:
            return 2

        def init(self, problem: Problem) -> State:
            return State(x=problem.x, done=torch.zeros(len(problem), dtype=torch.bool))

        def step(self, problem: Problem, state: State) -> State:
            away = (problem.x + 0.3).clamp(max=1.0)
            problem.logits(away)
            return replace(state, x=problem.x)

    x, y = _data()
    threat = Threat("linf", 0.3)
    found = Passing().run(Oracle(Net()), x, y, threat)
    fooled = Net()((x + 0.3).clamp(max=1.0)).argmax(1) != y
    assert bool(fooled.any()) and torch.equal(found.found, fooled)
    # Outside the ball the same points are no candidates.
    assert not Passing().run(Oracle(Net()), x, y, Threat("linf", 0.1)).found.any()


def test_targeted_reaches_the_target_only():
    x, y = _data()
    targets = (y + 1) % 4
    found = PGD(steps=40).run(Oracle(Net()), x, y, Threat("linf", 0.5, targeted=True), targets=targets)
    hit = Net()(found.x_adv).argmax(1) == targets
    assert torch.equal(hit, found.found) and found.found.float().mean() > 0.5


def test_a_lucky_draw_is_no_success():
    class Coin(nn.Module):
        stochastic = True

        def forward(self, x: Tensor) -> Tensor:
            clean = torch.zeros(x.shape[0], 2)
            clean[:, 0] = 1.0
            return clean + 0.6 * context.noise(x, "coin").normal((2,))

    x = torch.full((200, 4), 0.5)
    y = torch.zeros(200, dtype=torch.int64)
    found = PGD(steps=10).run(Oracle(Coin(), gradient=EOT(Exact(), 4)), x, y, Threat("linf", 0.1))
    assert found.found.float().mean() < 0.05
    weak = (found.x_adv != x).flatten(1).any(1) & ~found.found
    assert bool(weak.any()) and (found.distance[weak] > 0).all()
    from maodun.core.verdict import Rule, judge

    verdict = judge(Coin(), found.x_adv, x, y, Threat("linf", 0.1), rule=Rule("majority", 20))
    assert verdict.robust.value > 0.9


def test_refusals():
    x, y = _data()
    with pytest.raises(UnsupportedError, match="does not search in l0"):
        PGD().run(Oracle(Net()), x, y, Threat("l0", 3))
    with pytest.raises(InputError, match="not an option of pgd"):
        PGD().replace(stepz=3)


def test_results_repeat_and_seeds_differ():
    x, y = _data()
    runs = [PGD(steps=2).run(Oracle(Net()), x, y, Threat("linf", 0.05), seed=s) for s in (0, 0, 1)]
    assert torch.equal(runs[0].x_adv, runs[1].x_adv)
    assert not torch.equal(runs[0].x_adv, runs[2].x_adv)


def test_repr_rebuilds():
    attack = PGD(steps=7, loss="dlr")
    assert eval(repr(attack), {"PGD": PGD}) == attack
