"""Square attack: the published schedule, windows that belong to their sample, kernels of length one, and the price."""

from __future__ import annotations

import pytest
import torch
from oracles import Counting, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.query import windows
from maodun.attacks.query.square import Square, window_share, window_side
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Budget, Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

RADII = {"linf": 0.1, "l2": 0.6, "l1": 2.0}
SHAPE = (2, 5, 7)
N = 32
IDS = torch.arange(N)


class Net(nn.Module):
    """A small fixed non-linear classifier of 2 x 5 x 7 images."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(0.5 * Stream(0, "a").normal(torch.arange(24), (70,)))
        self.b = nn.Parameter(Stream(0, "b").normal(torch.arange(5), (24,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.flatten(1) @ self.a.T) @ self.b.T


def _data() -> tuple[Tensor, Tensor]:
    x = Stream(0, "x").uniform(IDS, SHAPE)
    with torch.no_grad():
        return x, Net()(x).argmax(1)


def test_the_window_halves_at_the_published_queries():
    marks = [0, 10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000]
    for k, (start, end) in enumerate(zip(marks, [*marks[1:], 20000], strict=True)):
        assert window_share(end) == pytest.approx(0.8 / 2**k)
        if start:
            assert window_share(start + 1) == pytest.approx(0.8 / 2**k)
    assert window_share(0) == 0.8
    x = torch.zeros(1, 3, 32, 32)
    assert [Square().side(query, x, "linf") for query in (0, 11, 51, 201, 501, 1001, 2001, 4001)] == [
        29, 20, 14, 10, 7, 5, 4, 3,
    ]  # fmt: skip
    assert [Square().side(query, x, "l2") for query in (0, 11, 51, 4001)] == [29, 21, 15, 3]
    assert Square(queries=5000, rescale=True).side(26, x, "linf") == Square().side(52, x, "linf")
    assert window_side(0.8, 3, 40, "linf") == 3 and window_side(1e-4, 8, 8, "linf") == 1


@pytest.mark.parametrize("norm", RADII)
def test_a_sample_meets_its_own_windows_whatever_batch_it_is_in(norm):
    x, _ = _data()
    threat, stream = Threat(norm, RADII[norm]), Stream(0, "w")
    whole = windows.plan(x, IDS, stream, 100, 6, 3, threat)
    few = windows.plan(x[5:9], IDS[5:9], stream, 102, 2, 3, threat)
    assert torch.equal(whole.where[5:9, 2:4], few.where) and torch.equal(whole.value[5:9, 2:4], few.value)
    assert len({tuple(row.tolist()) for row in whole.where[:, 0]}) > 5
    assert whole.where.max() == (69 if norm == "linf" else 34) and whole.where.min() == 0


def test_every_position_and_sign_is_drawn():
    x = torch.full((64, 1, 5, 7), 0.5)
    plan = windows.plan(x, torch.arange(64), Stream(0, "w"), 0, 40, 3, Threat("linf", 0.25))
    first = plan.where[..., 0].flatten()
    assert set(first.tolist()) == {7 * row + column for row in range(3) for column in range(5)}
    assert abs(float((plan.value > 0.5).float().mean()) - 0.5) < 0.02
    assert set(plan.value.unique().tolist()) == {0.25, 0.75}


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("side", [1, 2, 3, 5, 8])
def test_kernels_have_length_one_and_balance(norm, side):
    both = windows.kernels(side, norm)
    assert torch.allclose(torch.linalg.vector_norm(both, 2.0 if norm == "l2" else 1.0, dim=1), torch.ones(2))
    assert torch.equal(both[0].reshape(side, side).T.flatten(), both[1])
    if side > 1:
        assert (both > 0).any() and (both < 0).any()


def test_kernels_are_the_published_ones():
    # Side 3: a single row above, two rows below; every rectangle adds 1 / k**2 around the middle.
    upper = torch.tensor([[1 / 4, 1 + 1 / 4, 1 / 4]])
    lower = torch.tensor([[1 / 4, 1 / 4, 1 / 4], [1 / 4, 1 + 1 / 4, 1 / 4]])
    both = torch.cat([upper / upper.norm(), -lower / lower.norm()])
    assert torch.allclose(windows.kernels(3, "l2")[0].reshape(3, 3), both / both.norm(), atol=1e-6)


@pytest.mark.parametrize("norm", RADII)
def test_candidates_are_real_and_inside(norm):
    x, y = _data()
    threat = Threat(norm, RADII[norm])
    found = Square(queries=150).run(Oracle(Net(), access="scores"), x, y, threat)
    assert found.found.float().mean() > 0.2
    assert torch.equal(Net()(found.x_adv).argmax(1) != y, found.found)
    assert threat.contains(found.x_adv, x).all()
    longer = Square(queries=300).run(Oracle(Net(), access="scores"), x, y, threat)
    assert (found.found <= longer.found).all()


@pytest.mark.parametrize("norm", RADII)
def test_batches_and_order_change_nothing(norm):
    x, y = _data()
    threat = Threat(norm, RADII[norm] / 3)
    whole = Square(queries=60).run(Oracle(Net(), access="scores", batch_size=64), x, y, threat)
    assert 0.05 < whole.found.float().mean() < 0.95
    for size in (1, 7):
        other = Square(queries=60).run(Oracle(Net(), access="scores", batch_size=size), x, y, threat)
        assert torch.equal(other.found, whole.found) and torch.allclose(other.x_adv, whole.x_adv, atol=1e-5)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    other = Square(queries=60).run(Oracle(Net(), access="scores"), x[order], y[order], threat, ids=IDS[order])
    assert torch.equal(other.found, whole.found[order]) and torch.equal(other.queries, whole.queries[order])
    alone = Square(queries=60).run(Oracle(Net(), access="scores"), x[9:10], y[9:10], threat, ids=IDS[9:10])
    assert torch.equal(alone.queries, whole.queries[9:10])


def test_linf_reaches_the_optimum_of_a_linear_model():
    model = linear()
    x, y = samples(model, 24)
    distance = nearest(model, x, "linf")
    eps = float(distance.median())
    found = Square(queries=1200).run(Oracle(model, access="scores"), x, y, Threat("linf", eps)).found
    assert found[distance < 0.9 * eps].all() and not found[distance > 1.001 * eps].any()


@pytest.mark.parametrize("norm", RADII)
def test_a_query_is_one_forward_and_nothing_else(norm):
    model = Counting(Net())
    x, y = _data()
    model.clear()
    found = Square(queries=40).run(Oracle(model, access="scores"), x, y, Threat(norm, 1e-6), check_model=False)
    assert (found.queries == 42).all() and (found.forwards == 42).all() and (found.backwards == 0).all()
    assert model.graph_rows == 0
    assert N * 42 <= model.rows <= N * 42 + 24  # and a few to look for randomness and to choose the batch


def test_a_budget_of_queries_is_kept_and_leaves_a_clean_state():
    x, y = _data()
    oracle = Oracle(Net(), access="scores", budget=Budget(queries=20))
    found = Square(queries=100).run(oracle, x, y, Threat("linf", 0.03))
    free = Square(queries=18).run(Oracle(Net(), access="scores"), x, y, Threat("linf", 0.03))
    assert (found.queries <= 20).all() and torch.equal(found.found, free.found)
    assert (found.status[~found.found] == int(Status.exhausted_budget)).all()


def test_a_given_target_is_reached():
    model = linear()
    x, y = samples(model, 16)
    targets = (y + 1) % 5
    found = Square(queries=400).run(
        Oracle(model, access="scores"), x, y, Threat("linf", 0.4, targeted=True), targets=targets
    )
    assert found.found.all() and torch.equal(model(found.x_adv).argmax(1), targets)


def test_what_is_not_an_image_or_a_query_is_refused():
    model = linear()
    x, y = samples(model, 4, (24,))
    with pytest.raises(UnsupportedError, match="images"):
        Square().run(Oracle(model, access="scores"), x, y, Threat("linf", 0.1))
    with pytest.raises(InputError, match="queries"):
        Square(queries=0)
    with pytest.raises(InputError, match="share"):
        Square(p_init=1.5)


def test_tiny_images_work_in_every_norm():
    for shape in ((1, 1, 1), (1, 2, 3), (40, 4, 4)):
        x = 0.3 + 0.4 * Stream(0, "x").uniform(torch.arange(4), shape)
        model = linear(3, x[0].numel())
        y = model(x).argmax(1)
        for norm, eps in RADII.items():
            found = Square(queries=12).run(Oracle(model, access="scores"), x, y, Threat(norm, eps), check_model=False)
            assert torch.isfinite(found.x_adv).all() and Threat(norm, eps).contains(found.x_adv, x).all()
