"""The search for confident wrong answers: closed form on a linear model, no early rest, no excuse for clean errors."""

from __future__ import annotations

import pytest
import torch
from tests.oracles import Linear, linear, samples

from maodun.attacks.gradient.apgd import APGD
from maodun.attacks.gradient.confident import MaximalConfidence
from maodun.core.errors import InputError
from maodun.core.losses import confidence
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat


def _two(scale: float = 0.2) -> Linear:
    return linear(classes=2, scale=scale)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_two_linear_classes_are_driven_to_the_closed_form_probability(norm):
    model, eps = _two(), 0.1
    x, y = samples(model, 16)
    y[:4] = 1 - y[:4]  # clean errors are to become surer too
    found = MaximalConfidence(steps=40).run(Oracle(model), x, y, Threat(norm, eps))
    weight = model.weight[1] - model.weight[0]
    reach = eps * (weight.abs().sum() if norm == "linf" else weight.norm()) * model.scale
    with torch.no_grad():
        logits = model(x)
        rise = (logits.gather(1, 1 - y[:, None]) - logits.gather(1, y[:, None])).squeeze(1) + reach
        got = model(found.x_adv).softmax(1).gather(1, 1 - y[:, None]).squeeze(1)
    assert torch.allclose(got, torch.sigmoid(rise), atol=2e-4)


def test_it_goes_on_where_others_rest_and_hands_over_what_did_not_fool():
    model = linear(scale=3.0)
    x, y = samples(model, 24)
    oracle, threat = Oracle(model), Threat("linf", 0.05)
    rests, sure = (attack.run(oracle, x, y, threat) for attack in (APGD(steps=20), MaximalConfidence(steps=20)))
    moved = (sure.x_adv != x).flatten(1).any(1)
    assert moved.all() and threat.contains(sure.x_adv, x).all()
    both = rests.found & sure.found
    assert int(both.sum()) > 0
    with torch.no_grad():
        value = [confidence(model(found.x_adv), y)[both] for found in (rests, sure)]
    assert (value[1] >= value[0] - 1e-5).all() and float((value[1] - value[0]).mean()) > 0.1
    assert torch.equal(sure.forwards, torch.full((24,), 3 * 21 + 1))


@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_and_order_change_nothing(size):
    model = linear()
    x, y = samples(model, 19)
    attack, threat = MaximalConfidence(steps=10), Threat("linf", 0.05)
    whole = attack.run(Oracle(model), x, y, threat)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(size))
    other = attack.run(Oracle(model, batch_size=size), x[order], y[order], threat, ids=order)
    assert torch.allclose(other.x_adv, whole.x_adv[order], atol=1e-6)


def test_the_loss_by_hand_and_its_gradient_on_a_saturated_model():
    z = torch.tensor([[300.0, 0.0, -5.0], [0.0, 1.0, 1.0]], dtype=torch.float32, requires_grad=True)
    value = confidence(z, torch.tensor([0, 0]))
    assert value.tolist() == pytest.approx([-300.0, float(torch.log_softmax(z[1].detach(), 0)[1])])
    (grad,) = torch.autograd.grad(value.sum(), z)
    assert grad[0].tolist() == [-1.0, 1.0, 0.0]
    aimed = confidence(z, torch.tensor([0, 0]), torch.tensor([2, 2]))
    assert aimed.tolist() == pytest.approx([-305.0, float(torch.log_softmax(z[1].detach(), 0)[2])])


def test_more_targets_and_starts_are_surer_and_the_usual_set_is_there_too():
    model = linear(scale=3.0)
    x, y = samples(model, 24)
    threat = Threat("linf", 0.05)
    value = []
    for attack in (MaximalConfidence(steps=10, targets=1), MaximalConfidence(steps=10, targets=4, restarts=2)):
        with torch.no_grad():
            value.append(confidence(model(attack.run(Oracle(model), x, y, threat).x_adv), y))
    assert (value[1] >= value[0] - 1e-3).all() and float((value[1] - value[0]).max()) > 0.1
    usual = MaximalConfidence(loss="ce", steps=5).run(Oracle(model), x, y, Threat("linf", 0.01))
    assert (usual.x_adv != x).flatten(1).any(1).all() and int(usual.forwards.max()) == 6
    with pytest.raises(InputError, match="targets 0"):
        MaximalConfidence(targets=0)


def test_a_given_target_is_what_it_is_made_sure_of():
    model = linear()
    x, y = samples(model, 12)
    targets = (y + 2) % 5
    found = MaximalConfidence(steps=20).run(Oracle(model), x, y, Threat("linf", 0.05, targeted=True), targets=targets)
    with torch.no_grad():
        before, after = (model(each).softmax(1).gather(1, targets[:, None]) for each in (x, found.x_adv))
    assert (after > before).all()
