"""The ladder: its statistics in closed form, which spear stands on which rung, and what the report says of it."""

from __future__ import annotations

import csv
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maodun.arena.ladder import RESUBMISSIONS, rules, rung, share, survival, weak_rungs
from maodun.arena.metrics import rate
from maodun.arena.plan import build
from maodun.arena.recipe import make_recipe
from maodun.arena.run import run
from maodun.arena.summary import Ladder, LadderRow, RunSummary
from maodun.attacks.registry import build_attack
from maodun.core import context
from maodun.core.known import KnownDraw
from maodun.core.oracle import EOT, Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import fresh_logits
from maodun.report.exports import to_csv
from maodun.report.html import report_html
from maodun.zoo.data.base import make_dataset


class TestStatistics:
    def test_a_whole_total_has_the_exact_interval(self) -> None:
        for k in (0, 3, 20):
            found, exact = share(float(k), 20), rate(k, 20)
            assert (found.value, found.low, found.high) == pytest.approx((exact.value, exact.low, exact.high))

    def test_a_broken_total_lies_between_its_neighbours(self) -> None:
        low, middle, high = share(3.0, 20), share(3.4, 20), share(4.0, 20)
        assert low.low < middle.low < high.low
        assert low.high < middle.high < high.high
        assert middle.value == pytest.approx(0.17)

    def test_survival_counts_subsets(self) -> None:
        fooled = np.array([0, 1, 4, 10])
        for tries in (1, 2, 5, 10):
            expected = [comb(10 - int(k), tries) / comb(10, tries) for k in fooled]
            assert survival(fooled, 10, tries) == pytest.approx(expected)

    def test_survival_is_unbiased(self) -> None:
        fooled = np.random.default_rng(0).binomial(20, 0.3, size=20_000)
        assert survival(fooled, 20, 5).mean() == pytest.approx(0.7**5, abs=0.005)

    def test_rules_are_ordered_and_agree_at_the_ends(self) -> None:
        fooled = np.array([0, 2, 5, 9, 10, 0, 4])
        found = rules(fooled, 10, np.array([False, False, True, True, True, False, False]))
        curve = dict(found["resubmission"])
        assert curve[1] == pytest.approx(found["single"].value)
        assert curve[10] == pytest.approx(found["worst"].value) == 2 / 7
        assert list(curve) == [each for each in RESUBMISSIONS if each <= 10]
        assert list(curve.values()) == sorted(curve.values(), reverse=True)
        assert found["majority"].value == 4 / 7
        assert found["mean"].value == 4 / 7


@pytest.mark.parametrize(
    ("spear", "norm", "expected"),
    [
        ({"attack": "pgd", "surrogate": "zoo:digits-cnn"}, "linf", 0),
        ({"attack": "pgd", "gradient": "bpda", "eot": 8}, "linf", 1),
        ({"attack": "pgd", "gradient": "bpda", "gradient_options": {"every": False}}, "linf", 4),
        ({"attack": "apgd", "eot": 20}, "linf", 4),
        ({"attack": "square"}, "linf", 6),
        ({"attack": "pgd", "gradient": "nes"}, "linf", 6),
        ({"attack": "stadv"}, "flow", 6),
        ({"attack": "lowfreq", "eot": 20}, "linf", 6),
        ({"attack": "pgd", "seed_known": True}, "linf", 7),
    ],
)
def test_the_rung_follows_from_the_spear(spear: dict[str, Any], norm: str, expected: int) -> None:
    threat = {"norm": norm, "eps": 0.1}
    recipe = make_recipe(
        {"data": {"spec": "digits"}, "threats": [threat], "shields": [{"model": "zoo:digits-cnn"}], "spears": [spear]}
    )
    assert rung(recipe.spears[0], build(recipe.spears[0]), norm) == expected


def row(number: int, standing: int, eot: int = 20, n: int = 100) -> LadderRow:
    fooled = np.array([0] * standing + [10] * (n - standing))
    return LadderRow(
        rung=number, title="t", spear=f"spear {number}", cell=f"c{number}", draws=10, eot=eot, known=None, forwards=1.0,
        backwards=1.0, nfe=0.0, seconds=0.1, memory=None, **rules(fooled, 10, fooled > 0),
    )  # fmt: skip


def said(*rows: LadderRow) -> list[str]:
    ladder = Ladder(shield="s", norm="linf", eps=0.1, targeted=False, rows=[row(-1, 100), *rows])
    return [finding.sentence for finding in weak_rungs([ladder])]


class TestWarnings:
    def test_only_weak_rungs(self) -> None:
        assert ["upper bound" in each for each in said(row(0, 80), row(1, 60))] == [True]
        assert ["upper bound" in each for each in said(row(6, 60), row(7, 10))] == [True]

    def test_few_draws(self) -> None:
        assert ["too few" in each for each in said(row(1, 60), row(4, 40, eot=1))] == [True]

    def test_a_lower_rung_that_is_stronger(self) -> None:
        assert ["less than the exact" in each for each in said(row(1, 20), row(4, 60))] == [True]
        # A query attack may be the stronger one too; a difference inside the intervals is none.
        assert ["less than the exact" in each for each in said(row(6, 20), row(4, 60))] == [True]
        assert said(row(1, 58), row(4, 60)) == []

    def test_a_sound_ladder_and_nothing_left(self) -> None:
        assert said(row(0, 90), row(1, 70), row(4, 40)) == []
        assert said(row(1, 0)) == []


class Noisy(nn.Module):
    """Two classes parted at 0 along the first value, which keyed noise of standard deviation 0.05 moves."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        score = 10 * (x[:, 0] - 0.5 + 0.05 * context.noise(x, "noisy").normal((1,))[:, 0])
        return torch.stack([-score, score], dim=1)


class TestKnownDraw:
    def test_is_the_verdicts_first_draw(self) -> None:
        model, x, ids = Noisy(), torch.rand(9, 2), torch.tensor([4, 1, 7, 30, 2, 9, 5, 8, 0])
        verdict = fresh_logits(Oracle(model), x, seed=3, ids=ids, draws=4)
        known = KnownDraw(model, 3)
        for number in (0, 5):
            with context.draw(Stream(99, "search"), ids, torch.full_like(ids, number)):
                assert torch.equal(known(x), verdict[:, 0])
        order = torch.tensor([8, 3, 0, 1, 2, 7, 6, 5, 4])
        with context.draw(Stream(0, "search"), ids[order], ids):
            assert torch.equal(known(x[order]), verdict[:, 0][order])


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunSummary, Path]:
    """A ladder in closed form: the noise moves the plane by 0.05, the adversary the sample by 0.1."""
    place = tmp_path_factory.mktemp("ladder")
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(120, 2, generator=generator)
    y = (x[:, 0] > 0.5).long()
    data = make_dataset("given", "given", x.numpy(), y.numpy(), None)
    recipe = make_recipe(
        {
            "name": "ladder",
            "data": {"spec": "given"},
            "threats": [{"norm": "linf", "eps": 0.1}],
            "shields": [{"name": "noisy", "model": "given:"}],
            "spears": [
                {"attack": "fgsm", "name": "static", "surrogate": "given:plain"},
                {"attack": "pgd", "name": "exact", "eot": 20, "options": {"steps": 5}},
                {"attack": "pgd", "name": "seed", "seed_known": True, "options": {"steps": 20}},
            ],
            "verdict": {"draws": 50},
            "diagnostics": False,
        }
    )
    models: dict[str, nn.Module] = {"noisy": Noisy()}
    plain = nn.Linear(2, 2)
    with torch.no_grad():
        plain.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
        plain.bias.copy_(torch.tensor([0.5, -0.5]))
    stand_ins: dict[str, nn.Module] = {"given:plain": plain}
    return run(recipe, place, progress="quiet", models=models, surrogates=stand_ins, data=data), place


class TestRun:
    def test_rungs_rules_and_costs(self, summary: tuple[RunSummary, Path]) -> None:
        (ladder,) = summary[0].ladders
        assert [each.rung for each in ladder.rows] == [-1, 0, 4, 7]
        none, static, exact, seed = ladder.rows
        for each in ladder.rows:
            # Majority above single is no law: an attack that brings a draw to just above one half takes both apart.
            assert min(each.majority.value, each.single.value) >= each.worst.value
        assert none.majority.value > none.single.value
        # The margin of a sample is |x - 1/2|: its draw is right with probability Phi(margin / 0.05).
        margin = (torch.rand(120, 2, generator=torch.Generator().manual_seed(0))[:, 0] - 0.5).abs()
        right = torch.distributions.Normal(0.0, 1.0).cdf(margin / 0.05)
        assert none.single.value == pytest.approx(float(right.mean()), abs=0.03)
        moved = torch.distributions.Normal(0.0, 1.0).cdf((margin - 0.1) / 0.05)
        assert exact.single.value == pytest.approx(float(moved.mean()), abs=0.05)
        assert static.single.value == pytest.approx(exact.single.value, abs=0.05)
        assert seed.draws == 49
        assert seed.known is not None
        assert seed.known.value <= exact.single.value + 0.1
        assert exact.forwards > 0
        assert exact.seconds > 0
        assert (exact.memory or 0) > 10

    def test_page_and_table_show_it(self, summary: tuple[RunSummary, Path]) -> None:
        page = report_html(summary[0], summary[1], light=True)
        assert 'id="ladder"' in page
        assert "With free tries" in page
        rows = list(csv.DictReader(to_csv(summary[0]).splitlines()))
        exact = next(each for each in rows if each["spear"] == "exact")
        assert exact["rung"] == "4"
        assert float(exact["worst"]) <= float(exact["single"])
        assert float(exact["seconds_per_image"]) > 0

    def test_json_keeps_it(self, summary: tuple[RunSummary, Path]) -> None:
        assert RunSummary.model_validate_json(summary[0].model_dump_json()) == summary[0]


class TestWhereASearchEnds:
    def test_a_stochastic_model_that_stands_is_handed_the_end_of_the_search(self) -> None:
        x, y, threat = torch.full((6, 2), 0.8), torch.ones(6, dtype=torch.int64), Threat("linf", 0.1)
        found = build_attack("pgd", steps=4, random_start=False).run(
            Oracle(Noisy(), gradient=EOT(draws=5)), x, y, threat
        )
        # The plane is four standard deviations away: no draw is fooled, and the input still moved towards it.
        assert not bool(found.found.any())
        assert torch.allclose(found.x_adv[:, 0], torch.full((6,), 0.7), atol=1e-6)
        assert torch.allclose(found.distance, torch.full((6,), 0.1), atol=1e-6)

    def test_a_deterministic_one_keeps_the_clean_input(self) -> None:
        x, y, threat = torch.full((6, 2), 0.8), torch.ones(6, dtype=torch.int64), Threat("linf", 0.1)
        plain = nn.Linear(2, 2)
        with torch.no_grad():
            plain.weight.copy_(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
            plain.bias.copy_(torch.tensor([0.5, -0.5]))
        found = build_attack("pgd", steps=4).run(Oracle(plain, stochastic=False), x, y, threat)
        assert torch.equal(found.x_adv, x)
