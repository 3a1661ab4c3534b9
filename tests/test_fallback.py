"""An adaptive attack may always send what was made for the bare classifier: its row is never above the static one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import Linear, generator
from torch import Tensor, nn

from maodun import attack, evaluate
from maodun.arena.fallback import FALLBACK, bare, falls_back
from maodun.arena.plan import build
from maodun.arena.recipe import SpearSpec
from maodun.core import context
from maodun.core.status import Status
from maodun.defenses import Defended, Defense, build_defense
from maodun.defenses.preprocessing.base import DefenseSpec

EPS = 0.05


class Astray(Defense):
    """Changes nothing, and offers a stand-in whose derivative points the other way."""

    name = "astray"
    spec = DefenseSpec(differentiable=False)

    def forward(self, x: Tensor) -> Tensor:
        return x.detach()

    def bpda_partner(self, x: Tensor) -> Tensor:
        return 1.0 - x


class Wavering(Astray):
    """The same, and shifts every input of a draw a little."""

    name = "wavering"
    spec = DefenseSpec(differentiable=False, stochastic=True)

    def forward(self, x: Tensor) -> Tensor:
        return (x + 0.001 * context.noise(x, self.name).normal()).detach()


def problem(n: int = 60) -> tuple[Linear, Tensor, Tensor]:
    """Return a linear classifier of two classes, inputs away from the walls, and its own answers."""
    source = generator(3)
    weight = torch.randn(2, 12, generator=source)
    x = 0.2 + 0.6 * torch.rand(n, 12, generator=source)
    net = Linear(weight, -weight @ x.mean(0))
    with torch.no_grad():
        return net, x, net(x).argmax(1)


def within(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return who can be felled: whose margin is less than the steepest move of the ball takes."""
    flat = x.clone().requires_grad_(True)
    logits = net(flat)
    lead = logits.gather(1, y[:, None])[:, 0] - logits.gather(1, 1 - y[:, None])[:, 0]
    (slope,) = torch.autograd.grad(lead.sum(), flat)
    return lead.detach() < EPS * slope.abs().sum(1)


class TestFallsBack:
    def test_a_stand_in_that_leads_astray_does_not_save_the_defence(self) -> None:
        net, x, y = problem()
        shield = Defended(Astray(), net)
        common: dict[str, Any] = {"norm": "linf", "eps": EPS, "steps": 10}
        lost = attack(shield, x, y, "pgd", gradient="bpda", **common)
        found = attack(shield, x, y, "pgd", gradient="auto", **common)
        truth = within(net, x, y)
        assert 5 < int(truth.sum()) < len(y) - 5
        assert int(lost.found.sum()) < int(truth.sum())
        assert torch.equal(found.found, truth)
        assert torch.equal(net(found.x_adv).argmax(1) != y, truth)
        assert bool(((found.x_adv - x).abs().amax(1) <= EPS + 1e-6).all())
        # Who was never felled keeps the clean input, and everybody pays for what was tried.
        assert torch.equal(found.x_adv[~truth], x[~truth])
        assert bool((found.forwards[~truth] > lost.forwards[~truth]).all())

    def test_results_do_not_depend_on_the_batch_or_the_order(self) -> None:
        net, x, y = problem(14)
        common: dict[str, Any] = {"norm": "linf", "eps": EPS, "steps": 2, "gradient": "auto", "eot": 3}
        for defense in (Astray(), Wavering()):
            shield = Defended(defense, net)
            whole = attack(shield, x, y, "pgd", batch_size=64, **common)
            ids = torch.randperm(len(y), generator=generator(1))
            for size in (1, 7):
                mixed = attack(shield, x[ids], y[ids], "pgd", ids=ids, batch_size=size, **common)
                assert torch.equal(mixed.x_adv, whole.x_adv[ids])
                assert torch.equal(mixed.forwards, whole.forwards[ids])

    def test_of_a_stochastic_shield_the_better_of_two_is_sent(self) -> None:
        net, x, y = problem()
        found = attack(Defended(Wavering(), net), x, y, "pgd", norm="linf", eps=EPS, gradient="auto", eot=3, steps=10)
        truth = within(net, x, y)
        missed = truth & (found.status != int(Status.found))
        assert int(missed.sum()) <= 2  # margins within the noise

    @pytest.mark.parametrize("name", ["bit_depth", "jpeg"])
    def test_the_adaptive_row_is_never_above_the_static_one(self, name: str) -> None:
        options = {"bits": 2} if name == "bit_depth" else {"quality": 30}
        steps = {"steps": 5, "random_start": False}
        spears = [
            {"attack": "pgd", "name": "static", "options": steps, "gradient": "exact", "surrogate": "zoo:digits-cnn"},
            {"attack": "pgd", "name": "auto", "options": steps, "gradient": "auto"},
        ]
        summary = evaluate(
            "zoo:digits-cnn", "digits", norm="linf", eps=0.1, attack=spears, defense=name, defense_options=options,
            limit=64, diagnostics=False,
        )  # fmt: skip
        by = {cell.spear: cell.robust.value for cell in summary.cells}
        assert by["auto"] <= by["static"]
        # Together they fell nobody whom auto alone does not.
        assert summary.robust.value == by["auto"]
        assert FALLBACK in next(iter(summary.shields.values()))["gradient"]


def test_who_falls_back() -> None:
    net, _, _ = problem(4)
    shield = Defended(build_defense("bit_depth"), net)
    asked = SpearSpec(attack="pgd", gradient="auto")

    def told(spear: SpearSpec, model: nn.Module) -> bool:
        return falls_back(spear, build(spear), model)

    assert bare(shield) is net
    assert told(asked, shield)
    assert not told(asked, net)
    for change in (
        {"gradient": "bpda"},
        {"attack": "deepfool"},
        {"attack": "autoattack"},
        {"attack": "square"},
        {"surrogate": ("zoo:digits-cnn",)},
        {"seed_known": True},
        {"budget": {"queries": 10}},
    ):
        assert not told(SpearSpec.model_validate({**asked.model_dump(), **change}), shield), change
