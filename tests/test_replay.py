"""The replayed gradient: equal to plain autograd, finite differences and closed forms, at the memory of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses import Defended
from maodun.defenses.purification import CLEAN, SAMPLERS, Denoiser, DiffusionFilter, Levels, State
from maodun.defenses.purification.replay import Plain, Replay, ReplayError


class Curved(Denoiser):
    """A small convolutional network with smooth, level-dependent answers and derivatives of every order."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        weight = 0.3 * torch.randn(channels, channels, 3, 3, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight)

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        _, sigma = levels.at(t)
        return torch.tanh(nn.functional.conv2d(u, self.weight.to(u.dtype), padding=1) + sigma) + 0.3 * u


class Pulled(DiffusionFilter):
    """A toy guidance of second order: a step along the gradient of a curved energy between state and guide."""

    name = "pulled"

    def guide(self, x: Tensor) -> State:
        return (torch.sin(3.0 * x), x.flatten(1).mean(1))

    def advance(self, state: State, t: int, s: int, noise: Tensor, guide: State = ()) -> State:
        after = super().advance(state, t, s, noise, guide)
        if t == CLEAN:
            return after
        live = torch.is_grad_enabled()
        with torch.enable_grad():
            u = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
            energy = (torch.cos(u) * guide[0] * guide[1].reshape(-1, 1, 1, 1)).sum() + self.denoiser(
                u, t, self.levels
            ).square().sum()
            (slope,) = torch.autograd.grad(energy, u, create_graph=True)
        return (after[0] + 0.05 * (slope if live else slope.detach()), *after[1:])


def images(n: int = 3, shape: tuple[int, ...] = (2, 5, 5), dtype: torch.dtype = torch.float32) -> Tensor:
    draws = torch.rand(n, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (0.3 + 0.4 * draws).to(dtype)


def gradient(model: Callable[[Tensor], Tensor], x: Tensor, number: int = 0) -> Tensor:
    x = x.clone().requires_grad_()
    ids = torch.arange(len(x))
    with context.draw(Stream(0, "test"), ids, torch.full_like(ids, number)):
        out = model(x)
    weights = torch.linspace(-1.0, 2.0, out.numel(), dtype=out.dtype).reshape(out.shape)
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    return grad


def both(
    build: Callable[[], DiffusionFilter], x: Tensor, wrap: Callable[[Any], Any] = lambda f: f
) -> tuple[Tensor, Tensor]:
    plain, replayed = build(), build()
    plain.gradient, replayed.gradient = Plain(), Replay(check=True)
    return gradient(wrap(plain), x), gradient(wrap(replayed), x)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [DiffusionFilter, Pulled])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_it_equals_plain_autograd_for_every_sampler(
    sampler: str, kind: type[DiffusionFilter], dtype: torch.dtype
) -> None:
    steps = 1 if sampler == "tweedie" else 4
    plain, replayed = both(
        lambda: kind(Curved(), t_star=0.08, steps=steps, sampler=sampler, rounds=2), images(dtype=dtype)
    )
    assert plain.abs().max() > 1e-3
    assert relative(plain, replayed) < (1e-5 if dtype == torch.float32 else 1e-10)


def test_voting_is_covered() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Tanh())
    plain, replayed = both(lambda: Pulled(Curved(), steps=3, votes=3), images(), lambda f: Defended(f, head))
    assert relative(plain, replayed) < 1e-5


@pytest.mark.parametrize("keep", ["cpu", "disk"])
def test_states_may_wait_elsewhere(keep: str) -> None:
    filter_, other = Pulled(Curved(), steps=3), Pulled(Curved(), steps=3)
    other.gradient = Replay(keep=keep, check=True)
    x = images().to(memory_format=torch.channels_last)
    assert torch.equal(gradient(filter_, x), gradient(other, x))
    with pytest.raises(InputError, match="disc"):
        Replay(keep="disc")


class Gaussian(Denoiser):
    """The noise's posterior mean for a Gaussian prior: linear in u."""

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        scale, sigma = levels.at(t)
        return sigma * (u - 0.1 * scale) / ((0.3 * scale) ** 2 + sigma**2)


def test_finite_differences_on_one_gaussian_pixel() -> None:
    filter_, x = Pulled(Gaussian(), steps=3), images(4, (1, 1, 1), torch.float64)
    exact = gradient(filter_, x)
    ids, h = torch.arange(4), 1e-6
    ends = []
    for sign in (1.0, -1.0):
        with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
            ends.append(filter_(x + sign * h))
    weights = torch.linspace(-1.0, 2.0, 4, dtype=torch.float64).reshape(4, 1, 1, 1)
    assert torch.allclose(exact, weights * (ends[0] - ends[1]) / (2 * h), atol=1e-6)


def test_a_linear_score_makes_the_filter_a_known_factor() -> None:
    filter_ = DiffusionFilter(Gaussian(), steps=4, sampler="ddim")
    factor, levels = 1.0, filter_.levels
    for t, s in filter_.moves():
        if t == CLEAN:
            factor *= levels.at(s)[0]
        else:
            (scale_t, sigma_t), (scale_s, sigma_s) = levels.at(t), levels.at(s)
            slope = sigma_t / ((0.3 * scale_t) ** 2 + sigma_t**2)
            factor *= scale_s / scale_t + (sigma_s - scale_s * sigma_t / scale_t) * slope
    x = images(dtype=torch.float64)
    weights = torch.linspace(-1.0, 2.0, x.numel(), dtype=torch.float64).reshape(x.shape)
    assert torch.allclose(gradient(filter_, x), factor * weights, atol=1e-12)


def test_a_chain_that_draws_other_noise_is_caught() -> None:
    class Forgetful(DiffusionFilter):
        def draw(self, x: Tensor, i: int, t: int) -> Tensor:
            return torch.randn(x.shape)

    filter_ = Forgetful(Curved(), steps=3)
    filter_.gradient = Replay(check=True)
    with pytest.raises(ReplayError, match="move"):
        gradient(filter_, images())


def test_two_draws_differ_and_equal_draws_agree() -> None:
    filter_, x = DiffusionFilter(Curved(), steps=3), images()
    assert torch.equal(gradient(filter_, x, number=1), gradient(filter_, x, number=1))
    assert relative(gradient(filter_, x, number=1), gradient(filter_, x, number=2)) > 1e-4


def test_outside_of_any_draw_it_replays_its_own_noise() -> None:
    filter_, x = DiffusionFilter(Curved(), steps=3), images().requires_grad_()
    filter_.gradient = Replay(check=True)
    out = filter_(x)
    out.sum().backward()
    torch.manual_seed(1)
    first = filter_(x)
    torch.manual_seed(1)
    assert torch.equal(first, filter_(x))
    with torch.no_grad():
        torch.manual_seed(1)
        assert torch.equal(first, filter_(x))


def test_autocast_is_the_same_in_both_passes() -> None:
    filter_, x = Pulled(Curved(), steps=3), images()
    filter_.gradient = Replay(check=True)
    x.requires_grad_()
    ids = torch.arange(len(x))
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)), torch.autocast("cpu", dtype=torch.bfloat16):
        out = filter_(x)
    assert out.dtype == torch.float32
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.isfinite(grad).all()


def test_parameters_collect_nothing_and_several_heads_share_one_pass() -> None:
    filter_, x = DiffusionFilter(Curved(), steps=3), images().requires_grad_()
    asked: list[int] = []
    filter_.denoiser.register_forward_hook(lambda *_: asked.append(1))
    out = filter_(x)
    first, second = (torch.autograd.grad(out[:, k].sum(), x, retain_graph=True)[0] for k in (0, 1))
    assert len(asked) == 9
    assert not torch.equal(first, second)
    assert all(parameter.grad is None for parameter in filter_.parameters())


def test_what_autograd_keeps_does_not_grow_with_the_steps() -> None:
    """Tensors saved for backward, counted in bytes: those of a step are gone when the next is recomputed."""
    kept: dict[int, int] = {}
    for steps in (5, 50):
        filter_, x = DiffusionFilter(Curved(), t_star=0.2, steps=steps), images().requires_grad_()
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            filter_(x)
        kept[steps] = total
    assert kept[5] == kept[50]
