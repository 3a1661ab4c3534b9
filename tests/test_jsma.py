"""JSMA: the pair it moves is the best pair, found by looking at every pair; then walls, directions and invariances."""

from __future__ import annotations

import math

import pytest
import torch
from tests.oracles import SHAPES, Flat, Linear, generator, linear, samples
from torch import Tensor, nn

from maodun.attacks.minimum.jsma import JSMA, best_pairs
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.threat import Threat

FORMS = [JSMA(), JSMA(outputs="probabilities"), JSMA(theta=-1.0), JSMA(maximal=True)]
FORMS += [JSMA(maximal=True, outputs="probabilities"), JSMA(theta=0.3)]


def _run(attack: JSMA, model: nn.Module, x: Tensor, y: Tensor, eps: float = math.inf, **options):
    threat = Threat("l0", eps, targeted=options.get("targets") is not None)
    return attack.run(Oracle(model, channels_last=False), x, y, threat, check_model=False, **options)


def _by_hand(gain: Tensor, drop: Tensor) -> tuple[set[int], float]:
    """The best pair of one row, by looking at all."""
    best, pair = 0.0, set()
    for p in range(len(gain)):
        for q in range(p):
            up, down = float(gain[p] + gain[q]), float(drop[p] + drop[q])
            if up > 0 and down > 0 and up * down > best:
                best, pair = up * down, {p, q}
    return pair, best


@pytest.mark.parametrize("twist", [-0.99, -0.5, 0.0, 0.9, 1.0])
def test_the_best_pair_is_that_of_a_look_at_every_pair(twist):
    source = generator(int(100 * twist))
    gain = torch.randn(12, 30, generator=source, dtype=torch.float64)
    drop = twist * gain + math.sqrt(1 - twist**2) * torch.randn(12, 30, generator=source, dtype=torch.float64)
    out = torch.rand(12, 30, generator=source) < 0.2
    gain[out], drop[out] = -math.inf, -math.inf
    pairs, products = best_pairs(gain, drop)
    for row in range(12):
        pair, best = _by_hand(gain[row], drop[row])
        assert set(pairs[row].tolist()) == pair and float(products[row]) == pytest.approx(best)


def test_rows_that_have_no_pair_say_so():
    gain = torch.tensor([[1.0, -math.inf, -math.inf], [1.0, 2.0, 3.0], [-1.0, -1.0, -2.0], [2.0, 2.0, 2.0]])
    drop = torch.tensor([[1.0, -math.inf, -math.inf], [-1.0, -1.0, -1.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    pairs, products = best_pairs(gain, drop)
    assert products.tolist() == [0.0, 0.0, 0.0, 16.0] and len(set(pairs[3].tolist())) == 2
    assert best_pairs(gain[:, :1], drop[:, :1])[1].tolist() == [0.0] * 4
    assert best_pairs(gain[:0], drop[:0])[0].shape == (0, 2)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("theta", [1.0, -0.5])
def test_on_a_linear_model_the_first_step_moves_the_pair_of_the_saliency_map(targeted, theta):
    model = linear()
    x, y = samples(model, 16)
    targets = (y + 1) % 5 if targeted else None
    weight = model.weight.detach()
    moved = _first_move(JSMA(steps=1, theta=theta), model, x, y, targets)
    for row in range(16):
        aim = int(y[row] if targets is None else targets[row])
        gain, drop = weight[aim], -(weight.sum(0) - weight[aim])
        sign = math.copysign(1, theta) * (1 if targeted else -1)
        pair, _ = _by_hand(sign * gain, sign * drop)
        change = moved[row] - x[row].flatten()
        assert set(change.nonzero().flatten().tolist()) == pair
        want = (x[row].flatten()[list(pair)] + theta).clamp(0, 1)
        assert torch.equal(moved[row][list(pair)], want)


def _first_move(attack: JSMA, model: nn.Module, x: Tensor, y: Tensor, targets: Tensor | None) -> Tensor:
    """Where the first step leads, whether or not it fools: what a search on a surrogate hands over."""
    oracle = Oracle(model, channels_last=False)
    threat = Threat("l0", math.inf, targeted=targets is not None)
    seen: list[Tensor] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    attack.run(oracle, x, y, threat, targets=targets, check_model=False, stop_early=False)
    handle.remove()
    return seen[-1].flatten(1)


def test_on_probabilities_the_pair_is_the_two_steepest_entries():
    # All other probabilities together fall by what the target's gains, so the product is a square.
    model = linear()
    x, y = samples(model, 8)
    targets = (y + 2) % 5
    probe = x.clone().requires_grad_(True)
    probability = model(probe).softmax(1).gather(1, targets[:, None]).sum()
    slope = torch.autograd.grad(probability, probe)[0].flatten(1)
    moved = _first_move(JSMA(steps=1, outputs="probabilities"), model, x, y, targets)
    changed = (moved != x.flatten(1)).nonzero()[:, 1].reshape(8, 2)
    assert torch.equal(changed.sort(1).values, slope.topk(2, 1).indices.sort(1).values)


def test_the_maximal_form_takes_the_best_of_all_classes_and_both_directions():
    model = linear(classes=3)
    x, y = samples(model, 16)
    weight = model.weight.detach()
    moved = _first_move(JSMA(steps=1, maximal=True), model, x, y, None)
    for row in range(16):
        best: tuple[float, set[int], int] = (0.0, set(), 0)
        for aim in range(3):
            for way in (1, -1):
                sign = way * (-1 if aim == int(y[row]) else 1)
                pair, score = _by_hand(sign * weight[aim], -sign * (weight.sum(0) - weight[aim]))
                best = max(best, (score, pair, way), key=lambda entry: entry[0])
        change = moved[row] - x[row].flatten()
        assert set(change.nonzero().flatten().tolist()) == best[1]
        assert set(change[list(best[1])].sign().tolist()) == {float(best[2])}


@pytest.mark.parametrize("attack", FORMS, ids=repr)
@pytest.mark.parametrize("rank", [1, 3])
def test_what_it_finds_fools_in_the_box_with_a_change_in_pairs(attack, rank):
    model = linear()
    x, y = samples(model, 20, SHAPES[rank])
    found = _run(attack, model, x, y)
    hit = found.found
    assert hit.float().mean() > 0.9
    assert ((found.x_adv >= 0) & (found.x_adv <= 1)).all()
    assert (model(found.x_adv).argmax(1) != y)[hit].all()
    counted = (found.x_adv != x).flatten(1).sum(1)
    assert torch.equal(found.distance, counted.float())
    if abs(attack.theta) == 1.0:
        assert (counted % 2 == 0).all()


@pytest.mark.parametrize("maximal", [False, True])
def test_a_target_is_reached(maximal):
    model = linear()
    x, y = samples(model, 20)
    targets = (y + 1) % 5
    found = _run(JSMA(maximal=maximal), model, x, y, targets=targets)
    assert found.found.all() and torch.equal(model(found.x_adv).argmax(1), targets)


@pytest.mark.parametrize("attack", FORMS[:4], ids=repr)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_batches_and_order_change_nothing(attack, size):
    model = linear()
    x, y = samples(model, 23)
    whole = _run(attack, model, x, y)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(size))
    oracle = Oracle(model, batch_size=size)
    other = attack.run(oracle, x[order], y[order], Threat("l0"), ids=order, check_model=False)
    assert torch.equal(other.found, whole.found[order])
    assert torch.equal(other.x_adv, whole.x_adv[order])


def test_a_shift_of_the_logits_and_their_scale_change_nothing():
    x, y = samples(linear(), 12)
    plain = _run(JSMA(), linear(), x, y)
    for other in (linear(scale=1024.0), linear(scale=2.0**-30)):
        assert torch.equal(_run(JSMA(), other, x, y).x_adv, plain.x_adv)
    assert torch.equal(_run(JSMA(), linear(shift=-50.0), x, y).distance, plain.distance)


def test_probabilities_go_blind_where_the_softmax_is_saturated_and_logits_do_not():
    model = linear(scale=10_000.0)
    x, y = samples(model, 12)
    blind = _run(JSMA(outputs="probabilities"), model, x, y)
    assert not blind.found.any() and set(blind.status.tolist()) == {int(Status.zero_gradient)}
    assert torch.equal(blind.x_adv, x)
    assert _run(JSMA(), model, x, y).found.all()


def test_it_stops_at_the_radius_and_pays_for_what_it_does():
    model = linear()
    x, y = samples(model, 20)
    targets = (y + 1) % 5
    free, tight = (_run(JSMA(), model, x, y, eps, targets=targets) for eps in (math.inf, 3))
    near = free.found & (free.distance <= 3)
    assert free.found.all() and 0 < int(near.sum()) < 20 and torch.equal(tight.found, near)
    assert int(tight.forwards.sum()) < int(free.forwards.sum()) and float(tight.distance.max()) == 2
    one = _run(JSMA(outputs="probabilities", steps=1), model, x, y)
    assert torch.equal(one.backwards, torch.ones(20).long())


def test_entries_at_the_wall_are_left_out_and_a_flat_model_is_told():
    model = linear()
    x, y = samples(model, 6)
    x[:, :, :, ::2] = 1.0
    y = model(x).argmax(1)
    found = _run(JSMA(), model, x, y)
    assert torch.equal(found.x_adv[..., ::2], x[..., ::2])
    flat = _run(JSMA(), Flat(), *samples(Flat(), 4))
    assert set(flat.status.tolist()) == {int(Status.zero_gradient)}


@pytest.mark.parametrize("options", [{"theta": 0.0}, {"theta": 1.5}, {"steps": 0}, {"outputs": "softmax"}])
def test_options_that_cannot_be_meant_are_refused(options):
    with pytest.raises(InputError, match=f"option '{next(iter(options))}'"):
        JSMA(**options)


def test_other_norms_are_refused():
    x, y = samples(linear(), 2)
    with pytest.raises(UnsupportedError, match="does not search in linf"):
        JSMA().run(Oracle(linear()), x, y, Threat("linf", 0.1))


def test_where_no_pair_lowers_the_rest_the_aim_alone_leads_on():
    # Every entry raises all classes, the target most.
    weight = torch.tensor([1.0, 0.5, 3.0])[:, None] * torch.linspace(1.0, 2.0, 8)
    model = Linear(weight, torch.tensor([20.0, 0.0, 0.0]) - weight.sum(1) / 2).eval()
    x = torch.full((2, 8), 0.5)
    y = model(x).argmax(1)
    moved = _first_move(JSMA(steps=1), model, x, y, torch.tensor([2, 2]))
    assert (moved != x).nonzero()[:, 1].tolist() == [6, 7, 6, 7]
