"""Auto-PGD: published check-points, closed-form optima, invariances, and its price to the call."""

from __future__ import annotations

import math

import pytest
import torch
from ascent import Climbed, optimum
from oracles import SHAPES, Counting, Noisy, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.gradient import climb
from maodun.attacks.gradient.apgd import APGD, APGDT, likely_targets
from maodun.core.engine import Attack
from maodun.core.errors import InputError
from maodun.core.oracle import EOT, Budget, Exact, Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

RADII = {"linf": 0.1, "l2": 0.5, "l1": 2.0}
HARD = {"linf": 0.03, "l2": 0.15, "l1": 0.6}
N = 32
IDS = torch.arange(N)


class Net(nn.Module):
    """A small fixed non-linear classifier of 12 inputs."""

    def __init__(self, classes: int = 6, scale: float = 1.0, shift: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(2.0 * Stream(0, "a").normal(torch.arange(24), (12,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(classes), (24,)))
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (torch.tanh(x.flatten(1) @ self.a.T) @ self.b.T) + self.shift


def _data(classes: int = 6) -> tuple[Tensor, Tensor]:
    x = Stream(0, "x").uniform(IDS, (12,))
    with torch.no_grad():
        return x, Net(classes)(x).argmax(1)


def test_checkpoints_are_the_published_ones():
    assert climb.checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]
    assert climb.sparse_checkpoints(100) == list(range(4, 101, 4))
    assert climb.checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert climb.checkpoints(1) == [1]


def test_larger_balls_come_first_in_l1_and_use_exactly_the_given_steps():
    phases = APGD(larger_eps=True).phases(Threat("l1", 2.0))
    assert [(threat.eps, steps) for threat, steps in phases] == [(6.0, 30), (4.0, 30), (2.0, 40)]
    assert APGD(larger_eps=True).phases(Threat("l2", 2.0)) == [(Threat("l2", 2.0), 100)]


@pytest.mark.parametrize("norm", RADII)
def test_starts_lie_on_the_surface_and_follow_the_id(norm):
    x = torch.full((N, 3, 4), 0.5)
    threat, stream = Threat(norm, RADII[norm] / 2), Stream(0, "start")
    start = climb.surface_start(threat, x, stream, IDS)
    assert torch.allclose(threat.distance(start, x), torch.full((N,), threat.eps), rtol=1e-4)
    back = IDS.flip(0)
    assert torch.equal(climb.surface_start(threat, x, stream, back), start.flip(0))
    assert not torch.equal(climb.surface_start(threat, x, stream, IDS, 1), start)


@pytest.mark.parametrize("norm", RADII)
@pytest.mark.parametrize("attack", [APGD(), APGD(loss="margin", larger_eps=True), APGDT()])
def test_linear_models_are_climbed_to_the_closed_form_optimum(norm, attack):
    weight = Stream(0, "w").normal(torch.arange(1), SHAPES[3])[0]
    x = Stream(0, "x").uniform(IDS, SHAPES[3])
    model, y = Climbed(weight), torch.zeros(N, dtype=torch.int64)
    if not attack.larger_eps or norm != "l1":  # there the iterates leave the ball on purpose
        attack.run(
            Oracle(model, batch_size=N), x, y, Threat(norm, RADII[norm]), stop_early=False, check_model=False
        )  # fmt: skip
        best = optimum(weight, x, norm, RADII[norm])
        reached = model.best - x.flatten(1) @ weight.flatten()
        assert (reached <= best * 1.0001 + 1e-5).all()
        assert (reached >= best * (0.95 if norm == "l1" else 0.99)).all()
        assert (reached / best).mean() > 0.985


@pytest.mark.parametrize(
    ("attack", "classes"), [(APGD(larger_eps=True), 2), (APGD(loss="dlr"), 2), (APGDT(steps=60), 5)]
)
@pytest.mark.parametrize("norm", RADII)
def test_success_starts_at_the_closed_form_distance(norm, attack, classes):
    # With more than two classes an untargeted loss heads for the likeliest class, which need not be the nearest.
    model = linear(classes)
    x, y = samples(model, 32)
    distance = nearest(model, x, norm)
    eps = float(distance.median())
    found = attack.run(Oracle(model), x, y, Threat(norm, eps)).found
    assert found[distance < 0.97 * eps].all() and not found[distance > 1.001 * eps].any()


@pytest.mark.parametrize("attack", [APGD(steps=12), APGDT(steps=5), APGDT(steps=5, together=3)])
@pytest.mark.parametrize("norm", RADII)
def test_batches_and_order_change_no_verdict(norm, attack):
    x, y = _data()
    threat = Threat(norm, HARD[norm])
    whole = attack.run(Oracle(Net(), batch_size=64), x, y, threat).found
    for size in (1, 7):
        assert torch.equal(attack.run(Oracle(Net(), batch_size=size), x, y, threat).found, whole)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    assert torch.equal(attack.run(Oracle(Net()), x[order], y[order], threat, ids=IDS[order]).found, whole[order])
    assert 0.1 < whole.float().mean() < 0.95


def test_targets_side_by_side_are_the_same_runs_as_one_after_another():
    x, y = _data()
    threat = Threat("linf", 0.02)
    one = APGDT(steps=10, together=1, targets=5).run(Oracle(Net()), x, y, threat)
    for together in (2, 5, 9):
        many = APGDT(steps=10, together=together, targets=5).run(Oracle(Net()), x, y, threat)
        assert torch.equal(one.found, many.found)
        left = ~one.found
        assert torch.equal(one.backwards[left], many.backwards[left])
        assert torch.equal(one.forwards[left], many.forwards[left])


@pytest.mark.parametrize("loss", ["ce", "dlr", "margin"])
def test_shift_of_the_logits_changes_nothing_and_scale_nothing_for_scale_free_losses(loss):
    x, y = _data()
    threat = Threat("linf", 0.02)
    plain = APGD(loss=loss, steps=20).run(Oracle(Net()), x, y, threat).found
    shifted = APGD(loss=loss, steps=20).run(Oracle(Net(shift=-50.0)), x, y, threat).found
    assert (plain == shifted).float().mean() > 0.95
    if loss != "ce":
        scaled = APGD(loss=loss, steps=20).run(Oracle(Net(scale=1e-3)), x, y, threat).found
        assert (plain == scaled).float().mean() > 0.95


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_mean_fewer_targets_not_a_crash(classes):
    x, y = _data(classes)
    for attack in (APGD(loss="dlr", steps=10), APGDT(steps=10)):
        found = attack.run(Oracle(Net(classes)), x, y, Threat("linf", 0.002))
        runs = classes - 1 if isinstance(attack, APGDT) else 1
        left = found.status == int(Status.exhausted_steps)
        assert left.any() and (found.backwards[left] == 11 * runs).all()
        assert attack.run(Oracle(Net(classes)), x, y, Threat("linf", 0.3)).found.float().mean() > 0.5


def test_targets_follow_the_clean_logits_and_leave_out_the_label():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert likely_targets(logits, torch.tensor([0, 2]), 9).tolist() == [[2, 1, 3], [3, 1, 0]]
    assert likely_targets(logits, torch.tensor([0, 2]), 2).tolist() == [[2, 1], [3, 1]]


@pytest.mark.parametrize("attack", [APGD(), APGD(loss="dlr"), APGDT()])
def test_a_given_target_is_reached(attack: Attack):
    model = linear()
    x, y = samples(model, 24)
    targets = (y + 2) % 5
    found = attack.run(Oracle(model), x, y, Threat("linf", 0.5, targeted=True), targets=targets)
    assert found.found.all() and torch.equal(model(found.x_adv).argmax(1), targets)


@pytest.mark.parametrize("norm", RADII)
def test_a_run_costs_its_steps_and_the_start(norm):
    model = Counting(linear(4))
    x, y = samples(model.model, 12)
    cases = [(APGD(steps=7), 8), (APGD(steps=7, restarts=2), 16), (APGDT(steps=7), 3 * 8)]
    cases.append((APGD(steps=10, larger_eps=True), 13 if norm == "l1" else 11))
    for attack, price in cases:
        model.clear()
        found = attack.run(Oracle(model), x, y, Threat(norm, 1e-6), check_model=False)
        assert (found.backwards == price).all() and (found.forwards == price + 1).all()
        assert model.backward_rows == 12 * price and model.rows >= 12 * (price + 1) and model.weight_gradients == 0
        free = attack.run(Oracle(model), x, y, Threat(norm, 1e-6), stop_early=False, check_model=False)
        assert (free.backwards == price).all()


def test_averaged_draws_decide_loss_gradient_and_success():
    model = Noisy(linear(), 0.05)
    x, y = samples(model.model, 24)
    distance = nearest(model.model, x, "linf")
    eps = float(distance.median())
    found = APGD(steps=20).run(Oracle(model, gradient=EOT(Exact(), 8)), x, y, Threat("linf", eps))
    assert found.found[distance < 0.7 * eps].all() and not found.found[distance > 1.3 * eps].any()
    left = found.status == int(Status.exhausted_steps)
    assert left.any() and (found.backwards[left] == 21 * 8).all()


def test_an_infinite_radius_is_the_whole_box():
    model = linear()
    x, y = samples(model, 12)
    for norm in RADII:
        found = APGD(steps=20).run(Oracle(model), x, y, Threat(norm, math.inf))
        assert found.found.all() and (found.x_adv >= 0).all() and (found.x_adv <= 1).all()


def test_a_budget_ends_the_search_in_time():
    model = linear()
    x, y = samples(model, 12)
    for attack in (APGD(), APGDT(together=4)):
        found = attack.run(Oracle(model, budget=Budget(backwards=30)), x, y, Threat("linf", 1e-6))
        assert (found.backwards <= 30).all() and (found.backwards >= 26).all()
        assert (found.status == int(Status.exhausted_budget)).all()


@pytest.mark.parametrize("options", [{"steps": 0}, {"restarts": 0}, {"loss": "dl"}])
def test_useless_options_are_refused(options):
    with pytest.raises(InputError):
        APGD(**options)
    with pytest.raises(InputError, match="targets"):
        APGDT(targets=0)
