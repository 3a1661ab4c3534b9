"""The box-constrained projection onto a hyperplane, against a solver that knows nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from tests.oracles import generator

from maodun.attacks.minimum.hyperplane import reach
from maodun.core.geometry import norms

D = 12


def _planes(n: int, seed: int, spread: float = 0.5):
    """Points at and off the walls, normals with zeros and very unequal entries, gaps within and beyond reach."""
    source = generator(seed)
    points = torch.rand(2, n, D, generator=source, dtype=torch.float64)
    points = torch.where(torch.rand(2, n, D, generator=source) < 0.3, points.round(), points)
    normal = torch.randn(n, D, generator=source, dtype=torch.float64) ** 3
    normal = torch.where(torch.rand(n, D, generator=source) < 0.1, torch.zeros_like(normal), normal)
    gap = spread * torch.randn(2, n, generator=source, dtype=torch.float64) * normal.abs().sum(1)
    return points, normal, gap


def _reachable(points: torch.Tensor, normal: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
    room = torch.where(-gap.sign().unsqueeze(-1) * normal > 0, 1 - points, points)
    return (room * normal.abs()).sum(-1) > gap.abs() * 1.001


def _least(point: np.ndarray, normal: np.ndarray, gap: float, norm: str) -> float:
    """Least norm of a move m with normal . m = -gap that stays in the box, from scipy."""
    low, high = -point, 1.0 - point
    if norm == "l2":
        start = np.clip(-gap * normal / (normal @ normal), low, high)
        plane = {"type": "eq", "fun": lambda m: normal @ m + gap, "jac": lambda m: normal}
        found = minimize(
            lambda m: m @ m, start, jac=lambda m: 2 * m, bounds=list(zip(low, high, strict=True)), constraints=[plane],
            method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
        )  # fmt: skip
        assert found.success or abs(normal @ found.x + gap) < 1e-6
        return float(np.linalg.norm(found.x))
    # Variables m and its bounds t: |m_i| <= t_i (l1) or |m_i| <= t (linf).
    extra = D if norm == "l1" else 1
    bound = np.eye(D) if norm == "l1" else np.ones((D, 1))
    upper = np.block([[np.eye(D), -bound], [-np.eye(D), -bound]])
    found = linprog(
        np.r_[np.zeros(D), np.ones(extra)], A_ub=upper, b_ub=np.zeros(2 * D), A_eq=np.r_[normal, np.zeros(extra)][None],
        b_eq=[-gap], bounds=[*zip(low, high, strict=True), *[(0, None)] * extra],
    )  # fmt: skip
    assert found.success
    return float(found.fun)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_moves_are_the_shortest_that_reach_the_plane(norm):
    points, normal, gap = _planes(10, seed=0, spread=0.2)
    moves = reach(points, normal, gap, norm)
    able = _reachable(points, normal, gap)
    assert 0.5 < able.double().mean() < 1
    assert ((points + moves >= -1e-12) & (points + moves <= 1 + 1e-12)).all()
    assert torch.allclose((moves * normal).sum(-1)[able], -gap[able], rtol=1e-9, atol=1e-9)
    for which, row in able.nonzero().tolist():
        least = _least(points[which, row].numpy(), normal[row].numpy(), float(gap[which, row]), norm)
        ours = float(norms(moves[which, row][None], norm))
        assert ours == pytest.approx(least, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_plane_out_of_reach_sends_every_entry_to_its_wall(norm):
    points, normal, _ = _planes(20, seed=1)
    gap = 2.0 * normal.abs().sum(1).expand(2, -1)
    landed = points + reach(points, normal, gap, norm)
    used = normal != 0
    corner = (normal < 0).double().expand_as(landed)
    assert torch.allclose(landed[:, used], corner[:, used])
    assert torch.equal(landed[:, ~used], points[:, ~used])


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_float32_with_many_entries_and_tiny_or_huge_normals_stays_exact(norm):
    source = generator(3)
    points = torch.rand(2, 6, 3072, generator=source).mul(1.6).sub(0.3).clamp(0, 1)
    normal = torch.randn(6, 3072, generator=source) * torch.tensor([1e-12, 1e-4, 1.0, 1e3, 1e8, 0.0])[:, None]
    gap = 0.02 * normal.abs().sum(1) * torch.tensor([[1.0], [-1.0]])
    moves = reach(points, normal, gap, norm)
    assert torch.isfinite(moves).all()
    assert (moves[:, 5] == 0).all()
    reached = (moves.double() * normal.double()).sum(-1)[:, :5]
    assert torch.allclose(reached, -gap[:, :5].double(), rtol=1e-4, atol=0)
