"""DeepFool: exact prices, classes, walls, and the shortened last step."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import Counting, Linear, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.minimum.deepfool import DeepFool
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat


def _run(attack, model, x, y, norm="l2", **options):
    return attack.run(Oracle(model), x, y, Threat(norm), check_model=False, **options)


class Bent(nn.Module):
    """A linear model seen through a curve, so that one linearisation falls short of the boundary."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        z = self.linear(x)
        spread = z - z.mean(1, keepdim=True)
        return spread * spread.abs()


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_step_costs_a_forward_and_a_backward_per_rival_and_only_while_needed(classes, norm):
    model = Counting(linear(classes=classes))
    x, y = samples(model.model, 9)
    found = _run(DeepFool(), model, x, y, norm)
    # One step: its forward and gradients, the query that ends it, one query nearer, and the clean pass.
    assert (found.backwards == classes - 1).all() and (found.forwards == 4).all()
    assert model.backward_rows == 9 * (classes - 1) and model.weight_gradients == 0
    model.clear()
    bent = Counting(Bent(model.model))
    found = _run(DeepFool(refine=False), bent, x, y, norm)
    steps = found.backwards // (classes - 1)
    assert found.found.all() and int(steps.max()) > 1
    assert (found.forwards == 1 + 2 * steps).all()
    assert bent.backward_rows == int(found.backwards.sum()) and bent.graph_rows == int(steps.sum())


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_no_overshoot_lands_on_the_boundary(norm):
    model = linear(classes=4)
    x, y = samples(model, 12)
    seen: list[Tensor] = []

    class Watch(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            seen.append(z.detach().clone())
            return model(z)

    _run(DeepFool(steps=1, overshoot=0.0, refine=False), Watch(), x, y, norm)
    with torch.no_grad():
        top = model(seen[-1]).topk(2, dim=1).values
    assert seen[-1].shape == x.shape
    assert torch.allclose(top[:, 0], top[:, 1], atol=1e-5)


def test_the_shortened_step_halves_nothing_but_the_overshoot():
    model = linear(classes=4)
    x, y = samples(model, 12)
    exact = nearest(model, x, "l2")
    plain = _run(DeepFool(overshoot=0.1, refine=False), model, x, y).distance / exact
    short = _run(DeepFool(overshoot=0.1), model, x, y).distance / exact
    assert torch.allclose(plain, torch.full_like(plain, 1.1), rtol=1e-4)
    assert (short < 1.02).all() and (short > 1.0).all()


def test_fewer_classes_cost_less_and_find_the_nearest_of_those():
    model = linear(classes=12)
    x, y = samples(model, 10)
    few, every = (_run(DeepFool(classes=count), model, x, y) for count in (3, None))
    assert (few.backwards % 2 == 0).all() and (every.backwards % 11 == 0).all()
    assert (every.distance <= few.distance * (1 + 1e-3)).all()
    assert torch.allclose(every.distance, nearest(model, x, "l2"), rtol=1e-2)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_walls_in_the_way_do_not_stop_it(norm):
    # All entries but eight stand at the wall they would have to cross.
    model = linear(classes=2)
    difference = (model.weight[1] - model.weight[0]).detach()
    x = (difference > 0).float().expand(4, -1).clone()
    x[:, :8] = 0.5
    gap = 0.2 * float(difference[:8].abs().sum())
    with torch.no_grad():
        model.bias.copy_(torch.tensor([float(difference @ x[0]) + gap, 0.0]))
    y = torch.zeros(4, dtype=torch.int64)
    found = _run(DeepFool(), model, x, y, norm)
    assert found.found.all()
    assert int(found.backwards.max()) <= 4
