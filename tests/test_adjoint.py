"""The continuous adjoint: right in the limit of many steps, wrong by a known factor on coarse grids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.oracle import EOT, Adjoint, Oracle
from maodun.core.streams import Stream
from maodun.defenses import Defended
from maodun.defenses.purification import CLEAN, Denoiser, DiffusionFilter, Levels
from maodun.defenses.purification.transfer import DistributionTransfer


class Gaussian(Denoiser):
    """The noise's posterior mean for a Gaussian prior: linear in u."""

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        scale, sigma = levels.at(t)
        return sigma * (u - 0.1 * scale) / ((0.3 * scale) ** 2 + sigma**2)


def gradient(filter_: DiffusionFilter, adjoint: int | None) -> Tensor:
    draws = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (0.4 + 0.2 * draws).requires_grad_()
    ids = torch.arange(2)
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        if adjoint is None:
            out = filter_(x)
        else:
            with filter_.adjoint_process(adjoint):
                out = filter_(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    return grad


def factors(filter_: DiffusionFilter, backwards: bool) -> float:
    """The slope of Euler and Maruyama's chain, or of the adjoint, which looks at the other end of every step."""
    total, levels = 1.0, filter_.levels
    for t, s in filter_.moves():
        if t == CLEAN:
            total *= levels.at(s)[0]
            continue
        at = max(s, 0) if backwards else t
        (f, square), (scale, sigma) = levels.coefficients(at), levels.at(at)
        slope = -f - square / ((0.3 * scale) ** 2 + sigma**2)
        total *= 1.0 + slope * (levels.moment(t) - levels.moment(s))
    return total


def test_it_is_the_product_of_the_equations_slopes_at_the_other_ends() -> None:
    filter_ = DiffusionFilter(Gaussian(), t_star=0.1, steps=10, sampler="euler_maruyama", rounds=2)
    assert torch.allclose(gradient(filter_, 0), torch.tensor(factors(filter_, True), dtype=torch.float64))
    assert torch.allclose(gradient(filter_, None), torch.tensor(factors(filter_, False), dtype=torch.float64))


def test_it_nears_the_exact_gradient_with_many_steps_and_misses_it_with_few() -> None:
    error = []
    for steps in (5, 25, 100):
        exact = gradient(DiffusionFilter(Gaussian(), steps=steps, sampler="euler_maruyama"), None)
        found = gradient(DiffusionFilter(Gaussian(), steps=steps), 0)
        error.append(float((found - exact).abs().max() / exact.abs().max()))
    assert error[0] > 0.2
    assert error[0] > error[1] > error[2]
    assert error[2] < 0.1


def test_the_oracle_offers_it_and_gives_the_filter_back() -> None:
    filter_ = DistributionTransfer(Gaussian(), mode="conf", steps=4, sampler="ddim")
    model = Defended(filter_, nn.Flatten())
    path, way = filter_.path, filter_.gradient
    x, ids = torch.rand(3, 1, 3, 3), torch.arange(3)
    whole = []
    for size in (1, 60):
        oracle = Oracle(model, gradient=EOT(Adjoint(8), 4), batch_size=size)
        whole.append(oracle.session(x, ids, 0).estimate(x, ids, lambda z, i: z[:, :1])[2][0])
    assert torch.allclose(whole[0], whole[1], atol=1e-5)
    assert filter_.path is path and filter_.gradient is way


def test_it_is_torchsdes_adjoint() -> None:
    """The library that DiffPure was attacked with, on the same equation and Brownian path, to rounding."""
    torchsde = pytest.importorskip("torchsde")
    filter_ = DiffusionFilter(Gaussian(), t_star=0.1, steps=20)
    levels, steps = filter_.levels, 20
    (_, top), *down = [*filter_.moves()]
    grid = [levels.moment(top) - levels.moment(t) for t, _ in down] + [levels.moment(top)]
    index = [t for t, _ in down] + [0]

    def place(tau: Tensor) -> int:
        return min(range(steps + 1), key=lambda k: abs(grid[k] - float(tau)))

    class Equation(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def f(self, tau: Tensor, y: Tensor) -> Tensor:
            t = index[place(tau)]
            drift, square = levels.coefficients(t)
            return -drift * y - square * filter_.denoiser(y, t, levels) / levels.at(t)[1]

        def g(self, tau: Tensor, y: Tensor) -> Tensor:
            return torch.full_like(y, levels.coefficients(index[place(tau)])[1] ** 0.5)

    class Path:
        shape, dtype, device, levy_area_approximation = (2, 9), torch.float64, torch.device("cpu"), "none"

        def __call__(self, a: Tensor, b: Tensor, **_: object) -> Tensor:
            first, last = place(a), place(b)
            moved = [noise[i + 1] * (grid[i + 1] - grid[i]) ** 0.5 for i in range(min(first, last), max(first, last))]
            return sum(moved, torch.zeros(2, 9, dtype=torch.float64)) * (1 if last >= first else -1)

    draws = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, ids = (0.4 + 0.2 * draws).requires_grad_(), torch.arange(2)
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        noise = [context.noise(x, f"adjoint-{i}").normal().flatten(1) for i in range(steps + 1)]
    scale, sigma = levels.at(top)
    ends = torchsde.sdeint_adjoint(
        Equation(), scale * (2 * x - 1).flatten(1) + sigma * noise[0], torch.tensor([grid[0], grid[-1]]).double(),
        bm=Path(), method="euler", adjoint_method="euler", dt=grid[1] - grid[0], adjoint_params=(),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(((ends[-1] + 1) / 2).clamp(0, 1).sum(), x)
    assert torch.allclose(grad, gradient(filter_, 0), rtol=1e-10)
