"""Minimum-norm attacks against closed forms, then invariances, endings and prices."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.linalg import hadamard
from tests.oracles import SHAPES, Counting, Flat, Linear, Sphere, distances, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.minimum.cw import CW
from maodun.attacks.minimum.ddn import DDN
from maodun.attacks.minimum.deepfool import DeepFool
from maodun.attacks.minimum.fab import FAB
from maodun.attacks.minimum.fmn import FMN
from maodun.core.engine import Attack
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.threat import Threat

ALL = [
    (DeepFool(), "l2"),
    (DeepFool(), "linf"),
    (CW(steps=300, searches=6), "l2"),
    (DDN(steps=300), "l2"),
    (FMN(steps=300), "l2"),
    (FMN(steps=300), "linf"),
    (FAB(), "l2"),
    (FAB(), "linf"),
    (FAB(), "l1"),
]
NAMES = [f"{attack.name}-{norm}" for attack, norm in ALL]
QUICK = [
    (DeepFool(steps=8), "l2"),
    (CW(steps=20, searches=3), "l2"),
    (DDN(steps=20), "l2"),
    (FMN(steps=20), "linf"),
    (FAB(steps=10), "linf"),
]


def _run(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, norm: str, **options):
    targets = options.get("targets")
    threat = Threat(norm, math.inf, targeted=targets is not None)
    return attack.run(Oracle(model, channels_last=False), x, y, threat, check_model=False, **options)


def _bounded(limit: float, attack: Attack, found, exact: Tensor) -> None:
    assert found.found.all(), attack
    ratio = found.distance / exact
    assert float(ratio.min()) >= 1 - 1e-4 and float(ratio.max()) <= limit, (attack, ratio.min(), ratio.max())


def _even() -> Linear:
    """Five classes whose weights are rows of a Hadamard matrix: every two differ by the same length in every norm.

    The likeliest rival is then also the nearest, as attacks that climb a loss suppose; the scale makes cross-entropy
    see that rival alone instead of a mixture of all.
    """
    weight = torch.tensor(hadamard(8)[1:6], dtype=torch.float32).repeat(1, 3)
    return Linear(weight, -weight.sum(1) / 2, scale=30.0).eval()


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=NAMES)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_linear_model_is_left_at_the_closed_form_distance(attack, norm, rank):
    model = _even()
    x, y = samples(model, 12, SHAPES[rank])
    limit = 1.0 + attack.overshoot + 1e-3 if isinstance(attack, DeepFool) else 1.01
    _bounded(limit, attack, _run(attack, model, x, y, norm), nearest(model, x, norm))


@pytest.mark.parametrize(("attack", "norm"), [entry for entry in ALL if isinstance(entry[0], DeepFool | FAB)])
def test_attacks_that_see_every_boundary_find_the_nearest_of_unequal_ones(attack, norm):
    model = linear()
    x, y = samples(model, 12)
    limit = 1.0 + attack.overshoot + 1e-3 if isinstance(attack, DeepFool) else 1.01
    _bounded(limit, attack, _run(attack, model, x, y, norm), nearest(model, x, norm))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_deepfool_is_exact_in_one_step_and_its_overshoot_stretches_the_whole(norm):
    model = linear()
    x, y = samples(model, 16)
    found = _run(DeepFool(steps=1, overshoot=1e-4), model, x, y, norm)
    _bounded(1.0 + 2e-4, DeepFool(), found, nearest(model, x, norm))
    assert int(found.backwards.max()) == 4


@pytest.mark.parametrize(("attack", "norm"), [entry for entry in ALL if entry[1] == "l2" and entry[0].can_target])
def test_a_curved_boundary_is_met_at_its_nearest_point(attack, norm):
    # Straight away from the centre lies the nearest point of the sphere, and so points the gradient. DeepFool is left
    # out: from near the centre its one linearisation leads far beyond the sphere, as published.
    model = Sphere(0.7)
    x, y = samples(model, 12)
    _bounded(1.015, attack, _run(attack, model, x, y, norm), model.distance(x))


@pytest.mark.parametrize(("attack", "norm"), QUICK)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_and_order_change_nothing(attack, norm, size):
    model = Sphere(0.7)
    x, y = samples(model, 23)
    whole = _run(attack, model, x, y, norm)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(size))
    oracle = Oracle(model, batch_size=size)
    other = attack.run(oracle, x[order], y[order], Threat(norm), ids=order, check_model=False)
    assert torch.equal(other.found, whole.found[order])
    assert torch.allclose(other.distance, whole.distance[order], atol=1e-4)


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=NAMES)
def test_a_shift_of_all_logits_by_minus_fifty_changes_nothing(attack, norm):
    x, y = samples(linear(), 8)
    plain = _run(attack, linear(), x, y, norm)
    moved = _run(attack, linear(shift=-50.0), x, y, norm)
    assert plain.found.all() and moved.found.all()
    assert torch.allclose(plain.distance, moved.distance, rtol=5e-3)


def test_cw_moves_pixels_at_exactly_zero_and_one():
    weight = torch.tensor([[3.0, -3.0, 1.0, 0.5], [0.0, 0.0, 0.0, 0.0]])
    model = Linear(weight, torch.tensor([0.0, 1.0]), shift=-50.0).eval()
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    with torch.no_grad():
        y = model(x).argmax(1)
    found = _run(CW(steps=200, searches=6), model, x, y, "l2")
    assert found.found.all()
    assert ((found.x_adv - x).abs()[:, :2] > 0.05).all()
    _bounded(1.01, CW(), found, nearest(model, x, "l2"))


@pytest.mark.parametrize(("attack", "norm"), ALL, ids=NAMES)
def test_two_classes(attack, norm):
    model = linear(classes=2)
    x, y = samples(model, 8)
    _bounded(1.03, attack, _run(attack, model, x, y, norm), nearest(model, x, norm))


@pytest.mark.parametrize(("attack", "norm"), [entry for entry in ALL if entry[0].can_target])
def test_targets_are_reached_and_nothing_else(attack, norm):
    model = linear()
    x, y = samples(model, 10)
    targets = (y + 2) % 5
    found = _run(attack, model, x, y, norm, targets=targets)
    with torch.no_grad():
        hit = model(found.x_adv).argmax(1) == targets
    assert hit[found.found].all() and found.found.float().mean() >= 0.9
    # No nearer than the half-space in which the target beats the true class.
    bound = distances(model, x, norm).gather(1, targets[:, None])[:, 0]
    assert (found.distance[found.found] >= bound[found.found] * (1 - 1e-4)).all()


def test_deepfool_refuses_targets():
    model = linear()
    x, y = samples(model, 4)
    with pytest.raises(UnsupportedError, match="cannot be targeted"):
        _run(DeepFool(), model, x, y, "l2", targets=(y + 1) % 5)


@pytest.mark.parametrize(("attack", "norm"), QUICK)
def test_without_a_gradient_the_clean_input_comes_back_and_the_status_says_why(attack, norm):
    x = torch.full((5, *SHAPES[3]), 0.5)
    found = _run(attack, Flat(), x, torch.zeros(5, dtype=torch.int64), norm)
    assert (found.status == int(Status.zero_gradient)).all()
    assert torch.equal(found.x_adv, x) and (found.distance == 0).all()


def test_nothing_leaves_the_box():
    model = linear(seed=4)
    x, y = samples(model, 12)
    x = ((x - 0.5) * 3 + 0.5).clamp(0, 1)
    with torch.no_grad():
        y = model(x).argmax(1)
    for attack, norm in ALL:
        found = _run(attack, model, x, y, norm)
        assert float(found.x_adv.min()) >= 0.0 and float(found.x_adv.max()) <= 1.0
        with torch.no_grad():
            assert (model(found.x_adv).argmax(1) != y)[found.found].all()


def test_prices_are_as_documented():
    model = Counting(linear())
    x, y = samples(model.model, 6)
    for attack, norm, forwards, backwards in (
        (DDN(steps=10), "l2", 1 + 10 + 1, 10),
        (FMN(steps=10), "linf", 1 + 10 + 1, 10),
        (CW(steps=10, searches=2, abort_early=False), "l2", None, 20),
        (FAB(steps=10, targets=2), "l2", None, 20),
    ):
        model.clear()
        found = _run(attack, model, x, y, norm)
        assert int(found.backwards.max()) <= backwards, attack
        assert forwards is None or int(found.forwards.max()) <= forwards, attack
        assert model.backward_rows == int(found.backwards.sum())
        assert model.weight_gradients == 0


def test_fab_stops_on_a_sample_once_it_is_near_enough():
    model = linear()
    x, y = samples(model, 12)
    exact = nearest(model, x, "linf")
    far = _run(FAB(steps=40), model, x, y, "linf")
    near = FAB(steps=40).run(Oracle(model), x, y, Threat("linf", math.inf), enough=float(exact.max()) * 2)
    assert near.found.all() and int(near.backwards.sum()) < int(far.backwards.sum()) / 3


@pytest.mark.parametrize(
    "make", [lambda: DDN(steps=0), lambda: FMN(gamma=-1.0), lambda: CW(lr=0.0), lambda: DeepFool(classes=1)]
)
def test_nonsense_options_are_refused(make):
    with pytest.raises(InputError):
        make()
