"""Flows and StAdv: what a bounded displacement can make, judged on the image alone, and found by the attack."""

from __future__ import annotations

import math

import pytest
import torch
from ascent import Climbed
from torch import Tensor, nn

from maodun.attacks.registry import build_attack
from maodun.attacks.universal.stadv import StAdv, variation, variation_gradient
from maodun.core import flow as flows
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge

SHAPE = (3, 6, 9)
IDS = torch.arange(40)
EPS = 0.06


class Net(nn.Module):
    """A small fixed non-linear classifier of 3 x 6 x 9 images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(0.3 * Stream(0, "a").normal(torch.arange(24), (162,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(4), (24,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x.flatten(1) - 0.5) @ self.a.T) @ self.b.T


class Edge(nn.Module):
    """Class 1 once pixel (2, 3) is brighter than `level`."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, x: Tensor) -> Tensor:
        over = x[:, 0, 2, 3] - self.level
        return torch.stack([-over, over], dim=1)


def _data(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return Stream(0, "x").uniform(IDS, shape)


def _flows(eps: float, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return (Stream(1, "flow").uniform(IDS, (2, *shape[1:])) * 2 - 1) * eps


def _edge() -> Tensor:
    x = torch.zeros(1, 1, 5, 8)
    x[..., 4:] = 1.0
    return x


def test_no_flow_is_the_identity_to_the_bit():
    x = _data()
    assert torch.equal(flows.warp(x, torch.zeros(40, 2, 6, 9)), x)
    assert (flows.displacement(x, x) == 0).all()


def test_whole_pixels_shift_and_the_edge_stays_what_it_is():
    x = _data()
    flow = torch.zeros(40, 2, 6, 9)
    flow[:, 0], flow[:, 1] = 2.0, -1.0
    moved = flows.warp(x, flow)
    assert torch.equal(moved[:, :, 1:, :-2], x[:, :, :-1, 2:])
    assert torch.equal(moved[:, :, 0, :-2], x[:, :, 0, 2:]) and torch.equal(moved[:, :, 1:, -1], x[:, :, :-1, -1])


def test_a_ramp_is_read_between_its_pixels():
    ramp = (torch.arange(9.0) / 10).expand(40, 1, 6, 9)
    flow = _flows(0.9, (1, 6, 9))
    place = (torch.arange(9.0) + flow[:, 0]).clamp(0, 8)
    assert torch.allclose(flows.warp(ramp, flow)[:, 0], place / 10, atol=1e-6)


def test_secants_are_the_slopes_of_what_is_warped():
    x, gradient, flow = _data(), Stream(2, "g").normal(IDS, SHAPE), _flows(0.4)
    exact = flow.clone().requires_grad_()
    (slope,) = torch.autograd.grad((gradient * flows.warp(x, exact)).sum(), exact)
    near = flows.secants(x, flow, gradient, 1e-3, 1.0)
    smooth = (flow.abs() > 0.01) & (slope != 0)
    assert torch.allclose(near[smooth], slope[smooth], atol=2e-3)
    # On a pixel that is a local minimum of one ray both cells count.
    assert torch.allclose(
        flows.secants(_edge(), torch.zeros(1, 2, 5, 8), torch.ones(1, 1, 5, 8), 1.0, 1.0)[0, 0, 2],
        torch.tensor([0.0, 0.0, 0.0, 0.5, 0.5, 0.0, 0.0, 0.0]),
    )


@pytest.mark.parametrize("radius", [0.3, 1.0, 1.7, 2.0, 3.4])
def test_what_a_pixel_can_find_is_exact(radius):
    x = _data((1, 6, 9))[:4]
    low, high = flows.reach_within(x, radius)
    ticks = torch.cat([torch.linspace(-radius, radius, 21), torch.arange(-3.0, 4.0)]).clamp(-radius, radius).unique()
    seen = torch.stack(
        [flows.warp(x, torch.stack([torch.full((4, 6, 9), float(u)), torch.full((4, 6, 9), float(v))], 1))
         for u in ticks for v in ticks]
    )  # fmt: skip
    assert torch.allclose(low, seen.amin(0), atol=1e-5) and torch.allclose(high, seen.amax(0), atol=1e-5)


@pytest.mark.parametrize("eps", [0.25, 1.0, 2.6, 5.5])
def test_no_true_flow_is_ever_called_outside(eps):
    x = _data()
    bent = flows.warp(x, _flows(eps))
    threat = Threat("flow", eps)
    assert threat.contains(bent, x).all()
    assert (threat.distance(bent, x) <= eps + (2e-3 if eps <= 4 else 1)).all()
    assert torch.allclose(threat.project(bent, x), bent, atol=1e-5)


def test_the_least_displacement_of_an_edge():
    x = _edge()
    for shift in (0.25, 0.7, 1.4):
        flow = torch.zeros(1, 2, 5, 8)
        flow[:, 0] = shift
        bent = flows.warp(x, flow)
        assert float(flows.displacement(bent, x)) == pytest.approx(shift, abs=1e-3)
        assert Threat("flow", shift).contains(bent, x).all()
        assert not Threat("flow", shift - 0.01).contains(bent, x).any()


def test_repainting_is_outside_at_any_displacement():
    x = 0.25 + 0.5 * _data()
    repainted = x.clone()
    repainted[:, 0, 2, 3] = 1.0
    threat = Threat("flow", 3.0)
    assert not threat.contains(repainted, x).any()
    assert torch.isinf(threat.distance(repainted, x)).all()
    assert threat.contains(threat.project(repainted, x), x).all()
    assert threat.contains(threat.random_start(x, Stream(0, "s"), IDS), x).all()


def test_total_variation_and_its_gradient():
    flow = torch.zeros(1, 2, 2, 2)
    flow[0, 0, 0, 0], flow[0, 1, 0, 0] = 3.0, 4.0
    assert float(variation(flow)) == pytest.approx(10.0)
    flow = _flows(1.0).requires_grad_()
    (exact,) = torch.autograd.grad(variation(flow).sum(), flow)
    assert torch.allclose(variation_gradient(flow.detach()), exact, atol=1e-5)
    assert (variation_gradient(torch.ones(1, 2, 4, 4)) == 0).all()


@pytest.mark.parametrize(("eps", "falls"), [(0.37, False), (0.43, True)])
def test_an_edge_is_moved_as_far_as_it_must_be(eps, falls):
    x, y = _edge(), torch.zeros(1, dtype=torch.int64)
    found = StAdv().run(Oracle(Edge(0.4)), x, y, Threat("flow", eps), check_model=False)
    assert bool(found.found) == falls
    if falls:
        assert 0.399 <= float(found.distance) <= eps * 1.001


def test_grey_linear_models_are_climbed_close_to_the_closed_form_optimum():
    shape, n = (1, 6, 9), 16
    weight, x = Stream(0, "w").normal(torch.arange(1), shape)[0], _data(shape)[:n]
    low, high = flows.reach_within(x, 0.8)
    best = (torch.where(weight > 0, high - x, low - x) * weight).sum((1, 2, 3))
    model = Climbed(weight)
    StAdv(steps=150).run(
        Oracle(model, batch_size=64), x, torch.zeros(n, dtype=torch.int64), Threat("flow", 0.8), stop_early=False,
        check_model=False,
    )  # fmt: skip
    share = (model.best - (x * weight).sum((1, 2, 3))) / best
    assert (share <= 1.0001).all() and share.min() > 0.8 and share.mean() > 0.93


def _run(restarts: int = 2, size: int = 64, order: Tensor = IDS):
    x, y = _data(), Net()(_data()).argmax(1)
    oracle, threat = Oracle(Net(), batch_size=size), Threat("flow", EPS)
    return StAdv(steps=15, restarts=restarts).run(oracle, x[order], y[order], threat, ids=IDS[order])


def test_batch_split_and_order_change_nothing():
    whole = _run()
    assert 0.1 < whole.found.float().mean() < 0.9
    for size in (1, 7):
        assert torch.allclose(_run(size=size).x_adv, whole.x_adv, atol=1e-4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    shuffled = _run(order=order)
    assert torch.equal(shuffled.found, whole.found[order])
    assert torch.allclose(shuffled.x_adv, whole.x_adv[order], atol=1e-4)


def test_the_verdict_believes_the_image_and_restarts_never_lose():
    x, y = _data(), Net()(_data()).argmax(1)
    found = _run()
    verdict = judge(Net(), found.x_adv, x, y, Threat("flow", EPS))
    assert verdict.valid.all() and torch.equal(verdict.success, found.found)
    assert (found.found | ~_run(1).found).all()
    spent = found.status == int(Status.exhausted_steps)
    # A clean pass, the steps of both restarts, and a look at the end of each.
    assert (found.backwards[spent] == 30).all() and (found.forwards[spent] == 33).all()


def test_targets_are_reached():
    x = _data()
    y = Net()(x).argmax(1)
    targets = (y + 1) % 4
    found = StAdv(steps=50).run(Oracle(Net()), x, y, Threat("flow", 2.0, targeted=True), targets=targets)
    assert found.found.float().mean() > 0.5
    assert (Net()(found.x_adv).argmax(1) == targets)[found.found].all()


def test_smoothness_has_its_price_and_its_effect():
    def rough(smooth: float) -> float:
        x = _data()[:, :1]
        made = []

        class Spy(nn.Module):
            def forward(self, image: Tensor) -> Tensor:
                made.append(image.detach())
                return torch.stack([image.mean((1, 2, 3)), image[:, 0, ::2].mean((1, 2)) - 9], 1)

        StAdv(steps=20, smooth=smooth).run(
            Oracle(Spy()), x, torch.zeros(40, dtype=torch.int64), Threat("flow", 0.5), check_model=False
        )
        return float((made[-1] - x).abs().mean())

    assert rough(1.0) < 0.5 * rough(0.0)


def test_flat_images_and_odd_shapes_are_answered():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.mean((1, 2, 3)), -x.mean((1, 2, 3))], 1)

    for shape in ((1, 1, 1), (2, 1, 7), (1, 5, 1)):
        x = torch.full((3, *shape), 0.5)
        found = StAdv(steps=3).run(Oracle(Mean()), x, torch.zeros(3, dtype=torch.int64), Threat("flow", 1.0))
        assert torch.equal(found.x_adv, x) and not found.found.any() and torch.isfinite(found.distance).all()


def test_bad_input_is_refused_with_a_reason():
    x, y = torch.rand(4, 12), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(UnsupportedError, match="needs images"):
        StAdv().run(Oracle(Net()), x, y, Threat("flow", 1.0))
    with pytest.raises(InputError, match="needs images"):
        judge(nn.Linear(12, 2), x, x, y, Threat("flow", 1.0))
    with pytest.raises(UnsupportedError, match="does not search in linf"):
        StAdv().run(Oracle(Net()), _data(), torch.zeros(40, dtype=torch.int64), Threat("linf", 1.0))
    with pytest.raises(UnsupportedError, match="finite eps"):
        StAdv().run(Oracle(Net()), _data(), torch.zeros(40, dtype=torch.int64), Threat("flow", math.inf))
    with pytest.raises(InputError, match="at least 1"):
        build_attack("stadv", steps=0)
