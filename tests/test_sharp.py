"""Sharp: closed forms, what it costs, who goes on, the audit's book-keeping, and agreement with AutoAttack."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from oracles import SHAPES, Counting, Flat, Sphere, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.gradient.sweep import promise
from maodun.attacks.recipes import AutoAttack
from maodun.attacks.registry import build_attack
from maodun.attacks.sharp import Lane, Round, Sharp, SharpCandidates, SharpState
from maodun.core.engine import Candidates
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Budget, Oracle
from maodun.core.problem import Problem
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import Rule, judge

QUIET = Sharp(audit=0.0)
FEW = (Round(6, (Lane(),), keep=2.0), Round(6, (Lane(0), Lane(1)), keep=1.0), Round(queries=8))


@dataclass(frozen=True, kw_only=True)
class Short(Sharp):
    """Few and short rounds, so that properties that hold at every length are tested quickly."""

    @property
    def rounds(self) -> tuple[Round, ...]:
        return FEW


class Net(nn.Module):
    """A small fixed non-linear classifier of 1 x 4 x 5 images."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.a = nn.Parameter(1.5 * Stream(0, "a").normal(torch.arange(24), (20,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(classes), (24,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.a.T) @ self.b.T


def _net(n: int = 60, classes: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = Net(classes), Stream(0, "x").uniform(torch.arange(n), (1, 4, 5))
    with torch.no_grad():
        return model, x, model(x).argmax(1)


def _equal(a: Candidates, b: Candidates) -> None:
    assert torch.equal(a.status, b.status)
    assert torch.allclose(a.x_adv, b.x_adv, atol=1e-5)
    assert torch.equal(a.forwards, b.forwards) and torch.equal(a.backwards, b.backwards)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("classes", [2, 5])
def test_on_a_linear_model_it_fells_exactly_those_within_reach(norm: str, rank: int, classes: int):
    model = linear(classes)
    x, y = samples(model, 40, SHAPES[rank])
    limit = nearest(model, x, norm)
    for share in (0.99, 1.02):
        eps = float(limit.median()) * share
        inside = limit < eps * 0.99
        found = QUIET.run(Oracle(model), x, y, Threat(norm, eps)).found
        assert bool(found[inside].all())
        assert not bool(found[limit > eps * 1.001].any())


def test_a_curved_boundary_is_found_at_the_distance_it_has():
    model = Sphere()
    direction = torch.nn.functional.normalize(Stream(0, "d").normal(torch.arange(30), (24,)), dim=1)
    x = 0.5 + direction * torch.linspace(0.3, 0.7, 30).unsqueeze(1)
    y = model(x).argmax(1)
    reach = model.distance(x)
    found = QUIET.run(Oracle(model), x, y, Threat("l2", 0.25)).found
    assert torch.equal(found[(reach - 0.25).abs() > 0.005], (reach < 0.25)[(reach - 0.25).abs() > 0.005])


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_it_returns_fools_the_model_inside_the_ball(norm: str):
    model, x, y = _net()
    threat = Threat(norm, {"linf": 0.1, "l2": 0.3}[norm])
    found = Short(audit=0.0).run(Oracle(model), x, y, threat)
    won = found.status == int(Status.found)
    verdict = judge(model, found.x_adv, x, y, threat, rule=Rule("single"))
    assert 5 < int(won.sum()) < len(x)
    assert torch.equal(verdict.success, won) and bool(verdict.valid.all())


def test_the_price_of_a_hopeless_sample_is_two_short_runs():
    model = Counting(linear(5))
    x, y = samples(model.model, 20)
    threat = Threat("linf", float(nearest(model.model, x, "linf").min()) * 0.05)
    found = QUIET.run(Oracle(model, stochastic=False), x, y, threat)
    assert not bool(found.found.any())
    assert (
        bool((found.backwards == 32).all()) and bool((found.forwards == 32).all()) and bool((found.queries == 3).all())
    )
    assert model.backward_rows == 32 * 20 and model.weight_gradients == 0


def test_the_price_of_a_close_sample_stays_below_an_eighth_of_autoattack():
    plan = Sharp().rounds
    gradients = sum(entry.steps * len(entry.lanes) + 4 for entry in plan)
    forwards = sum((entry.steps + 1) * len(entry.lanes) + 1 + entry.queries for entry in plan)
    standard = {"forwards": 101 + 909 + 2 * 900 + 5000, "backwards": 101 + 909 + 900}
    # Even a sample that stays in to the end costs no more than AutoAttack's gradients and a part of its queries.
    assert gradients <= standard["backwards"] and forwards <= standard["forwards"]
    model, x, y = _net()
    found = QUIET.run(Oracle(model), x, y, Threat("linf", 0.05))
    robust = ~found.found
    assert int(found.backwards[robust].max()) <= gradients


def test_who_goes_on_depends_on_what_is_missing_what_was_moved_and_what_the_gradient_promises():
    attack, plan = Sharp(), Round(10, (Lane(),), keep=0.5, need=0.3)
    margins, cleans = [-1.0, -1.0, -1.0, -1.0, -1.0], [-2.9, -3.1, -3.1, -3.1, -1.0]
    reach = torch.tensor([[1.0, 0.0], [0.31, 0.0], [0.29, 0.79], [0.0, 0.81], [0.0, 0.0]])
    plan = replace(plan, turn=0.8)
    state = SharpState(
        x=torch.zeros(5, 3), done=torch.zeros(5, dtype=torch.bool), logits=torch.zeros(5, 3), round=0, sweep=None,
        query=None, margin=torch.tensor(margins), clean=torch.tensor(cleans), reach=reach,
        rivals=torch.ones(5, 2).long(),
    )  # fmt: skip
    assert attack.hopeful(plan, state).tolist() == [False, True, False, True, True]
    assert attack.hopeful(replace(plan, turn=float("inf")), state).tolist() == [False, True, False, False, True]
    assert attack.replace(patience=2.0).hopeful(plan, state).tolist() == [True, True, True, True, True]
    assert attack.hopeful(replace(plan, keep=float("inf")), state).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_promise_covers_what_a_linear_function_can_gain_and_ends_where_nothing_is_left(norm: str):
    model = linear(2)
    x, y = samples(model, 20)
    threat = Threat(norm, {"linf": 0.05, "l2": 0.2}[norm])
    gradient = ((model.weight[1 - y] - model.weight[y]).reshape(x.shape)).detach()
    start = threat.random_start(x, Stream(0, "start"), torch.arange(20))
    aim = threat.project(x + 1e3 * gradient, x)
    most, gain = promise(threat, gradient, start, x), (gradient * (aim - start)).flatten(1).sum(1)
    assert bool((most >= gain - 1e-4).all())
    assert norm == "l2" or torch.allclose(most, gain, atol=1e-4)
    assert bool((promise(threat, gradient, aim, x) <= 0.01 * gain).all())


@pytest.mark.parametrize("size", [1, 7, 64])
def test_results_do_not_depend_on_batches_and_order(size: int):
    model, x, y = _net()
    threat, ids = Threat("linf", 0.06), torch.arange(100, 160)
    attack = Short(audit=0.0)
    whole = attack.run(Oracle(model), x, y, threat, ids=ids)
    _equal(whole, attack.run(Oracle(model, batch_size=size), x, y, threat, ids=ids))
    order = Stream(0, "order").uniform(torch.arange(60), ()).argsort()
    shuffled = attack.run(Oracle(model), x[order], y[order], threat, ids=ids[order])
    assert torch.equal(whole.status[order], shuffled.status)
    parts = [attack.run(Oracle(model), x[p], y[p], threat, ids=ids[p]) for p in torch.arange(60).split(size)]
    assert torch.equal(whole.status, torch.cat([part.status for part in parts]))
    assert torch.equal(whole.forwards, torch.cat([part.forwards for part in parts]))


def test_targets_are_reached_and_the_audit_respects_them():
    model = linear(5)
    x, y = samples(model, 30)
    targets = (y + 1) % 5
    found = Sharp(audit=1.0).run(Oracle(model), x, y, Threat("linf", 0.5, targeted=True), targets=targets)
    assert bool(found.found.all())
    assert torch.equal(model(found.x_adv).argmax(1), targets)


@dataclass(frozen=True, kw_only=True)
class Careless(Sharp):
    """Gives up after a single step, so that the audit has something to overturn."""

    @property
    def rounds(self) -> tuple[Round, ...]:
        return (Round(1, (Lane(),), keep=0.0),)


def _shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maodun.attacks.sharp.AutoAttack", lambda: AutoAttack(steps=20, queries=10))


def test_the_audit_is_booked(monkeypatch: pytest.MonkeyPatch):
    _shorten(monkeypatch)
    model, x, y = _net()
    threat, ids = Threat("linf", 0.1), torch.arange(60) + 1000
    bare = Careless(audit=0.0).run(Oracle(model), x, y, threat, ids=ids)
    half = Careless(audit=0.5).run(Oracle(model), x, y, threat, ids=ids)
    full = AutoAttack(steps=20, queries=10).run(Oracle(model), x, y, threat, ids=ids)
    given_up = bare.status == int(Status.exhausted_steps)
    drawn = Stream(0, "sharp/audit").uniform(ids, ()) < 0.5
    assert int(given_up.sum()) > 5 and torch.equal(half.audited, given_up & drawn)
    assert torch.equal(half.overturned, half.audited & full.found) and int(half.overturned.sum()) > 0
    assert torch.equal(half.found, bare.found | half.overturned)
    assert torch.equal(half.forwards[~half.audited], bare.forwards[~half.audited])
    assert bool((half.forwards[half.audited] > bare.forwards[half.audited]).all())
    verdict = judge(model, half.x_adv, x, y, threat, rule=Rule("single"))
    assert torch.equal(verdict.success, half.found)
    n, wrong = int(half.audited.sum()), int(half.overturned.sum())
    assert f"{n} were audited" in half.notes[0] and f"overturned {wrong} " in half.notes[0]
    assert "No audit" in bare.notes[0]


def test_who_is_audited_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch):
    _shorten(monkeypatch)
    model, x, y = _net()
    ids, threat, attack = torch.arange(60), Threat("linf", 0.05), Careless(audit=0.3)
    whole = attack.run(Oracle(model), x, y, threat, ids=ids)
    parts = [attack.run(Oracle(model), x[p], y[p], threat, ids=ids[p]) for p in (ids[:13], ids[13:])]
    assert torch.equal(whole.audited, torch.cat([part.audited for part in parts]))
    assert torch.equal(whole.status, torch.cat([part.status for part in parts]))


def test_a_budget_is_kept_and_rules_out_the_audit():
    model, x, y = _net(20)
    found = Sharp(audit=1.0).run(Oracle(model, budget=Budget(backwards=30)), x, y, Threat("linf", 0.05))
    assert int(found.backwards.max()) <= 30 and not bool(found.audited.any())
    assert "No audit" in found.notes[0]


def test_masked_gradients_are_not_taken_for_robustness():
    # Flat: no gradient anywhere. Such samples stay to the end instead of being given up after one run.
    x = torch.full((4, 1, 4, 5), 0.5)
    found = Short(audit=0.0).run(
        Oracle(Flat()), x, torch.zeros(4, dtype=torch.long), Threat("linf", 0.1), check_model=False
    )
    assert bool((found.queries > FEW[2].queries).all())
    assert bool((found.status == int(Status.zero_gradient)).all())


def test_huge_logits_do_not_saturate_the_first_run():
    model = linear(5, scale=1e4)
    x, y = samples(model, 30)
    threat = Threat("linf", float(nearest(model, x, "linf").max()) * 1.05)
    assert bool(QUIET.run(Oracle(model), x, y, threat).found.all())


def test_radius_zero_and_infinite_radius():
    model, x, y = _net(20)
    nothing = QUIET.run(Oracle(model), x, y, Threat("linf", 0.0))
    assert not bool(nothing.found.any()) and torch.equal(nothing.x_adv, x)
    assert bool(QUIET.run(Oracle(model), x, y, Threat("linf")).found.all())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_best_point_of_a_run_is_inside_the_ball_and_no_success_is_lost(norm: str):
    model, x, y = _net()
    threat = Threat(norm, {"linf": 0.1, "l2": 0.3}[norm])
    points: list[tuple[Tensor, Tensor]] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Short):
        @staticmethod
        def _harvest(problem: Problem, state: SharpState) -> None:
            Short._harvest(problem, state)
            points.append((threat.contains(state.x, problem.x), state.margin[~problem.ledger.finished[problem.rows]]))

    Watched(audit=0.0, widen=1.0).run(Oracle(model), x, y, threat)
    assert len(points) == len(FEW)
    for inside, standing in points:
        assert bool(inside.all()) and bool((standing <= 0).all())


def test_a_run_ends_inside_the_ball_though_it_began_in_a_wider_one():
    model, x, y = _net(10)
    seen: list[Tensor] = []

    class Spy(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            seen.append((inputs.detach() - x).abs().amax((1, 2, 3)))
            return model(inputs)

    @dataclass(frozen=True, kw_only=True)
    class Wide(Sharp):
        @property
        def rounds(self) -> tuple[Round, ...]:
            return (Round(20, (Lane(),)),)

    attack = Wide(audit=0.0, widen=0.5)
    attack.run(Oracle(Spy(), stochastic=False, batch_size=64), x, y, Threat("linf", 1e-4), check_model=False)
    radii = torch.stack(seen[1:22]) / 1e-4
    assert float(radii[1:9].max()) > 1.1 and float(radii[11:].max()) < 1.01


def test_l1_is_refused_in_favour_of_autoattack():
    model, x, y = _net(4)
    with pytest.raises(UnsupportedError, match="l1"):
        Sharp().run(Oracle(model), x, y, Threat("l1", 1.0))


@pytest.mark.parametrize("options", [{"audit": 1.5}, {"audit": -0.1}, {"patience": -1.0}, {"widen": float("nan")}])
def test_unusable_options_are_refused(options: dict[str, float]):
    with pytest.raises(InputError):
        build_attack("sharp", **options)


def test_it_finds_what_autoattack_finds():
    from maodun.zoo import load_data, load_model

    model, data = load_model("zoo:digits-cnn-at").model, load_data("digits", limit=60)
    threat = Threat("linf", 0.15)
    full = AutoAttack(steps=50, queries=100).run(Oracle(model), data.x, data.y, threat)
    fast = QUIET.run(Oracle(model), data.x, data.y, threat)
    assert isinstance(fast, SharpCandidates)
    assert int((full.found & ~fast.found).sum()) <= 1
    assert int(fast.backwards.sum()) < 0.5 * int(full.backwards.sum())
