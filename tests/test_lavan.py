"""LaVAN: a square per image, at the best place of a linear model, painted to the walls of the box."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from ascent import Climbed
from torch import Tensor, nn

from maodun.attacks.registry import build_attack
from maodun.attacks.universal.lavan import LaVAN, window_side
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge

SHAPE = (2, 6, 7)
IDS = torch.arange(30)
EPS = 2


class Net(nn.Module):
    """A small fixed non-linear classifier of 2 x 6 x 7 images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(0.3 * Stream(0, "a").normal(torch.arange(24), (84,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(4), (24,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((x.flatten(1) - 0.5) @ self.a.T) @ self.b.T


def _data() -> tuple[Tensor, Tensor]:
    x = Stream(0, "x").uniform(IDS, SHAPE)
    with torch.no_grad():
        return x, Net()(x).argmax(1)


def test_the_largest_square_that_the_budget_pays_for():
    assert [window_side(eps, (3, 32, 32)) for eps in (3, 11, 12, 300, 1e9)] == [1, 1, 2, 10, 32]
    assert window_side(100, (1, 4, 9)) == 4


def test_linear_models_are_climbed_to_the_closed_form_optimum():
    weight, (x, _) = Stream(0, "w").normal(torch.arange(1), SHAPE)[0], _data()
    gain = (weight.abs() * torch.where(weight > 0, 1 - x, x)).sum(1, keepdim=True)
    best = F.avg_pool2d(gain, 3, stride=1).flatten(1).amax(1) * 9
    model = Climbed(weight)
    LaVAN(steps=5, restarts=1).run(
        Oracle(model, batch_size=64), x, torch.zeros(30, dtype=torch.int64), Threat("l0", 18), stop_early=False,
        check_model=False,
    )  # fmt: skip
    assert torch.allclose(model.best - (x * weight).sum((1, 2, 3)), best, atol=1e-4)


def _run(size: int = 64, order: Tensor = IDS, **options: int):
    x, y = _data()
    attack = LaVAN(**({"steps": 8, "restarts": 2} | options))
    return attack.run(Oracle(Net(), batch_size=size), x[order], y[order], Threat("l0", EPS), ids=IDS[order])


def test_batch_split_and_order_change_nothing():
    whole = _run(restarts=1)
    assert 0.1 < whole.found.float().mean() < 0.95
    for size in (1, 7):
        assert torch.allclose(_run(size, restarts=1).x_adv, whole.x_adv, atol=1e-4)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(_run(order=order, restarts=1).x_adv, whole.x_adv[order], atol=1e-4)


def test_only_one_square_changes_and_more_places_never_lose():
    x, y = _data()
    one, four = _run(restarts=1), _run(restarts=4)
    assert (four.found | ~one.found).all() and four.found.sum() > one.found.sum()
    changed = (four.x_adv != x).any(1)
    for axis in (1, 2):
        touched = changed.any(3 - axis)
        places = torch.arange(touched.shape[1])
        last = torch.where(touched, places, -1).amax(1)
        first = torch.where(touched, places, 99).amin(1)
        assert (last - first)[four.found].max() == 0
    verdict = judge(Net(), four.x_adv, x, y, Threat("l0", EPS))
    assert verdict.valid.all() and torch.equal(verdict.success, four.found)
    spent = one.status == int(Status.exhausted_steps)
    # A clean pass, one pair to choose the place, the steps, and a last look.
    assert (one.forwards[spent] == 11).all() and (one.backwards[spent] == 9).all()


def test_when_no_place_is_left_the_search_ends():
    x, y = _data()
    found = LaVAN(steps=2, restarts=9).run(Oracle(Net()), x, y, Threat("l0", 72))
    spent = found.status == int(Status.exhausted_steps)
    assert (found.backwards[spent] < 1 + 2 * 9).all()


def test_bad_input_is_refused_with_a_reason():
    x, y = _data()
    for call, kind, words in (
        (lambda: LaVAN(side=7).run(Oracle(Net()), x, y, Threat("l0", 200)), InputError, "than the image of 6 x 7"),
        (lambda: LaVAN(side=3).run(Oracle(Net()), x, y, Threat("l0", 17)), InputError, "changes 18 entries"),
        (lambda: LaVAN().run(Oracle(Net()), x, y, Threat("l0", 1)), InputError, "changes 2 entries"),
        (lambda: LaVAN().run(Oracle(Net()), x, y, Threat("l0", math.inf)), UnsupportedError, "finite eps"),
        (lambda: LaVAN().run(Oracle(Net()), x.flatten(1), y, Threat("l0", 9)), UnsupportedError, "needs images"),
        (lambda: LaVAN().run(Oracle(Net()), x, y, Threat("l2", 9)), UnsupportedError, "does not search in l2"),
        (lambda: build_attack("lavan", side=0), InputError, "at least 1"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words):
            call()
