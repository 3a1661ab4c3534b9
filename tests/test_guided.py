"""Guided purifiers: no guidance is the plain filter, guidance is each sample's own, its whole derivative is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.estimators import BPDA
from maodun.core.streams import Stream
from maodun.defenses import Defended, build_defense
from maodun.defenses.ensembles import Committee
from maodun.defenses.purification import CLEAN, SAMPLERS, Denoiser, DiffusionFilter, Levels
from maodun.defenses.purification.gdmp import GDMP
from maodun.defenses.purification.likelihood import LikelihoodMaximisation
from maodun.defenses.purification.replay import Plain, Replay
from maodun.defenses.purification.transfer import MODES, DistributionTransfer, last_features

MAKERS: dict[str, Callable[[], Defended]] = {
    **{mode: lambda mode=mode: wrap(DistributionTransfer(Curved(), mode=mode, steps=3, copies=2)) for mode in MODES},
    "at x0": lambda: wrap(DistributionTransfer(Curved(), through=False, steps=3, rounds=2, copies=2)),
    "gdmp": lambda: wrap(GDMP(Curved(), steps=3, rounds=2)),
    "likelihood": lambda: wrap(LikelihoodMaximisation(Curved(), steps=3)),
}


class Curved(Denoiser):
    """A small smooth network, with answers near the noise of small images around zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.2 * torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        return torch.tanh(nn.functional.conv2d(u, self.weight.to(u.dtype), padding=1) + levels.at(t)[1] * u)


class Victim(nn.Module):
    """A smooth classifier of three classes with a last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.inner, self.last = nn.Linear(32, 6), nn.Linear(6, 3)
        for layer in (self.inner, self.last):
            layer.weight = nn.Parameter(torch.randn(layer.weight.shape, generator=generator))
            layer.bias = nn.Parameter(torch.zeros_like(layer.bias))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.to(x.dtype).last(torch.tanh(self.inner(x.flatten(1))))
        return out


def wrap(defense: DiffusionFilter | LikelihoodMaximisation) -> Defended:
    return Defended(defense, Victim().requires_grad_(False).eval())


def images(n: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    draws = torch.rand(n, 2, 4, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (0.3 + 0.4 * draws).to(dtype)


def run(model: nn.Module, x: Tensor, ids: Tensor | None = None) -> Tensor:
    ids = torch.arange(len(x)) if ids is None else ids
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        out: Tensor = model(x)
    return out


def gradient(model: Defended, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = run(model, x)
    (grad,) = torch.autograd.grad((out * torch.tensor([1.0, -2.0, 0.5]).to(out)).sum(), x)
    return grad


@pytest.mark.parametrize("mode", MODES)
def test_scale_zero_is_the_plain_filter_to_the_bit(mode: str) -> None:
    x = images(7)
    plain = wrap(DiffusionFilter(Curved(), steps=4, rounds=2, votes=2))
    guided = wrap(DistributionTransfer(Curved(), mode=mode, scale=0.0, steps=4, rounds=2, votes=2))
    assert torch.equal(run(plain, x), run(guided, x))
    assert torch.equal(gradient(plain, x), gradient(guided, x))
    assert guided.defense.spec.nfe == plain.defense.spec.nfe
    pulled = wrap(DistributionTransfer(Curved(), mode="conf", scale=1.0, steps=4, rounds=2, votes=2))
    assert not torch.allclose(run(plain, x), run(pulled, x), atol=1e-3)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_a_sample_alone_is_purified_as_in_a_batch(name: str) -> None:
    """Pitfall 1: a guidance that averages over the batch is another defence at every batch size."""
    model, x = MAKERS[name](), images(64)
    whole = run(model.defense, x)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for rows in (*torch.arange(64)[:4].split(1), *order.split(7)[:2], order):
        assert torch.allclose(run(model.defense, x[rows], rows), whole[rows], atol=1e-5)


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_gradient_is_plain_autograds_and_recomputed_states_are_the_kept_ones(name: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        plain, replayed = MAKERS[name](), MAKERS[name]()
        plain.defense.gradient, replayed.defense.gradient = Plain(), Replay(check=True)
        a, b = (gradient(each, images(dtype=dtype)) for each in (plain, replayed))
        assert (a - b).abs().max() <= tolerance * a.abs().max()
        assert a.abs().max() > 1e-4


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_guidance_goes_with_every_sampler(sampler: str) -> None:
    grads = []
    for way in (Plain(), Replay(check=True)):
        steps = 1 if sampler == "tweedie" else 3
        model = wrap(DistributionTransfer(Curved(), mode="conf", sampler=sampler, steps=steps))
        model.defense.gradient = way
        grads.append(gradient(model, images(dtype=torch.float64)))
    assert (grads[0] - grads[1]).abs().max() <= 1e-10 * grads[0].abs().max()


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_the_derivative_is_that_of_the_whole_defence(name: str) -> None:
    """Pitfall 4: with the guidance detached, autograd differs from what a finite difference of the defence says."""
    model, x = MAKERS[name](), images(dtype=torch.float64)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights, h = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), 1e-6
    up, down = ((run(model, x + sign * h * direction) * weights).sum(1) for sign in (1, -1))
    slope = (gradient(model, x) * direction).flatten(1).sum(1)
    assert torch.allclose(slope, (up - down) / (2 * h), rtol=1e-4, atol=1e-5)


def test_the_path_through_the_copies_is_part_of_the_gradient() -> None:
    class Cut(DistributionTransfer):
        def guide(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(each.detach() for each in super().guide(x))

    x = images(dtype=torch.float64)
    whole, cut = (gradient(wrap(kind(Curved(), steps=3, copies=2)), x) for kind in (DistributionTransfer, Cut))
    assert (whole - cut).abs().max() > 1e-3 * whole.abs().max()


@pytest.mark.parametrize("kind", [DiffusionFilter, DistributionTransfer])
def test_networks_with_attention_have_exact_gradients_too(kind: type[DiffusionFilter]) -> None:
    class Attentive(Curved):
        def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
            rows = u.flatten(2).transpose(1, 2).unsqueeze(1)
            seen = nn.functional.scaled_dot_product_attention(rows, rows, 2.0 * rows)
            return super().forward(u, t, levels) + 0.1 * seen.squeeze(1).transpose(1, 2).reshape(u.shape)

    grads = []
    for way in (Plain(), Replay(check=True)):
        model = wrap(kind(Attentive(), steps=2))
        model.defense.gradient = way
        grads.append(gradient(model, images(2)))
    assert (grads[0] - grads[1]).abs().max() <= 1e-5 * grads[0].abs().max()


def test_repulsion_acts_on_suspects_only() -> None:
    class Sure(Victim):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.tensor([100.0, 0.0, 0.0])

    x = images(5)
    plain = Defended(DiffusionFilter(Curved(), steps=4), Sure())
    guided = Defended(DistributionTransfer(Curved(), mode="repel", scale=1.0, steps=4, copies=2), Sure())
    assert torch.equal(run(plain.defense, x), run(guided.defense, x))


@pytest.mark.parametrize("through", [True, False])
def test_guidance_climbs_its_objective(through: bool) -> None:
    x = images(16)
    confidence = []
    for scale in (0.0, 0.5, 2.0):
        model = wrap(DistributionTransfer(Curved(), mode="conf", scale=scale, steps=5, through=through))
        confidence.append(run(model, x).softmax(1).amax(1).mean())
    assert confidence[0] < confidence[1] < confidence[2]


def test_gdmp_keeps_nearer_to_its_input_the_stronger_its_guide() -> None:
    x = images(16)
    away = [
        (run(GDMP(Curved(), guide_scale=scale, steps=36, rounds=2), x) - x).square().mean() for scale in (0.0, 6e4, 3e5)
    ]
    assert away[0] > away[1] > away[2]


def test_the_noise_of_a_guided_chain_is_gaussian() -> None:
    """Pitfall 2: uniform noise in the guided path has another mean, spread and tails."""
    x = torch.zeros(200, 1, 10, 10)
    ids = torch.arange(200)
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        chains = [GDMP(Curved()).draw(x, 1, 30), DistributionTransfer(Curved()).draw(x, 1, 30).unsqueeze(0)]
        assert GDMP(Curved()).draw(x, 0, CLEAN).shape == (1, *x.shape)
    for noise in torch.cat(chains):
        assert abs(float(noise.mean())) < 0.03
        assert abs(float(noise.var()) - 1.0) < 0.04
        assert abs(float(noise.pow(4).mean()) - 3.0) < 0.3
    assert abs(float((chains[0][0] * chains[0][1]).mean())) < 0.03


def test_likelihood_maximisation_lowers_the_error_inside_its_radius() -> None:
    x = images(16)
    defense = LikelihoodMaximisation(Curved(), radius=0.02)
    moved = run(defense, x)
    assert (moved - x).abs().max() <= 0.02 + 1e-6
    (t, _), *_ = defense.moves()
    scale, sigma = defense.levels.at(t)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def error(images: Tensor) -> Tensor:
        u = 2 * images - 1
        noisy = scale * u + sigma * noise
        return ((noisy - sigma * defense.denoiser(noisy, t, defense.levels)) / scale - u).square().mean()

    assert error(moved) < error(x)


def test_the_last_features_are_what_the_last_linear_layer_sees() -> None:
    victim, x = Victim(), images()
    assert torch.equal(victim.last(last_features(victim, x)), victim(x))
    assert torch.equal(last_features(nn.Flatten(), x), x.flatten(1))


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (lambda: DistributionTransfer(Curved(), mode="consensu"), "consensus"),
        (lambda: DistributionTransfer(Curved(), scale=-1.0), "scale"),
        (lambda: DistributionTransfer(Curved(), copies=0), "copies"),
        (lambda: DistributionTransfer(Curved(), mode="conf")(images()), "Defended"),
        (lambda: GDMP(Curved(), guide_scale=-1.0), "guide_scale"),
        (lambda: GDMP(Curved(), radius=0.0), "radius"),
        (lambda: LikelihoodMaximisation(Curved(), steps=0), "steps"),
        (lambda: LikelihoodMaximisation(Curved(), least=0.7), "least"),
    ],
)
def test_impossible_options_are_refused(build: Callable[[], object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        build()


@pytest.mark.parametrize("name", ["bit_depth", "jpeg_codec"])
def test_what_guides_is_the_same_whoever_looks(name: str) -> None:
    behind = build_defense(name).wrap(Victim().requires_grad_(False).eval())
    shield = DistributionTransfer(Curved(), mode="conf", scale=2.0, steps=3).wrap(behind)
    x = images().requires_grad_()
    plain = run(shield, x)
    with BPDA(every=False).around(shield):
        seen = run(shield, x)
        (grad,) = torch.autograd.grad(seen[:, 0].sum(), x)
    assert torch.allclose(seen, plain, atol=1e-5)
    assert bool((grad != 0).flatten(1).any(1).all())


def test_votes_behind_have_nothing_to_say_to_the_guide() -> None:
    committee = Committee([Victim().eval(), Victim().eval()], fusion="majority").requires_grad_(False)
    guided = DistributionTransfer(Curved(), mode="conf", scale=2.0, steps=3).wrap(committee)
    assert torch.equal(run(guided, images()), run(DiffusionFilter(Curved(), steps=3).wrap(committee), images()))
