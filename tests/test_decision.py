"""Attacks that see labels only: closed-form distances, one price per question, own randomness, and honest endings."""

from __future__ import annotations

import pytest
import torch
from oracles import Counting, Flat, Noisy, Sphere, linear, nearest, samples

from maodun.attacks.query.asking import Asking, anywhere, normal_at
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Budget, Oracle, Session
from maodun.core.problem import Ledger, Problem
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

CASES = [
    ("rays", "linf", {"queries": 600}, 1.02),
    ("hopskipjump", "linf", {"steps": 12}, 1.06),
    ("hopskipjump", "l2", {"steps": 12}, 1.03),
    ("geoda", "linf", {"queries": 3000}, 1.06),
    ("geoda", "l2", {"queries": 3000}, 1.03),
    ("boundary", "l2", {"steps": 1500}, 1.06),
]
BRIEF = {
    "rays": {"queries": 80}, "hopskipjump": {"steps": 2, "draws": 20}, "geoda": {"steps": 2, "queries": 60},
    "boundary": {"steps": 60},
}  # fmt: skip
AIMED = {"hopskipjump": {"steps": 12}, "boundary": {"steps": 500}, "geoda": {}}
CURVED = {"hopskipjump": {"steps": 20}, "geoda": {"queries": 4000}, "boundary": {"steps": 1200}}
EACH = [(name, norm) for name, norm, _, _ in CASES]


def _run(name, norm, model, x, y, *, budget=None, run=None, batch_size=None, stochastic=None, **options):
    paid = Budget(queries=budget)
    oracle = Oracle(model, access="decision", budget=paid, batch_size=batch_size, stochastic=stochastic)
    return build_attack(name, **options).run(oracle, x, y, Threat(norm), check_model=False, **(run or {}))


@pytest.mark.parametrize(("name", "norm", "options", "factor"), CASES)
def test_the_nearest_point_of_a_linear_model_is_found_from_labels(name, norm, options, factor):
    # Two classes: with more, every face of the class's region holds an optimum that walking along it cannot leave.
    model = linear(2)
    x, y = samples(model, 16)
    found = _run(name, norm, model, x, y, **options)
    assert found.found.all() and (model(found.x_adv).argmax(1) != y).all()
    best = nearest(model, x, norm)
    assert torch.allclose(found.distance, Threat(norm).distance(found.x_adv, x))
    assert (found.distance >= best * (1 - 1e-4)).all()
    assert (found.distance / best).median() <= factor


@pytest.mark.parametrize(("name", "norm"), [case for case in EACH if case[1] == "l2"])
def test_a_curved_boundary_is_followed(name, norm):
    model = Sphere(0.8)
    x = 0.5 + 0.25 * (Stream(0, "x").uniform(torch.arange(4), (1, 4, 6)) - 0.5)
    y = model(x).argmax(1)
    found = _run(name, norm, model, x, y, **CURVED[name])
    assert found.found.all()
    assert (found.distance / model.distance(x)).median() <= 1.04


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_batches_and_order_change_nothing(name, norm):
    model = linear()
    x, y = samples(model, 20)
    ids = torch.arange(20)
    whole = _run(name, norm, model, x, y, batch_size=64, **BRIEF[name])
    for size in (1, 7):
        other = _run(name, norm, model, x, y, batch_size=size, **BRIEF[name])
        assert torch.allclose(other.x_adv, whole.x_adv, atol=1e-4) and torch.equal(other.queries, whole.queries)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    other = _run(name, norm, model, x[order], y[order], run={"ids": ids[order]}, **BRIEF[name])
    assert torch.allclose(other.x_adv, whole.x_adv[order], atol=1e-4)
    assert torch.equal(other.queries, whole.queries[order])
    alone = _run(name, norm, model, x[9:10], y[9:10], run={"ids": ids[9:10]}, **BRIEF[name])
    assert torch.allclose(alone.distance, whole.distance[9:10], rtol=1e-3)


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_a_query_is_one_forward_and_nothing_else(name, norm):
    model = Counting(linear())
    x, y = samples(linear(), 12)
    model.clear()
    found = _run(name, norm, model, x, y, batch_size=64, stochastic=False, **BRIEF[name])
    assert torch.equal(found.queries, found.forwards) and not found.backwards.any()
    assert model.graph_rows == 0
    assert model.rows == int(found.queries.sum())


@pytest.mark.parametrize(("name", "norm"), EACH)
@pytest.mark.parametrize("budget", [1, 3, 30, 77])
def test_a_budget_is_kept_per_sample_and_what_was_found_stays(name, norm, budget):
    model = linear()
    x, y = samples(model, 12)
    # One sample that fools itself early must not change what the others do.
    found = _run(name, norm, model, x, y, budget=budget)
    assert (found.queries <= budget).all()
    assert (found.queries >= budget - 40).all()
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.found)
    assert (found.status[~found.found] == int(Status.exhausted_budget)).all()
    alone = _run(name, norm, model, x[5:6], y[5:6], budget=budget, run={"ids": torch.tensor([5])})
    assert torch.equal(alone.found, found.found[5:6])
    assert torch.allclose(alone.distance, found.distance[5:6], rtol=1e-3)


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_near_enough_ends_a_search(name, norm):
    model = linear()
    x, y = samples(model, 12)
    long = _run(name, norm, model, x, y, **BRIEF[name])
    short = _run(name, norm, model, x, y, **BRIEF[name], run={"enough": float(long.distance.max()) * 1.5})
    assert short.found.all() and (short.distance <= float(long.distance.max()) * 1.5).all()
    assert (short.queries < long.queries).all()


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_where_nothing_fools_the_model_nothing_is_claimed(name, norm):
    model = Flat(3)
    x = torch.rand(4, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    found = _run(name, norm, model, x, torch.zeros(4, dtype=torch.int64), **BRIEF[name])
    assert not found.found.any() and (found.status == int(Status.exhausted_steps)).all()
    assert torch.equal(found.x_adv, x) and not found.distance.any()


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_walls_odd_shapes_and_two_classes(name, norm):
    for shape in ((24,), (2, 3, 4), (1, 1, 24)):
        model = linear(2)
        x = Stream(0, "wall").uniform(torch.arange(10), shape).round()  # every pixel at 0 or 1
        y = model(x).argmax(1)
        found = _run(name, norm, model, x, y, **BRIEF[name])
        assert found.found.all() and torch.isfinite(found.x_adv).all()
        assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1 and (model(found.x_adv).argmax(1) != y).all()


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_a_noisy_model_is_fooled_for_sure(name, norm):
    model = Noisy(linear(), 0.02)
    x, y = samples(linear(), 6)
    found = _run(name, norm, model, x, y, **BRIEF[name])
    assert found.found.float().mean() >= 0.5
    wide = found.x_adv[found.found]
    noise = 0.02 * Stream(0, "fresh").normal(torch.arange(40), tuple(wide.shape))
    fooled = torch.stack([linear()(wide + one).argmax(1) for one in noise]) != y[found.found]
    assert fooled.float().mean() > 0.7


@pytest.mark.parametrize("name", ["hopskipjump", "boundary", "geoda"])
def test_a_target_is_reached_from_images_of_the_batch(name):
    model = linear()
    x, y = samples(model, 40)
    targets = y.roll(1)
    rows = targets != y
    x, y, targets = x[rows], y[rows], targets[rows]
    oracle = Oracle(model, access="decision")
    found = build_attack(name, starts="batch", **AIMED[name]).run(
        oracle, x, y, Threat("l2", targeted=True), targets=targets
    )
    assert found.found.all() and torch.equal(model(found.x_adv).argmax(1), targets)
    far = x.flatten(1)
    others = torch.cdist(far, far).masked_fill(targets[:, None] != y, float("inf")).amin(1)
    assert (found.distance < 0.9 * others).float().mean() > 0.9


def test_the_normal_of_a_plane_is_the_mean_of_the_votes():
    model = linear(2)
    x, y = samples(model, 4)
    weight = (model.weight[1] - model.weight[0]).detach()
    with torch.no_grad():
        gap = model(x)[:, 1] - model(x)[:, 0]
    edge = x - (gap / weight.square().sum()).reshape(-1, 1, 1, 1) * weight.reshape(1, 1, 4, 6)
    session = Session(Oracle(model, access="decision"), x, torch.arange(4), 0)
    threat, rows = Threat("l2"), torch.arange(4)
    problem = Problem(x, y, None, rows, rows, threat, session, Ledger(session, x, threat, True, None, True))
    asking, everyone = Asking.of(problem), torch.ones(4, dtype=torch.bool)
    normal, made = normal_at(asking, edge, torch.full((4,), 0.01), 4000, everyone, anywhere(Stream(0, "u"), 24), 1)
    true = torch.where((y == 0)[:, None], weight, -weight) / weight.norm()
    assert (made == 4000).all() and torch.equal(session.meter.queries, made)
    # Votes of n draws in D dimensions miss the normal by about sqrt(pi D / (2 n)).
    assert ((normal.flatten(1) * true).sum(1) > 0.99).all()
    assert torch.allclose(normal.flatten(1).norm(dim=1), torch.ones(4))


def test_rays_is_exact_in_two_dimensions():
    model = linear(2, 2)
    x, y = samples(model, 8, (2,))
    found = _run("rays", "linf", model, x, y, queries=60, tolerance=1e-4)
    assert torch.allclose(found.distance, nearest(model, x, "linf"), atol=2e-4)
    assert (found.queries < 60).all()  # a round of all blocks that changes nothing ends the search


def test_what_cannot_be_meant_is_refused():
    model = linear()
    x, y = samples(model, 4)
    with pytest.raises(UnsupportedError, match="targeted"):
        build_attack("rays").run(Oracle(model), x, y, Threat("linf", targeted=True), targets=(y + 1) % 5)
    with pytest.raises(UnsupportedError, match="l1"):
        build_attack("hopskipjump").run(Oracle(model), x, y, Threat("l1"))
    for name, options in (("rays", {"queries": 0}), ("rays", {"tolerance": 0.0}), ("hopskipjump", {"draws": 0})):
        with pytest.raises(InputError):
            build_attack(name, **options)
    with pytest.raises(InputError, match="starts"):
        build_attack("hopskipjump", starts="pool")
