"""Carlini and Wagner: confidence, the bracket of the constant, early abort, and what each row costs."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracles import SHAPES, Counting, linear, nearest, samples

from maodun.attacks.minimum.cw import CW
from maodun.core.losses import margin
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat


def _run(attack, model, x, y, **options):
    threat = Threat("l2", math.inf, targeted="targets" in options)
    return attack.run(Oracle(model), x, y, threat, check_model=False, **options)


@pytest.mark.parametrize("targeted", [False, True])
def test_confidence_is_met_by_every_candidate_and_hardly_exceeded(targeted):
    model = linear(classes=2)
    x, y = samples(model, 10)
    options = {"targets": 1 - y} if targeted else {}
    found = _run(CW(steps=150, searches=4, initial_const=0.1, kappa=0.5), model, x, y, **options)
    assert found.found.all()
    with torch.no_grad():
        reached = margin(model(found.x_adv), y, None)
    assert (reached >= 0.5 - 1e-5).all() and (reached <= 0.7).all()
    assert (found.distance > nearest(model, x, "l2")).all()


def test_more_searches_never_find_a_worse_candidate():
    model = linear(classes=2)
    x, y = samples(model, 16)
    reach = [_run(CW(steps=60, searches=count), model, x, y).distance for count in (1, 3, 5)]
    found = [torch.where(each > 0, each, torch.inf) for each in reach]
    assert (found[1] <= found[0] + 1e-6).all() and (found[2] <= found[1] + 1e-6).all()
    # The first constant is far too small for most: without its growth by tens they would not be found at all.
    assert torch.isinf(found[0]).any() and not torch.isinf(found[2]).any()


def test_without_early_abort_every_row_takes_every_iteration():
    model = Counting(linear())
    x, y = samples(model.model, 6)
    found = _run(CW(steps=15, searches=3, abort_early=False), model, x, y)
    assert (found.backwards == 45).all() and (found.forwards == 46).all()
    assert model.backward_rows == 45 * 6 and model.weight_gradients == 0


def test_early_abort_is_each_rows_own_affair():
    model = linear(classes=2)
    x, y = samples(model, 12)
    attack = CW(steps=300, searches=4, initial_const=0.1)
    together = _run(attack, model, x, y)
    assert int(together.backwards.max()) < 1200
    assert len(set(together.backwards.tolist())) > 1
    for row in (0, 7):
        alone = _run(attack, model, x[row : row + 1], y[row : row + 1])
        assert int(alone.backwards) == int(together.backwards[row])
        assert torch.allclose(alone.distance, together.distance[row : row + 1], rtol=1e-4)
    assert torch.allclose(together.distance, nearest(model, x, "l2"), rtol=1e-2)


def test_all_pixels_saturated_still_gives_full_success():
    model = linear(classes=4, shift=-50.0)
    x = (samples(model, 20, SHAPES[1])[0] > 0.5).float()
    with torch.no_grad():
        y = model(x).argmax(1)
    found = _run(CW(steps=200, searches=6), model, x, y)
    assert found.found.all()
    assert float(found.x_adv.min()) >= 0.0 and float(found.x_adv.max()) <= 1.0
