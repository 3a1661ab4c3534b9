"""AutoAttack: members, order, survivors only, one clean pass, and honesty about noise and few classes."""

from __future__ import annotations

import pytest
import torch
from oracles import Counting, Noisy, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.gradient.apgd import APGD, APGDT
from maodun.attacks.query.square import Square
from maodun.attacks.recipes import AutoAttack, AutoAttackPlus, AutoAttackRand
from maodun.core.errors import InputError
from maodun.core.oracle import EOT, Budget, Exact, Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import Rule, judge

SHORT = {"steps": 8, "queries": 12}
N = 40
IDS = torch.arange(N)


class Net(nn.Module):
    """A small fixed non-linear classifier of 1 x 4 x 5 images."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.a = nn.Parameter(1.5 * Stream(0, "a").normal(torch.arange(24), (20,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(classes), (24,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.a.T) @ self.b.T


def _data(classes: int = 5) -> tuple[Tensor, Tensor]:
    x = Stream(0, "x").uniform(IDS, (1, 4, 5))
    with torch.no_grad():
        return x, Net(classes)(x).argmax(1)


def _names(attack: AutoAttack, norm: str) -> list[str]:
    return [name for name, _ in attack.members(norm)]


def test_members_are_the_published_ones_in_the_published_order():
    standard = dict(AutoAttack().members("linf"))
    assert list(standard) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert standard["apgd-ce"] == APGD(loss="ce", steps=100, restarts=1)
    assert standard["apgd-t"] == APGDT(steps=100, targets=9, restarts=1)
    assert (standard["fab-t"].steps, standard["fab-t"].targets, standard["fab-t"].restarts) == (100, 9, 1)
    assert standard["square"] == Square(queries=5000)
    assert _names(AutoAttackPlus(), "linf") == ["apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"]
    plus = dict(AutoAttackPlus().members("l2"))
    assert plus["apgd-ce"].restarts == plus["apgd-dlr"].restarts == plus["fab"].restarts == 5
    assert plus["apgd-t"].restarts == plus["fab-t"].restarts == 1
    assert _names(AutoAttackRand(), "linf") == ["apgd-ce", "apgd-dlr"] and AutoAttackRand().eot == 20
    sparse = dict(AutoAttack().members("l1"))
    assert sparse["apgd-ce"].restarts == 5 and sparse["apgd-t"].targets == 5 and sparse["apgd-t"].restarts == 1
    assert sparse["apgd-ce"].larger_eps and sparse["apgd-t"].larger_eps
    assert AutoAttackPlus() != AutoAttack(version="plus") and AutoAttackPlus().version == "plus"


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_break_is_real_and_has_one_winner(norm):
    x, y = _data()
    y[:3] = (y[:3] + 1) % 5
    threat = Threat(norm, {"linf": 0.02, "l2": 0.08, "l1": 0.25}[norm])
    found = AutoAttack(**SHORT).run(Oracle(Net()), x, y, threat)
    assert (found.status[:3] == int(Status.skipped_misclassified)).all() and found.by[:3] == ["", "", ""]
    assert torch.equal(Net()(found.x_adv).argmax(1) != y, found.found)
    assert threat.contains(found.x_adv, x).all()
    assert torch.equal(torch.tensor([bool(name) for name in found.by]), found.status == int(Status.found))
    assert 0.1 < found.found.float().mean() < 0.95
    assert torch.allclose(found.distance, threat.distance(found.x_adv, x))


def test_only_survivors_go_on_and_the_clean_pass_is_made_once():
    model = Counting(Net())
    x, y = _data()
    found = AutoAttack(**SHORT).run(Oracle(model), x, y, Threat("linf", 1e-6), check_model=False)
    # Clean, APGD-CE, APGD-T on four targets, FAB-T with two forwards a step, Square.
    assert (found.forwards == 1 + 9 + 4 * 9 + 4 * 2 * 8 + 13).all()
    assert (found.backwards == 9 + 4 * 9 + 4 * 8).all()
    assert model.backward_rows == N * (9 + 36 + 32) and model.weight_gradients == 0
    assert N * 123 <= model.rows <= N * 123 + 80
    assert (found.status == int(Status.exhausted_steps)).all() and found.notes == ()
    early = APGD(steps=8).run(Oracle(Net()), x, y, Threat("linf", 0.02))
    all_of_it = AutoAttack(**SHORT).run(Oracle(Net()), x, y, Threat("linf", 0.02))
    first = torch.tensor([name == "apgd-ce" for name in all_of_it.by])
    assert torch.equal(first, early.found) and torch.equal(all_of_it.forwards[first], early.forwards[first])


def test_batches_and_order_change_no_verdict():
    x, y = _data()
    threat = Threat("linf", 0.02)
    whole = AutoAttack(**SHORT).run(Oracle(Net(), batch_size=64), x, y, threat).found
    for size in (1, 7):
        assert torch.equal(AutoAttack(**SHORT).run(Oracle(Net(), batch_size=size), x, y, threat).found, whole)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    other = AutoAttack(**SHORT).run(Oracle(Net()), x[order], y[order], threat, ids=IDS[order]).found
    assert torch.equal(other, whole[order])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_two_and_three_classes_degrade_instead_of_crashing(classes, version):
    x, y = _data(classes)
    found = AutoAttack(version=version, **SHORT).run(Oracle(Net(classes)), x, y, Threat("l2", 0.05))
    assert torch.equal(Net(classes)(found.x_adv).argmax(1) != y, found.found)


def test_closed_form_distances_are_the_verdict_on_a_linear_model():
    model = linear()
    for norm in ("linf", "l2", "l1"):
        x, y = samples(model, 24)
        distance = nearest(model, x, norm)
        eps = float(distance.median())
        found = AutoAttack(steps=30, queries=5).run(Oracle(model), x, y, Threat(norm, eps)).found
        assert found[distance < 0.99 * eps].all() and not found[distance > 1.001 * eps].any()


def test_inputs_that_are_no_images_are_attacked_without_square():
    model = linear()
    x, y = samples(model, 8, (24,))
    found = AutoAttack(**SHORT).run(Oracle(model), x, y, Threat("linf", 0.001))
    assert found.members == ("apgd-ce", "apgd-t", "fab-t") and "Square was left out" in found.notes[0]


@pytest.mark.parametrize("rule", ["majority", "mean"])
def test_noise_alone_is_no_attack(rule):
    model = Noisy(linear(), 0.15)
    x, y = samples(model.model, 120)
    threat = Threat("linf", 0.0)
    found = AutoAttackRand(steps=4, eot=5).run(Oracle(model), x, y, threat)
    clean = judge(model, x, x, y, threat, rule=Rule(rule), seed=5).robust
    after = judge(model, found.x_adv, x, y, threat, rule=Rule(rule), seed=5).robust
    assert clean.value > 0.5 and after.value == clean.value
    if rule == "majority":
        # Believed successes are samples that are mostly wrong anyway, not samples that were unlucky once.
        assert clean.value < 0.98 and abs(float((~found.found).float().mean()) - clean.value) < 0.08


def test_stochastic_models_are_told_which_version_is_meant():
    model = Noisy(linear(), 0.02)
    x, y = samples(model.model, 10)
    found = AutoAttack(**SHORT).run(Oracle(model), x, y, Threat("linf", 0.01))
    assert "autoattack-rand" in found.notes[0]
    averaged = AutoAttackRand(steps=4).run(Oracle(model), x, y, Threat("linf", 1e-6))
    left = averaged.status == int(Status.exhausted_steps)
    assert (averaged.backwards[left] == 2 * 5 * 20).all() and averaged.notes == ()
    kept = AutoAttackRand(steps=4).run(Oracle(model, gradient=EOT(Exact(), 3)), x, y, Threat("linf", 1e-6))
    assert (kept.backwards[left] == 2 * 5 * 3).all()
    fixed = AutoAttackRand(steps=4).run(Oracle(model.model), x, y, Threat("linf", 1e-6))
    assert (fixed.backwards == 10).all() and "deterministic" in fixed.notes[0]


def test_a_given_target_is_reached():
    model = linear()
    x, y = samples(model, 10)
    targets = (y + 2) % 5
    found = AutoAttack(**SHORT).run(Oracle(model), x, y, Threat("linf", 0.5, targeted=True), targets=targets)
    assert found.found.all() and torch.equal(model(found.x_adv).argmax(1), targets)


def test_a_budget_covers_all_members_together():
    model = linear()
    x, y = samples(model, 10)
    found = AutoAttack(**SHORT).run(Oracle(model, budget=Budget(backwards=20)), x, y, Threat("linf", 1e-6))
    assert (found.backwards <= 20).all() and (found.status == int(Status.exhausted_budget)).all()


def test_an_infinite_radius_breaks_everything():
    model = linear()
    x, y = samples(model, 10)
    assert AutoAttack(**SHORT).run(Oracle(model), x, y, Threat("linf")).found.all()


@pytest.mark.parametrize("options", [{"version": "standart"}, {"steps": 0}, {"queries": 0}, {"eot": 0}])
def test_useless_options_are_refused(options):
    with pytest.raises(InputError):
        AutoAttack(**options)
