"""FAB: what is batched changes nothing, what is counted is true, and the schedule is the published one."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracles import Counting, Sphere, linear, nearest, samples

from maodun.attacks.minimum.fab import FAB
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.threat import Threat


def _run(attack, model, x, y, norm="linf", **options):
    return attack.run(Oracle(model), x, y, Threat(norm), check_model=False, **options)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_running_several_targets_at_once_changes_no_result(norm):
    model = linear(classes=6)
    x, y = samples(model, 5)
    alone = _run(FAB(steps=6, together=1), model, x, y, norm)
    for together in (10, 64):
        wide = _run(FAB(steps=6, together=together), model, x, y, norm)
        assert torch.allclose(wide.distance, alone.distance, rtol=1e-4)
        assert torch.equal(wide.backwards, alone.backwards) and torch.equal(wide.forwards, alone.forwards)


def test_several_targets_at_once_make_fewer_calls_of_as_many_rows():
    plain = linear(classes=6)
    x, y = samples(plain, 4)
    calls, rows = [], []
    for together in (1, 32):
        model = Counting(plain)
        _run(FAB(steps=10, together=together), model, x, y)
        calls.append(model.calls)
        rows.append(model.backward_rows)
    assert rows[0] == rows[1]
    assert calls[1] < calls[0] / 4


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (3, 2), (12, 9)])
def test_every_target_costs_two_forwards_and_one_backward_a_step(classes, targets):
    model = linear(classes=classes)
    x, y = samples(model, 3)
    found = _run(FAB(steps=7), model, x, y)
    assert (found.backwards == 7 * targets).all()
    assert (found.forwards == 1 + 2 * 7 * targets).all()


def test_without_a_sweep_every_step_looks_at_all_boundaries():
    model = linear(classes=5)
    x, y = samples(model, 6)
    found = _run(FAB(steps=60, sweep=False, targets=None), model, x, y)
    assert (found.backwards == 60 * 4).all() and (found.forwards == 1 + 2 * 60).all()
    assert torch.allclose(found.distance, nearest(model, x, "linf"), rtol=1e-2)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_restarts_begin_elsewhere_and_reach_the_same_boundary(norm):
    model = linear(classes=3)
    x, y = samples(model, 4)
    exact = nearest(model, x, norm)
    once = _run(FAB(steps=60), model, x, y, norm)
    thrice = _run(FAB(steps=60, restarts=3), model, x, y, norm)
    assert (thrice.backwards == 3 * once.backwards).all()
    assert (thrice.distance <= once.distance + 1e-6).all()
    assert torch.allclose(thrice.distance, exact, rtol=1e-2)


def test_a_curved_boundary_is_walked_to_its_nearest_point():
    # From inside, every start moves outwards, the boundary bends away, and only the pull to the input gets it right.
    model = Sphere(0.7)
    x, y = samples(model, 8)
    found = _run(FAB(steps=100), model, x, y, "l2")
    assert found.found.all()
    assert float((found.distance / model.distance(x)).max()) < 1.015


def test_a_plane_beyond_the_box_is_given_up_with_the_clean_input():
    model = linear(classes=2)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1e4, -1e4]))
    x = torch.full((3, 24), 0.5)
    found = _run(FAB(steps=5), model, x, torch.zeros(3, dtype=torch.int64))
    assert (found.status == int(Status.exhausted_steps)).all()
    assert torch.equal(found.x_adv, x)


def test_a_sweep_needs_a_number_of_targets():
    with pytest.raises(InputError, match="targets"):
        FAB(targets=None)
    assert FAB().total_steps == 900 and FAB(sweep=False).total_steps == 100
    assert math.isinf(Threat("linf").eps)
