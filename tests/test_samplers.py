"""Samplers and noise levels against Gaussian data, where every chain is affine and every limit is known."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from gaussians import Gaussian
from torch import Tensor

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.purification import (
    CLEAN,
    SAMPLERS,
    Denoiser,
    DiffusionFilter,
    Levels,
    from_eps,
    parse_levels,
    sub_vp,
    to_eps,
    ve,
    vp,
    vp_discrete,
)
from maodun.defenses.purification.network import Core
from maodun.defenses.purification.samplers import DDIM, DDPM, Sampler
from maodun.defenses.purification.solvers import DPMSolver, EulerMaruyama, Exponential, Heun

TABLES = [vp_discrete(), vp(), ve(), sub_vp()]
MEAN, VARIANCE = 0.1, 0.09


class TestLevels:
    @pytest.mark.parametrize(
        ("t_star", "scale", "sigma", "ratio"),
        [
            (0.036, 0.992, 0.128, 0.129),
            (0.045, 0.988, 0.156, 0.158),
            (0.075, 0.969, 0.248, 0.256),
            (0.10, 0.947, 0.322, 0.340),
            (0.15, 0.887, 0.461, 0.519),
            (0.20, 0.811, 0.585, 0.720),
        ],
    )
    def test_published_times_have_their_published_noise(
        self, t_star: float, scale: float, sigma: float, ratio: float
    ) -> None:
        table = vp()
        t = table.index(t_star)
        assert table.at(t) == pytest.approx((scale, sigma), abs=6e-4)
        assert table.ratio(t) == pytest.approx(ratio, abs=6e-4)

    @pytest.mark.parametrize("table", [vp(count=4000), ve(count=4000), sub_vp(count=4000)], ids=lambda each: each.name)
    def test_the_columns_solve_the_equation(self, table: Levels) -> None:
        """d log scale = f dt and d(ratio^2) = g^2 / scale^2 dt, by the midpoint rule between neighbours."""
        step = 1 / len(table)
        log_scale, freed = table.scale.log(), table.ratios.square()
        drift = (table.drift[1:] + table.drift[:-1]) / 2 * step
        gain = (table.diffusion / table.scale.square() * step).log()
        assert torch.allclose(log_scale.diff(), drift, atol=1e-9)
        # Where the noise begins, sub-VP's g^2 grows as t^3 and the midpoint of its logarithm is no midpoint.
        assert torch.allclose(freed.diff()[100:].log(), (gain[101:] + gain[100:-1]) / 2, atol=1e-3)

    def test_the_discrete_chain_is_the_vp_equation_up_to_its_step(self) -> None:
        assert torch.allclose(vp_discrete().scale, vp().scale, atol=5e-3)
        assert torch.allclose(vp_discrete().sigma, vp().sigma, atol=5e-3)

    @pytest.mark.parametrize("table", TABLES, ids=lambda each: each.name)
    def test_a_name_rebuilds_its_table(self, table: Levels) -> None:
        again = parse_levels(table.name)
        assert again == table
        assert torch.equal(again.sigma, table.sigma)
        assert table.at(CLEAN) == (1.0, 0.0)
        assert table.nearest(table.ratio(123)) == 123
        assert bool((table.ratios.diff() > 0).all())

    @pytest.mark.parametrize("text", ["vpp", "vp(a)", "vp(1,2,3,4)"])
    def test_unknown_tables_are_refused(self, text: str) -> None:
        with pytest.raises(InputError, match="levels"):
            parse_levels(text)


def affine(sampler: Sampler, levels: Levels, path: list[int]) -> tuple[float, float, list[float]]:
    """Return (offset, gain of u, gains of every step's noise) of a chain: one row per unit vector, in one pass."""
    steps = len(path) - 1
    denoiser = Gaussian(MEAN, VARIANCE)
    u = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    u[1] = 1.0
    state = sampler.init(u)
    for i, (t, s) in enumerate(pairwise(path)):
        noise = torch.zeros_like(u)
        noise[i + 2] = 1.0
        state = sampler.step(denoiser, levels, state, t, s, noise)
    out = state[0].flatten()
    return float(out[0]), float(out[1] - out[0]), (out[2:] - out[0]).tolist()


def moments(sampler: Sampler, levels: Levels, path: list[int]) -> tuple[float, float]:
    """Return mean and variance at the end of a chain that starts from the exact marginal."""
    offset, gain, gains = affine(sampler, levels, path)
    scale, sigma = levels.at(path[0])
    start = scale**2 * VARIANCE + sigma**2
    return offset + gain * scale * MEAN, gain**2 * start + sum(each**2 for each in gains)


def truth(levels: Levels, t: int) -> tuple[float, float]:
    scale, sigma = levels.at(t)
    return scale * MEAN, scale**2 * VARIANCE + sigma**2


FINE = {name: build(count=4096) for name, build in (("vp", vp), ("ve", ve), ("sub_vp", sub_vp))}
ORDERS = [
    (EulerMaruyama(), 1),
    (DDPM(clip=False), 1),
    (DDPM(clip=False, variance="beta"), 1),
    (DDIM(eta=0.0), 1),
    (DDIM(eta=1.0), 1),
    (Exponential(), 1),
    (DPMSolver(), 2),
    (Heun(), 2),
    (Heun(churn=0.5), 2),
]


@pytest.mark.parametrize("table", ["vp", "sub_vp"])
@pytest.mark.parametrize(("sampler", "order"), ORDERS, ids=repr)
def test_order_of_convergence(sampler: Sampler, order: int, table: str) -> None:
    """Halving the steps between two levels divides the error of mean and variance by 2^order, at least."""
    levels, errors = FINE[table], []
    for steps in (48, 96, 192):
        path = [2047 - 1536 * k // steps for k in range(steps + 1)]
        mean, variance = moments(sampler, levels, path)
        errors.append(max(abs(mean - truth(levels, 511)[0]), abs(variance - truth(levels, 511)[1])))
    rates = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(rate > order - 0.35 for rate in rates), (errors, rates)
    assert order == 2 or rates[-1] < 1.35, "a first-order method that converges faster is not the one it says"
    assert errors[-1] < 2e-2


@pytest.mark.parametrize("sampler", [DDIM(eta=0.0), DPMSolver(), Heun()], ids=repr)
def test_flows_are_the_map_between_the_marginals(sampler: Sampler) -> None:
    """The flow of a Gaussian stretches: u_s = scale_s m + (sd_s / sd_t) (u_t - scale_t m)."""
    levels = FINE["vp"]
    path = [2047 - 4 * k for k in range(385)]
    offset, gain, gains = affine(sampler, levels, path)
    (mean_t, var_t), (mean_s, var_s) = truth(levels, path[0]), truth(levels, path[-1])
    assert gain == pytest.approx(math.sqrt(var_s / var_t), rel=3e-3)
    assert offset == pytest.approx(mean_s - math.sqrt(var_s / var_t) * mean_t, abs=3e-4)
    assert max(map(abs, gains)) == 0.0


def test_the_second_order_equation_beats_the_first() -> None:
    """DPM-Solver++(2M) of the equation: first order in the variance, but below its first-order relative."""
    levels, errors = FINE["vp"], {}
    for sampler in (DPMSolver(sde=True), DDIM(eta=1.0)):
        path = [2047 - 64 * k for k in range(25)]
        mean, variance = moments(sampler, levels, path)
        errors[type(sampler).__name__] = abs(mean - truth(levels, 511)[0]) + abs(variance - truth(levels, 511)[1])
    assert errors["DPMSolver"] < 0.5 * errors["DDIM"]


@pytest.mark.parametrize("name", sorted(set(SAMPLERS) - {"tweedie"}))
def test_the_filter_keeps_the_data_distribution(name: str) -> None:
    """Data of correlated pixels, diffused and brought back, has the mean and covariance it had (Monte Carlo)."""
    n, root = 4000, torch.tensor([[0.3, 0.0, 0.0], [0.15, 0.2, 0.0], [-0.1, 0.1, 0.25]], dtype=torch.float64)
    covariance = root @ root.T
    stream, ids = Stream(0, "data"), torch.arange(n)
    u = MEAN + stream.normal(ids, (3,)).double() @ root.T
    sampler = DDPM(clip=False) if name == "ddpm" else SAMPLERS[name]
    filter_ = DiffusionFilter(Gaussian(MEAN, covariance), 0.3, 75, sampler)
    state = (u.reshape(n, 3, 1, 1),)
    with context.draw(Stream(1, "test"), ids, torch.zeros_like(ids)):
        for i, (t, s) in enumerate(filter_.moves()):
            state = filter_.advance(state, t, s, filter_.draw(state[0], i, t))
    out = state[0].flatten(1)
    error = 5 * covariance.diagonal().sqrt() / math.sqrt(n)
    assert bool(((out.mean(0) - MEAN).abs() < error).all())
    spread = covariance.diagonal().sqrt()
    correlation = (torch.cov(out.T) - covariance) / spread[:, None] / spread
    assert float(correlation.abs().max()) < 5 * math.sqrt(2 / n) + 0.02


def test_a_linear_score_makes_the_filter_a_known_matrix() -> None:
    root = torch.tensor([[0.3, 0.0], [0.15, 0.2]], dtype=torch.float64)
    covariance, eye = root @ root.T, torch.eye(2, dtype=torch.float64)
    filter_ = DiffusionFilter(Gaussian(0.0, covariance), 0.2, 4, "ddim")
    matrix = filter_.levels.at(filter_.path[0])[0] * eye
    for t, s in pairwise(filter_.path):
        (scale_t, sigma_t), (scale_s, sigma_s) = filter_.levels.at(t), filter_.levels.at(s)
        eps = sigma_t * torch.linalg.inv(scale_t**2 * covariance + sigma_t**2 * eye)
        matrix = (scale_s / scale_t * eye + (sigma_s - scale_s * sigma_t / scale_t) * eps) @ matrix
    with context.draw(Stream(0, "test"), torch.zeros(2).long(), torch.zeros(2).long()):
        base = filter_(0.5 * torch.ones(2, 2, 1, 1, dtype=torch.float64))
        moved = filter_(0.5 + 0.01 * eye.reshape(2, 2, 1, 1))
    assert torch.allclose((moved - base).reshape(2, 2) / 0.01, matrix.T, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_steps_are_pure_and_cost_what_they_say(name: str, steps: int) -> None:
    if name == "tweedie" and steps > 1:
        pytest.skip("one step")
    denoiser = Gaussian()
    filter_ = DiffusionFilter(denoiser, 0.1, steps, name)
    before = torch.get_rng_state()
    x, noise = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.ones(3, 1, 2, 2)
    moves = list(filter_.moves())
    ends = []
    for _ in range(2):
        denoiser.calls, state = 0, (x,)
        for t, s in moves:
            state = filter_.advance(state, t, s, noise)
            assert all(each.shape[0] == 3 for each in state)
        assert denoiser.calls == filter_.spec.nfe
        ends.append(state[0])
    assert torch.equal(*ends)
    assert torch.equal(before, torch.get_rng_state())
    halves = []
    for rows in (slice(0, 1), slice(1, 3)):
        state = (x[rows],)
        for t, s in moves:
            state = filter_.advance(state, t, s, noise[rows])
        halves.append(state[0])
    assert torch.allclose(torch.cat(halves), ends[0], atol=1e-6)


def test_relatives_agree() -> None:
    """Ancestral sampling is DDIM with eta 1; one step of DDIM is Tweedie's mean."""
    u, noise = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoiser, levels = Gaussian(), vp_discrete()
    ancestral = DDPM(clip=False).step(denoiser, levels, (u,), 99, 59, noise)[0]
    assert torch.allclose(ancestral, DDIM(eta=1.0).step(denoiser, levels, (u,), 99, 59, noise)[0], atol=1e-12)
    tweedie = SAMPLERS["tweedie"].step(denoiser, levels, (u,), 99, CLEAN, noise)[0]
    assert torch.allclose(tweedie, DDIM(eta=0.0).step(denoiser, levels, (u,), 99, CLEAN, noise)[0], atol=1e-12)


@pytest.mark.parametrize("sampler", [Exponential(), DDIM(eta=1.0), DPMSolver(), DPMSolver(sde=True), Heun()], ids=repr)
def test_what_knows_ratios_only_is_the_same_for_every_equation(sampler: Sampler) -> None:
    """VP and the VE table of the same ratios walk the same way in y = u / scale."""
    levels = vp()
    other = Levels("ratios", levels.time, torch.ones_like(levels.scale), levels.ratios, levels.drift, levels.diffusion)
    y, noise = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = []
    for table in (levels, other):
        state = sampler.init(y * table.at(199)[0])
        for t, s in ((199, 99), (99, 49), (49, CLEAN)):
            state = sampler.step(Gaussian(), table, state, t, s, noise)
        ends.append(state[0])
    assert torch.allclose(*ends, atol=1e-12)


@pytest.mark.parametrize("form", ["eps", "x0", "score", "velocity"])
def test_converters_are_inverse_to_each_other(form: str) -> None:
    u, eps = torch.randn(2, 4, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(to_eps(form, from_eps(form, eps, u, 0.9, 0.3), u, 0.9, 0.3), eps, atol=1e-12)


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(InputError, match="parametrisation"):
        to_eps("epsilon", torch.zeros(1), torch.zeros(1), 1.0, 1.0)
    with pytest.raises(InputError, match="parametrisation"):
        Core(torch.nn.Identity(), vp(), "epsilon")  # type: ignore[arg-type]


class Exactly(torch.nn.Module):
    """A network that answers in a form what is right for Gaussian data; EDM's in its own units."""

    def __init__(self, form: str, levels: Levels, spread: float) -> None:
        super().__init__()
        self.form, self.levels, self.spread = form, levels, spread

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        time = time.reshape(-1, 1, 1, 1)
        if self.form == "edm":
            ratio = (time / 250.0).exp()
            total = ratio**2 + self.spread**2
            y = x * total.sqrt()
            clean = (ratio**2 * MEAN + VARIANCE * y) / (ratio**2 + VARIANCE)
            return (clean - y * self.spread**2 / total) * total.sqrt() / (ratio * self.spread)
        scale, sigma = self.levels.scale[time], self.levels.sigma[time]
        eps = sigma * (x - scale * MEAN) / (scale**2 * VARIANCE + sigma**2)
        if self.form == "eps":
            return eps
        if self.form == "x0":
            return (x - sigma * eps) / scale
        return -eps / sigma if self.form == "score" else ((scale**2 + sigma**2) * eps - sigma * x) / scale


@pytest.mark.parametrize("table", TABLES, ids=lambda each: each.name)
@pytest.mark.parametrize("form", ["edm", "eps", "x0", "score", "velocity"])
def test_all_parametrisations_agree_on_the_noise(form: str, table: Levels) -> None:
    """VP u and EDM y = u / scale of the same image, asked in any table, give one x0 (methods.md 4.2)."""
    chain = vp_discrete()
    core = Core(Exactly(form, chain, 0.5), chain, form, spread=0.5)  # type: ignore[arg-type]
    u = torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t_own in (20, 99, 300):
        # An index of the asked table whose ratio the chain also has, so that the nearest step is not an approximation.
        t = t_own if table == chain else table.nearest(chain.ratio(t_own))
        expected = Gaussian(MEAN, VARIANCE)(u, t, table)
        found = core.at(u, t, table)
        assert torch.allclose(found, expected, atol=1e-9 if table == chain or form == "edm" else 3e-2)
        rows = core(u / table.at(t)[0], torch.full((5,), table.ratio(t), dtype=torch.float64))
        assert torch.allclose(rows, found, atol=1e-6)


def test_a_denoiser_has_to_predict() -> None:
    with pytest.raises(NotImplementedError):
        Denoiser()(torch.zeros(1, 1, 2, 2), 0, vp())
