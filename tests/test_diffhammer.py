"""Attacks made for purifiers: selection among draws in closed form, deviation by finite differences, then attacks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.registry import build_attack
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.geometry import unit_l2
from maodun.core.losses import get_loss
from maodun.core.oracle import EOT, Oracle
from maodun.core.selective import Deviating, Selective
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import Rule, judge
from maodun.defenses.purification import Denoiser, DiffusionFilter, Levels


def chooser(norm: str = "linf", rounds: int = 5, sharpness: float = 5.0) -> Selective:
    return Selective(torch.sign if norm == "linf" else unit_l2, 0.3, draws=6, rounds=rounds, sharpness=sharpness)


def draws(rows: int = 40, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 6, 1, 3, 3, generator=generator)


class TestSelection:
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_no_round_lowers_the_objective(self, norm: str) -> None:
        losses, grads = draws()
        values = [
            chooser(norm, rounds).objective(losses, grads, chooser(norm, rounds).select(losses, grads))
            for rounds in range(6)
        ]
        for before, after in itertools.pairwise(values):
            assert bool((after >= before - 1e-4).all())
        assert bool((values[5] > values[0] + 1e-3).any())

    def test_agreeing_draws_give_their_gradient(self) -> None:
        losses, grads = draws()
        same = grads[:, :1].expand_as(grads)
        assert torch.allclose(chooser().select(losses, same), grads[:, 0], atol=1e-5)

    def test_a_hopeless_draw_is_let_go_and_the_mean_is_not(self) -> None:
        up = torch.ones(1, 1, 1, 1, 4)
        losses = torch.tensor([[-0.5, -0.5, -20.0]])
        grads = torch.cat([up, up, -6 * up], dim=1)
        chosen = Selective(torch.sign, 0.3, draws=3).select(losses, grads)
        assert torch.equal(chosen.sign(), up[:, 0])
        assert torch.equal(grads.mean(1).sign(), -up[:, 0])

    def test_rows_do_not_meet(self) -> None:
        losses, grads = draws()
        whole = chooser().select(losses, grads)
        alone = torch.cat([chooser().select(losses[i : i + 1], grads[i : i + 1]) for i in range(40)])
        assert torch.allclose(whole, alone, atol=1e-6)


class Divided(nn.Module):
    """Seven draws in ten point one way along x_0, three the other way, three times as steeply, and cannot be won."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        stubborn = context.noise(x, "divided").uniform((1,))[:, 0] < 0.3
        score = torch.where(stubborn, -20 - 6 * (x[:, 0] - 0.5), 2 * (x[:, 0] - 0.5) - 0.3)
        return torch.stack([torch.zeros_like(score), score], dim=1)


class TestAttack:
    def test_wins_the_majority_where_the_mean_gradient_leads_away(self) -> None:
        x, y, threat = torch.full((64, 2), 0.5), torch.zeros(64, dtype=torch.int64), Threat("linf", 0.3)
        rule = Rule("majority", 20)
        hammer = build_attack("diffhammer", steps=10).run(Oracle(Divided()), x, y, threat)
        mean = build_attack("pgd", steps=10, loss="margin", random_start=False).run(
            Oracle(Divided(), gradient=EOT(draws=40)), x, y, threat
        )
        assert judge(Divided(), hammer.x_adv, x, y, threat, rule=rule).robust.value < 0.15
        assert judge(Divided(), mean.x_adv, x, y, threat, rule=rule).robust.value > 0.9

    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_neither_batch_nor_order_matters(self, norm: str) -> None:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.rand(9, 2, generator=generator), torch.zeros(9, dtype=torch.int64)
        ids, threat = torch.arange(9) * 7, Threat(norm, 0.1)
        attack = build_attack("diffhammer", steps=4, draws=5)
        found = [
            attack.run(Oracle(Divided(), batch_size=size), x, y, threat, ids=ids, stop_early=False)
            for size in (1, 7, 64)
        ]
        for other in found[1:]:
            assert torch.allclose(found[0].x_adv, other.x_adv, atol=1e-5)
        order = torch.tensor([8, 0, 7, 1, 6, 2, 5, 3, 4])
        shuffled = attack.run(Oracle(Divided()), x[order], y, threat, ids=ids[order], stop_early=False)
        assert torch.allclose(found[0].x_adv[order], shuffled.x_adv, atol=1e-5)

    def test_stays_inside_and_counts(self) -> None:
        x, y, threat = torch.full((8, 2), 0.5), torch.zeros(8, dtype=torch.int64), Threat("linf", 0.05)
        found = build_attack("diffhammer", steps=3, draws=4).run(Oracle(Divided()), x, y, threat, stop_early=False)
        assert bool(threat.contains(found.x_adv, x).all())
        assert found.backwards.tolist() == [12] * 8

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"draws": 1}, "draws 1"),
            ({"rounds": 0}, "rounds 0"),
            ({"loss": "ce"}, "loss 'ce'"),
            ({"sharpness": 0.0}, "sharpness 0.0"),
            ({"steps": 0}, "steps 0"),
        ],
    )
    def test_bad_input(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(InputError, match=words):
            build_attack("diffhammer", **options)


class Gaussian(Denoiser):
    """The exact denoiser of pixels that are independent normals."""

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        scale, sigma = levels.at(t)
        return sigma * (u - scale * 0.1) / ((scale * 0.5) ** 2 + sigma**2)


def shield(**options: object) -> nn.Module:
    head = nn.Linear(9, 3)
    with torch.no_grad():
        head.weight.copy_(torch.linspace(-1, 1, 27).view(3, 9).sin())
        head.bias.zero_()
    filter_ = DiffusionFilter(Gaussian(), **{"t_star": 0.2, "steps": 3, **options})
    return filter_.wrap(nn.Sequential(nn.Flatten(), head)).eval()


class TestDeviation:
    def test_one_step_in_closed_form_and_the_same_images(self) -> None:
        x, ids = torch.rand(5, 1, 3, 3, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4, torch.arange(5)
        filter_ = DiffusionFilter(Gaussian(), t_star=0.2, steps=1, sampler="tweedie")
        with context.draw(Stream(0, "a"), ids, ids):
            plain = filter_(x)
            with filter_.observed() as deviations:
                seen = filter_(x)
        assert torch.equal(plain, seen)
        expected = (2 * plain - 1 - (2 * x - 1)).square().flatten(1).mean(1)
        assert torch.allclose(deviations[0], expected, atol=1e-6)
        assert len(deviations) == 1

    def test_gradient_is_that_of_loss_and_deviation(self) -> None:
        x, ids = torch.rand(2, 1, 3, 3, generator=torch.Generator().manual_seed(1)).double(), torch.arange(2)
        model, weight = shield().double(), 3.0
        (purifier,) = [module for module in model.modules() if isinstance(module, DiffusionFilter)]

        def total(at: Tensor) -> Tensor:
            with context.draw(Stream(0, "search"), ids, torch.zeros_like(ids)), purifier.observed() as strayed:
                logits = model(at)
                return logits[:, 0] + weight * strayed[0]

        x.requires_grad_(True)
        (exact,) = torch.autograd.grad(total(x).sum(), x)
        step = torch.zeros_like(x)
        step[:, 0, 1, 2] = 1e-6
        with torch.no_grad():
            difference = (total(x + step) - total(x - step)) / 2e-6
        assert torch.allclose(exact[:, 0, 1, 2], difference, rtol=1e-5)
        (plain,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
        assert not torch.allclose(exact, plain, rtol=1e-2)

    def test_without_weight_it_is_eot(self) -> None:
        model, x = shield(), torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(2))
        rows, y = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        loss = get_loss("margin")
        found = []
        for estimator in (EOT(draws=6), Deviating(0.0, 6), Deviating(5.0, 6)):
            session = Oracle(model).session(x, rows, 0)
            found.append(session.estimate(x, rows, lambda z, at: loss(z, y[at], None).unsqueeze(1), estimator)[2][0])
        assert torch.allclose(found[0], found[1], atol=1e-5)
        assert not torch.allclose(found[0], found[2], atol=1e-3)

    def test_attacks_a_filter_and_leaves_it_as_it_was(self) -> None:
        model, x = shield(votes=2), torch.rand(6, 1, 3, 3, generator=torch.Generator().manual_seed(3))
        y, threat = torch.zeros(6, dtype=torch.int64), Threat("linf", 0.4)
        ways = [module.gradient for module in model.modules() if isinstance(module, DiffusionFilter)]
        found = build_attack("diffattack", steps=5, draws=3).run(Oracle(model), x, y, threat)
        assert bool(threat.contains(found.x_adv, x).all())
        assert [m.gradient for m in model.modules() if isinstance(m, DiffusionFilter)] == ways
        before = judge(model, x, x, y, threat).robust.value
        assert judge(model, found.x_adv, x, y, threat).robust.value <= before

    @pytest.mark.parametrize(("options", "words"), [({"draws": 0}, "draws 0"), ({"weight": -1.0}, "weight -1.0")])
    def test_bad_input(self, options: dict[str, object], words: str) -> None:
        with pytest.raises(InputError, match=words):
            build_attack("diffattack", **options)
