"""Projected gradient ascent and its relatives: closed-form optima, what restarts and momentum may and may not do."""

from __future__ import annotations

import pytest
import torch
from ascent import Climbed, optimum
from oracles import SHAPES, Counting, Flat, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.gradient.pgd import BIM, FGSM, MIFGSM, NIFGSM, PGD
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

RADII = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
IDS = torch.arange(16)


def _climb(attack, norm: str, shape: tuple[int, ...] = SHAPES[3], eps: float | None = None) -> tuple[Tensor, Tensor]:
    weight = Stream(0, "w").normal(torch.arange(1), shape)[0]
    x = Stream(0, "x").uniform(IDS, shape)
    model = Climbed(weight)
    eps = RADII[norm] if eps is None else eps
    attack.run(
        Oracle(model, batch_size=64), x, torch.zeros(16, dtype=torch.int64), Threat(norm, eps), stop_early=False,
        check_model=False,
    )  # fmt: skip
    return model.best - x.flatten(1) @ weight.flatten(), optimum(weight, x, norm, eps)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("rank", SHAPES)
def test_linear_models_are_climbed_to_the_closed_form_optimum(norm, rank):
    reached, best = _climb(PGD(steps=100), norm, SHAPES[rank])
    assert (reached <= best * 1.0001 + 1e-5).all()
    # Steps of fixed size stay a little inside: in l2 as shrinking comes before clipping, in l1 on the way to the walls.
    assert (reached >= best * {"linf": 0.999, "l2": 0.95, "l1": 0.85}[norm]).all()
    assert (reached / best).mean() > 0.94


@pytest.mark.parametrize("attack", [FGSM(), BIM(), MIFGSM()])
def test_sign_steps_from_the_clean_input_are_exact_in_linf(attack):
    reached, best = _climb(attack, "linf")
    assert torch.allclose(reached, best, rtol=1e-4)


def test_fgsm_is_exact_in_l2_where_the_box_is_far():
    model = linear(2)
    x, y = samples(model, 32)
    distance = nearest(model, x, "l2")
    eps = float(distance.median()) * 1.0001
    found = FGSM().run(Oracle(model), x, y, Threat("l2", eps))
    assert torch.equal(found.found, distance < eps)


def test_more_steps_and_a_larger_ball_never_lose_a_sample():
    model = linear(2)
    x, y = samples(model, 64)
    for norm in RADII:
        eps = float(nearest(model, x, norm).median())
        sizes = [PGD(steps=30).run(Oracle(model), x, y, Threat(norm, k * eps)).found for k in (0.5, 1.0, 2.0)]
        assert (sizes[0] <= sizes[1]).all() and (sizes[1] <= sizes[2]).all()
        assert 0 < sizes[1].float().mean() < 1
        assert (FGSM().run(Oracle(model), x, y, Threat(norm, 0.9 * eps)).found <= sizes[1]).all()


def test_restarts_only_add_and_only_cost_survivors():
    x = Stream(0, "x").uniform(torch.arange(64), (6,))
    net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 4))
    with torch.no_grad():
        for k, parameter in enumerate(net.parameters()):
            parameter.copy_(2 * Stream(k, "net").normal(torch.arange(parameter.shape[0]), tuple(parameter.shape[1:])))
        y = net(x).argmax(1)
    threat = Threat("linf", 0.08)
    once = PGD(steps=4).run(Oracle(net), x, y, threat)
    often = PGD(steps=4, restarts=4).run(Oracle(net), x, y, threat)
    assert (once.found <= often.found).all() and 0 < once.found.sum() < 64
    left = often.status == int(Status.exhausted_steps)
    assert (often.backwards[left] == 16).all() and (often.forwards[left] == 1 + 4 * 5).all()
    assert torch.equal(often.backwards[once.found], once.backwards[once.found])


def test_a_gradient_of_zero_moves_nothing_and_breaks_nothing():
    x = Stream(0, "x").uniform(IDS, SHAPES[3])
    y = torch.zeros(16, dtype=torch.int64)
    for attack in (PGD(steps=3), FGSM(), MIFGSM(steps=3), NIFGSM(steps=3)):
        for norm, eps in RADII.items():
            found = attack.run(Oracle(Flat()), x, y, Threat(norm, eps), check_model=False)
            assert torch.equal(found.x_adv, x)
            assert (found.status == int(Status.zero_gradient)).all()


@pytest.mark.parametrize("attack", [PGD(steps=5), MIFGSM(steps=5), NIFGSM(steps=5), FGSM()])
def test_calls_are_counted_and_no_weight_gradient_is_taken(attack):
    steps = attack.steps
    model = Counting(linear())
    x, y = samples(model.model, 12)
    model.clear()
    found = attack.run(Oracle(model), x, y, Threat("linf", 1e-5), check_model=False)
    assert (found.forwards == steps + 2).all() and (found.backwards == steps).all() and (found.queries == 2).all()
    assert model.backward_rows == 12 * steps and model.graph_rows == 12 * steps and model.weight_gradients == 0


@pytest.mark.parametrize("norm", RADII)
def test_targeted_success_is_the_target(norm):
    model = linear()
    x, y = samples(model, 32)
    targets = (y + 1) % 5
    found = PGD(steps=40).run(
        Oracle(model), x, y, Threat(norm, 8 * RADII[norm], targeted=True), targets=targets
    )  # fmt: skip
    assert found.found.all()
    assert torch.equal(model(found.x_adv).argmax(1), targets)


def test_a_finished_step_stays_in_the_ball_and_the_box():
    model = linear()
    x = Stream(0, "x").uniform(torch.arange(32), SHAPES[3])
    y = model(x).argmax(1)
    for norm, eps in RADII.items():
        for attack in (PGD(steps=10), MIFGSM(), NIFGSM(), FGSM()):
            found = attack.run(Oracle(model), x, y, Threat(norm, eps))
            assert Threat(norm, eps).contains(found.x_adv, x).all()
            assert found.found.any()


@pytest.mark.parametrize(
    ("options", "word"), [({"steps": 0}, "steps"), ({"restarts": 0}, "restarts"), ({"loss": "cd"}, "loss")]
)
def test_useless_options_are_refused(options, word):
    with pytest.raises(InputError, match=word):
        PGD(**options)
