"""The verdict: rules by hand, intervals against a second library, and a noisy model that gets its accuracy back."""

from __future__ import annotations

import pytest
import torch
from statsmodels.stats.proportion import proportion_confint
from torch import Tensor, nn

from maodun.attacks.gradient.pgd import PGD
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.oracle import EOT, Exact, Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import RULES, Rule, interval, judge

IDS = torch.arange(400)


class Noisy(nn.Module):
    """Two classes by the sign of x0 - 0.5, seen through keyed Gaussian noise."""

    stochastic = True

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def forward(self, x: Tensor) -> Tensor:
        z = x[:, 0] - 0.5 + self.sigma * context.noise(x, "noise").normal(())
        return torch.stack([-z, z], 1)


def _data() -> tuple[Tensor, Tensor]:
    x = Stream(0, "x").uniform(IDS, (4,))
    return x, (x[:, 0] > 0.5).long()


@pytest.mark.parametrize("successes", [0, 1, 37, 99, 100])
@pytest.mark.parametrize(("ours", "theirs"), [("exact", "beta"), ("wilson", "wilson")])
def test_intervals_agree_with_statsmodels(successes, ours, theirs):
    low, high = proportion_confint(successes, 100, 0.05, method=theirs)
    got = interval(successes, 100, method=ours)
    assert got.low == pytest.approx(low, abs=1e-9) and got.high == pytest.approx(high, abs=1e-9)


def test_rules_by_hand():
    flags = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    probs = torch.tensor([[0.6, 0.4], [0.4, 0.6], [0.3, 0.7], [0.9, 0.1]])
    y = torch.zeros(4, dtype=torch.int64)
    assert Rule("majority", 4).wrong(flags, probs, y, None).tolist() == [False, True, True, False]
    assert Rule("worst", 4).wrong(flags, probs, y, None).tolist() == [True, True, True, False]
    assert Rule("mean", 4).wrong(flags, probs, y, None).tolist() == [False, True, True, False]
    assert Rule("single", 9).draws == 1


@pytest.mark.parametrize("rule", RULES)
def test_noisy_model_at_eps_zero_gets_its_clean_accuracy_back(rule):
    x, y = _data()
    model, threat = Noisy(0.2), Threat("linf", 0.0)
    found = PGD(steps=10).run(Oracle(model, gradient=EOT(Exact(), 5)), x, y, threat, seed=1)
    how = Rule(rule, 15)
    attacked = judge(model, found.x_adv, x, y, threat, rule=how, seed=1)
    clean = judge(model, x, x, y, threat, rule=how, seed=1, purpose="clean")
    assert attacked.robust.low <= clean.robust.value <= attacked.robust.high
    assert clean.robust.value < 1.0


def test_verdict_draws_are_not_those_of_the_search():
    x, y = _data()
    a = judge(Noisy(0.3), x, x, y, Threat("linf", 0.1), rule=Rule("single"), purpose="verdict")
    b = judge(Noisy(0.3), x, x, y, Threat("linf", 0.1), rule=Rule("single"), purpose="search")
    again = judge(Noisy(0.3), x, x, y, Threat("linf", 0.1), rule=Rule("single"), purpose="verdict")
    assert torch.equal(a.flags, again.flags) and not torch.equal(a.flags, b.flags)


def test_draws_do_not_depend_on_batches_or_order():
    x, y = _data()
    whole = judge(Noisy(0.3), x, x, y, Threat("linf", 0.1), rule=Rule("majority", 5), ids=IDS)
    order = torch.arange(399, -1, -1)
    part = judge(
        Noisy(0.3),
        x[order],
        x[order],
        y[order],
        Threat("linf", 0.1),
        rule=Rule("majority", 5),
        ids=IDS[order],
        batch_size=7,
    )
    assert torch.equal(part.flags, whole.flags[order])


def test_what_leaves_the_ball_is_no_success():
    model = nn.Linear(4, 2)
    x, _ = _data()
    with torch.no_grad():
        y = model(x).argmax(1)
    far = 1.0 - x
    verdict = judge(model, far, x, y, Threat("linf", 0.01))
    assert not verdict.success[~verdict.valid].any() and (~verdict.valid).float().mean() > 0.9
    assert verdict.flags.shape[1] == 1


def test_clean_mistakes_count_for_the_adversary():
    model = nn.Linear(4, 2)
    x, _ = _data()
    with torch.no_grad():
        y = 1 - model(x).argmax(1)
    assert judge(model, x, x, y, Threat("l2", 0.0)).robust.value == 0.0


def test_targeted_success_is_the_target():
    model = nn.Linear(4, 3)
    x, _ = _data()
    with torch.no_grad():
        predicted = model(x).argmax(1)
    verdict = judge(model, x, x, predicted, Threat("l2", 0.1, targeted=True), targets=(predicted + 1) % 3)
    assert verdict.robust.value == 1.0


def test_nonsense_rules_are_refused():
    with pytest.raises(InputError, match="did you mean 'majority'"):
        Rule("majorty")
    with pytest.raises(InputError, match="at least one draw"):
        Rule("mean", 0)
