"""Projections and steps against what a general solver or a closed form says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from maodun.core import geometry
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.core.threat import Threat

NORMS = ["linf", "l2", "l1"]


def _points(seed: int, n: int = 16, d: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(n)
    x = Stream(seed, "x").uniform(ids, (d,))
    x[:, 0], x[:, 1] = 0.0, 1.0
    return x, x + 0.8 * Stream(seed, "move").normal(ids, (d,))


@pytest.mark.parametrize("seed", range(3))
def test_l1_projection_is_the_euclidean_one(seed):
    x, far = _points(seed, n=4, d=5)
    eps = 0.6
    ours = geometry.project_l1(far, x, eps)
    for i in range(4):
        base, goal = x[i].double().numpy(), far[i].double().numpy()

        # Split into positive and negative parts: a smooth problem that a general solver can do.
        def cost(v, base=base, goal=goal):
            return float(((base + v[:5] - v[5:] - goal) ** 2).sum())

        bounds = [(0, 1 - b) for b in base] + [(0, b) for b in base]
        budget = {"type": "ineq", "fun": lambda v: eps - v.sum()}
        best = minimize(
            cost, np.zeros(10), bounds=bounds, constraints=[budget], options={"ftol": 1e-14, "maxiter": 500}
        )
        assert ((ours[i].double().numpy() - goal) ** 2).sum() <= best.fun + 1e-6
    assert (geometry.norms(ours - x, "l1") <= eps + 1e-5).all()


@pytest.mark.parametrize("norm", [*NORMS, "l0"])
def test_projection_is_feasible_and_idempotent_and_leaves_inner_points(norm):
    x, far = _points(1)
    eps = {"linf": 0.1, "l2": 0.4, "l1": 0.9, "l0": 3.0}[norm]
    threat = Threat(norm, eps)
    once = threat.project(far, x)
    assert threat.contains(once, x).all()
    assert torch.allclose(threat.project(once, x), once, atol=1e-6)
    inner = threat.project(x + (once - x) * 0.5, x) if norm != "l0" else once
    assert torch.allclose(inner, x + (once - x) * (0.5 if norm != "l0" else 1.0), atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 5.0), st.sampled_from(NORMS))
def test_projection_never_leaves_ball_or_box(seed, eps, norm):
    x, far = _points(seed, n=3, d=9)
    out = Threat(norm, eps).project(far * 3.0, x)
    assert (out >= 0).all() and (out <= 1).all()
    assert (geometry.norms(out - x, norm) <= eps * (1 + 1e-5) + 1e-5).all()


def test_radius_per_sample():
    x, far = _points(2, n=3)
    radii = torch.tensor([0.0, 0.2, 5.0])
    for norm in NORMS:
        out = geometry.PROJECTIONS[norm](far, x, radii)
        for i in range(3):
            alone = geometry.PROJECTIONS[norm](far[i : i + 1], x[i : i + 1], float(radii[i]))
            assert torch.allclose(out[i : i + 1], alone, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 4, 4)])
def test_random_starts_fill_the_ball(norm, shape):
    ids = torch.arange(400)
    x = torch.full((400, *shape), 0.5)
    eps = 0.3
    start = Threat(norm, eps).random_start(x, Stream(0, "s"), ids)
    d = math.prod(shape)
    radius = geometry.norms(start - x, norm) / eps
    assert (radius <= 1 + 1e-5).all()
    # In a d-dimensional ball the radius has distribution r^d, whatever the norm.
    from scipy import stats

    assert stats.kstest(radius.double().numpy(), lambda r: np.clip(r, 0, 1) ** d).pvalue > 1e-3


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_step_has_unit_length_and_climbs(norm):
    ids = torch.arange(10)
    gradient = Stream(0, "g").normal(ids, (3, 20))
    x = torch.full_like(gradient, 0.5)
    step = Threat(norm, 1.0).steepest(gradient, x)
    assert torch.allclose(geometry.norms(step, norm), torch.ones(10), atol=1e-5)
    assert ((step * gradient).flatten(1).sum(1) > 0).all()
    zero = Threat(norm, 1.0).steepest(torch.zeros_like(gradient), x)
    assert torch.equal(zero, torch.zeros_like(zero))


def test_l1_step_skips_entries_the_box_blocks():
    gradient = torch.tensor([[5.0, 1.0, -4.0, 0.5]])
    x = torch.tensor([[1.0, 0.5, 0.0, 0.5]])
    assert Threat("l1", 1.0).steepest(gradient, x).tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_threat_refuses_nonsense():
    with pytest.raises(InputError, match="did you mean 'linf'"):
        Threat("linff", 0.1)
    with pytest.raises(InputError, match="negative"):
        Threat("l2", -1.0)
