"""Selection among draws: the objective never falls, closed forms of agreeing and hopeless draws, then the attack."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.registry import build_attack
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.geometry import unit_l2
from maodun.core.oracle import EOT, Oracle
from maodun.core.selective import Selective
from maodun.core.threat import Threat
from maodun.core.verdict import Rule, judge


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
