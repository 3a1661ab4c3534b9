"""Feature attacks: closed forms on linear layers, hooks that always go, and results free of batch and order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.feature.distances import DR, NRDM, SSP
from maodun.attacks.feature.fia import FIA
from maodun.attacks.feature.ila import ILA
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat

EPS = 0.1
BALL = Threat("linf", EPS)
ATTACKS = [DR(steps=5), NRDM(steps=5), SSP(steps=5), FIA(steps=5, copies=3), ILA(steps=3, first_steps=3)]


class Net(nn.Module):
    """Features W x (optionally through a ReLU), then logits V f."""

    def __init__(self, weight: Tensor, head: Tensor) -> None:
        super().__init__()
        self.body = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.head = nn.Linear(head.shape[1], head.shape[0], bias=False)
        with torch.no_grad():
            self.body.weight.copy_(weight)
            self.head.weight.copy_(head)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x.flatten(1)))
        return logits


def draw(name: str, *shape: int) -> Tensor:
    return Stream(0, name).normal(torch.arange(shape[0]), shape[1:])


def net(width: int = 4, entries: int = 12, classes: int = 3) -> Net:
    return Net(draw("w", width, entries), draw("v", classes, width)).eval()


def convnet() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    with torch.no_grad():
        for k, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * draw(f"p{k}", *parameter.shape))
    return model.eval()


def search(attack, model: nn.Module, x: Tensor, y: Tensor | None = None, ids: Tensor | None = None, **oracle) -> Tensor:
    y = torch.zeros(x.shape[0], dtype=torch.int64) if y is None else y
    found = attack.run(Oracle(model, surrogate=True, **oracle), x, y, BALL, ids=ids, check_model=False)
    assert BALL.contains(found.x_adv, x).all()
    return found.x_adv


def images(n: int = 7, side: int = 8) -> Tensor:
    return Stream(0, "x").uniform(torch.arange(n), (3, side, side))


def test_dr_on_a_linear_map_of_two_features_reaches_the_least_spread():
    # The spread of (f1, f2) is |f1 - f2| / 2: a linear function of x until it is zero.
    weight = draw("w", 2, 12)
    model = Net(weight, draw("v", 3, 2)).eval()
    x = 0.5 + 0.1 * (Stream(0, "x").uniform(torch.arange(16), (12,)) - 0.5)
    gap = weight[0] - weight[1]
    before = x @ gap
    least = (before.abs() - EPS * gap.abs().sum()).clamp(min=0)
    after = (search(DR(layer="body", steps=50), model, x) @ gap).abs()
    assert torch.allclose(after[least > 0], least[least > 0], rtol=1e-3)
    assert (after[least == 0] < 0.15 * EPS * gap.abs().sum()).all()
    assert (after < before.abs()).all()


def test_nrdm_and_ssp_on_one_linear_feature_end_in_the_best_corner():
    # |w . d| over the box of half-width eps is at most eps |w|_1, at d = +- eps sign(w).
    weight = draw("w", 1, 12)
    model = Net(weight, draw("v", 3, 1)).eval()
    x = torch.full((16, 12), 0.5)
    best = EPS * weight.abs().sum()
    for attack in (NRDM(layer="body"), SSP(layer="body")):
        moved = ((search(attack, model, x) - x) @ weight[0]).abs()
        assert torch.allclose(moved, best.expand(16), rtol=1e-4)


def test_nrdm_on_a_linear_map_ends_in_a_corner_that_the_gradient_does_not_leave():
    model, x = net(), torch.full((8, 12), 0.5)
    d = search(NRDM(layer="body", steps=60), model, x) - x
    weight = model.body.weight
    corner = ((d.abs() - EPS).abs() < 1e-6).all(1)
    # A step of fixed size may go to and fro on an entry whose slope it turns over.
    assert corner.float().mean() > 0.7
    assert torch.equal(d[corner].sign(), (d[corner] @ weight.T @ weight).sign())
    corners = EPS * (2.0 * torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12) - 1.0)
    best = (corners @ weight.T).square().sum(1).max()
    reached = (d @ weight.T).square().sum(1)
    assert (reached <= best * 1.0001).all() and reached.max() > 0.99 * best and reached.min() > 0.6 * best


def test_fia_on_a_linear_head_weakens_the_label_like_a_gradient_attack():
    # Masks do not change the gradient of a linear head: the weights are V_y, the optimum x - eps sign(W^T V_y).
    model, x = net(), torch.full((6, 12), 0.5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    slope = model.head.weight[y] @ model.body.weight
    x_adv = search(FIA(layer="body"), model, x, y)
    assert torch.allclose(x_adv, x - EPS * slope.sign(), atol=1e-5)


def test_fia_without_labels_takes_the_surrogates_own_answer():
    model, x = net(), images(6, 2)
    own = model(x).argmax(1)
    blind = search(FIA(layer="body", own_labels=True), model, x, (own + 1) % 3)
    assert torch.equal(blind, search(FIA(layer="body"), model, x, own))
    assert not torch.equal(blind, search(FIA(layer="body"), model, x, (own + 1) % 3))


def test_ila_climbs_the_projection_on_the_guides_change():
    model, x = net(), torch.full((6, 12), 0.5)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    attack = ILA(layer="body", loss="margin")
    from maodun.attacks.gradient.pgd import MIFGSM

    guide = search(MIFGSM(loss="margin", steps=10), model, x, y)
    change = (guide - x) @ model.body.weight.T
    slope = change @ model.body.weight
    x_adv = search(attack, model, x, y)
    assert torch.allclose(x_adv, x + EPS * slope.sign(), atol=1e-5)
    assert (((x_adv - guide) @ model.body.weight.T * change).sum(1) >= -1e-6).all()


def test_the_automatic_layer_is_the_one_at_the_share_of_depth():
    model, x = convnet(), images(2)
    for depth, layer in ((0.0, "0"), (0.5, "2"), (1.0, "4")):
        assert torch.equal(search(DR(depth=depth, steps=2), model, x), search(DR(layer=layer, steps=2), model, x))
    linear = net()
    flat = torch.full((2, 12), 0.5)
    assert torch.equal(
        search(NRDM(depth=0.0, steps=2), linear, flat), search(NRDM(layer="body", steps=2), linear, flat)
    )


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_results_do_not_depend_on_batch_or_order(attack):
    model, x, ids = convnet(), images(), torch.arange(7) + 10
    y = torch.arange(7) % 4
    whole = search(attack, model, x, y, ids)
    assert not torch.equal(whole, x)
    for size in (1, 3, 64):
        assert torch.allclose(search(attack, model, x, y, ids, batch_size=size), whole, atol=1e-5)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    assert torch.allclose(search(attack, model, x[order], y[order], ids[order]), whole[order], atol=1e-5)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_no_hook_stays_and_nothing_of_the_model_changes(attack):
    model, x = convnet(), images(3)
    before = [p.clone() for p in model.parameters()]
    search(attack, model, x)
    with pytest.raises(InputError, match=r"0\.5"):
        search(replace(attack, layer="0.5"), model, x)
    broken = nn.Sequential(convnet(), _Breaks())
    with pytest.raises(RuntimeError, match="on purpose"):
        search(replace(attack, layer="0.2"), broken, x)
    for part in (*model.modules(), *broken.modules()):
        assert not part._forward_hooks and not part._forward_pre_hooks
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, model.parameters(), strict=True))


class _Breaks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("on purpose")


@pytest.mark.parametrize("attack", [DR(steps=4), NRDM(steps=4), FIA(steps=4, copies=2)], ids=lambda a: a.name)
def test_a_dead_layer_moves_nothing_and_breaks_nothing(attack):
    model = convnet()
    with torch.no_grad():
        model[2].weight.zero_()
    x = images(3)
    x_adv = search(replace(attack, layer="2"), model, x)
    start = search(replace(attack, layer="2", step_size=0.0), model, x)
    assert torch.equal(x_adv, start)


def test_an_ensemble_is_searched_member_by_member():
    one, two, x = convnet(), net(4, 192), images(3)
    both = search(NRDM(steps=4), Ensemble([one, _Pad(two)]), x)
    assert not torch.equal(both, search(NRDM(steps=4), one, x))
    # The same member twice adds its gradient twice, which changes no sign; the start is the same.
    assert torch.equal(search(NRDM(steps=4), Ensemble([one, one]), x), search(NRDM(steps=4), one, x))


class _Pad(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.pad(self.model(x), (0, 1))
        return out


def test_the_price_is_what_the_page_says():
    model, x = convnet(), images(2)
    y = torch.zeros(2, dtype=torch.int64)
    for attack, forwards, backwards in (
        (DR(steps=4, layer="2"), 4, 4),
        (NRDM(steps=4, layer="2"), 5, 4),
        (FIA(steps=4, copies=3, layer="2"), 7, 7),
        (ILA(steps=4, first_steps=3, layer="2"), 9, 7),
        (DR(steps=4), 5, 4),
    ):
        found = attack.run(Oracle(model, surrogate=True), x, y, BALL, check_model=False)
        assert found.backwards.tolist() == [backwards] * 2
        assert found.forwards.tolist() == [forwards + 1] * 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: DR(steps=0), lambda: DR(depth=1.5), lambda: NRDM(start_share=0.0), lambda: SSP(noise=0.0),
        lambda: FIA(copies=0), lambda: FIA(keep=0.0), lambda: ILA(first_steps=0), lambda: ILA(loss="nothing"),
    ],
)  # fmt: skip
def test_useless_options_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_targets_and_layers_that_are_never_called_are_refused():
    x, y = images(2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="targeted"):
        DR().run(Oracle(convnet()), x, y, Threat("linf", EPS, targeted=True), targets=y + 1)
    model = convnet()
    model.idle = nn.Identity()
    model.forward = lambda x: nn.Sequential(*list(model)[:8])(x)
    with pytest.raises(InputError, match="never calls"):
        search(DR(layer="idle"), model, x)
