"""Attacks that see scores only: gradients in closed form, success where it is possible, own randomness, exact price."""

from __future__ import annotations

import pytest
import torch
from oracles import Counting, linear, nearest, samples

from maodun.attacks.query.simba import cosines
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.estimators import NES, SPSA
from maodun.core.oracle import Budget, Oracle
from maodun.core.status import Status
from maodun.core.threat import Threat

LONG = {
    "nes": {"steps": 30}, "spsa": {"steps": 20, "samples": 64}, "bandits": {"steps": 400}, "simba": {"queries": 700},
}  # fmt: skip
BRIEF = {
    "nes": {"steps": 3, "samples": 6}, "spsa": {"steps": 3, "samples": 6}, "bandits": {"steps": 12},
    "simba": {"queries": 24},
}  # fmt: skip
EACH = [(name, norm) for name in BRIEF for norm in ("linf", "l2")]


def _run(name, model, x, y, threat, *, budget=None, batch_size=None, ids=None, **options):
    oracle = Oracle(model, "scores", budget=Budget(queries=budget), batch_size=batch_size, stochastic=False)
    return build_attack(name, **options).run(oracle, x, y, threat, ids=ids, check_model=False)


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_what_a_linear_model_allows_is_found_and_nothing_else(name, norm):
    model = linear(2)
    x, y = samples(model, 16)
    distance = nearest(model, x, norm)
    eps = float(distance.median())
    # Waves cannot fill the corners of a cube one at a time; pixels can.
    basis = {"basis": "pixel"} if (name, norm) == ("simba", "linf") else {}
    found = _run(name, model, x, y, Threat(norm, eps), **LONG[name], **basis)
    assert found.found[distance < 0.9 * eps].all() and not found.found[distance > 1.001 * eps].any()
    assert Threat(norm, eps).contains(found.x_adv, x).all()
    assert torch.equal(model(found.x_adv).argmax(1) != y, found.found)


@pytest.mark.parametrize("estimator", [NES(4000, 0.01), SPSA(4000, 0.01)])
def test_differences_of_a_linear_model_are_its_gradient(estimator):
    model = linear(3)
    x, _ = samples(model, 3)
    session = Oracle(model, "scores", gradient=estimator, stochastic=False).session(x, torch.arange(3), 0)
    _, _, (grad,) = session.estimate(x, torch.arange(3), lambda logits, _: logits[:, :1])
    # The error of n pairs in D dimensions is about |w| sqrt(D / n).
    error = (grad.flatten(1) - model.weight[0]).norm(dim=1) / model.weight[0].norm()
    assert (error < 0.2).all() and (session.meter.queries == 4001).all()


@pytest.mark.parametrize("estimator", [NES(20, 0.01), SPSA(20, 0.01)])
def test_draws_do_not_depend_on_how_many_pass_at_once(estimator):
    model = Counting(linear(3))
    x, _ = samples(linear(3), 5)
    grads, calls = [], []
    for size in (1, 8, 1000):
        oracle = Oracle(model, "scores", gradient=estimator, stochastic=False, batch_size=size)
        model.clear()
        grads.append(oracle.session(x, torch.arange(5), 0).estimate(x, torch.arange(5), lambda z, _: z[:, :1])[2][0])
        calls.append(model.calls)
    assert torch.allclose(grads[0], grads[1], atol=1e-4) and torch.allclose(grads[0], grads[2], atol=1e-4)
    assert calls[2] == 2 and calls[2] < calls[1] < calls[0]  # the point itself, then all draws in one forward


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_batches_and_order_change_nothing(name, norm):
    model = linear()
    x, y = samples(model, 20)
    ids = torch.arange(20)
    threat = Threat(norm, 0.6 * float(nearest(model, x, norm).median()))
    whole = _run(name, model, x, y, threat, batch_size=64, **BRIEF[name])
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    for size in (1, 7):
        other = _run(name, model, x[order], y[order], threat, batch_size=size, ids=ids[order], **BRIEF[name])
        assert torch.equal(other.found, whole.found[order]) and torch.equal(other.queries, whole.queries[order])
        assert torch.allclose(other.x_adv, whole.x_adv[order], atol=1e-4)


@pytest.mark.parametrize(("name", "norm"), EACH)
def test_a_query_is_one_forward_and_nothing_else(name, norm):
    model = Counting(linear())
    x, y = samples(linear(), 12)
    model.clear()
    found = _run(name, model, x, y, Threat(norm, 1e-6), batch_size=64, **BRIEF[name])
    assert torch.equal(found.queries, found.forwards) and not found.backwards.any() and model.graph_rows == 0
    assert model.rows == int(found.queries.sum())
    price = {"nes": 2 + 3 * 7, "spsa": 2 + 3 * 7, "bandits": 2 + 2 * 12, "simba": 1 + 24}[name]
    assert (found.queries[:2] <= price + (12 if name == "bandits" else 0)).all()
    assert name == "bandits" or (found.queries == price).all()


@pytest.mark.parametrize(("name", "norm"), EACH)
@pytest.mark.parametrize("budget", [1, 9, 20])
def test_a_budget_is_kept_per_sample(name, norm, budget):
    model = linear()
    x, y = samples(model, 12)
    threat = Threat(norm, 0.5 * float(nearest(model, x, norm).min()))
    found = _run(name, model, x, y, threat, budget=budget, **LONG[name])
    assert (found.queries <= budget).all() and not found.found.any()
    assert (found.status == int(Status.exhausted_budget)).all()


@pytest.mark.parametrize("name", BRIEF)
def test_targets_walls_and_odd_shapes(name):
    for shape in ((24,), (2, 3, 4), (1, 1, 24), (6, 2, 2)):
        model = linear(3)
        x = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0)).round()
        y = model(x).argmax(1)
        threat = Threat("linf", 0.9, targeted=True)
        options = {**LONG[name], **({"basis": "pixel"} if name == "simba" else {})}
        targets = (y + 1) % 3
        oracle = Oracle(model, "scores", stochastic=False)
        found = build_attack(name, **options).run(oracle, x, y, threat, targets=targets, check_model=False)
        assert found.found.all() and torch.equal(model(found.x_adv).argmax(1), targets)


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_waves_are_orthogonal_and_of_length_one(size):
    waves = cosines(size, "l2")
    assert torch.allclose(waves @ waves.T, torch.eye(size), atol=1e-6)
    assert torch.allclose(cosines(size, "linf").abs().amax(1), torch.ones(size))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nes", {"samples": 1}), ("spsa", {"sigma": 0.0}), ("nes", {"momentum": 1.0}), ("simba", {"queries": 0}),
        ("simba", {"basis": "haar"}), ("simba", {"step_size": -1.0}), ("bandits", {"tile": 0}),
        ("bandits", {"steps": 0}),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(name, options):
    with pytest.raises(InputError):
        build_attack(name, **options)
