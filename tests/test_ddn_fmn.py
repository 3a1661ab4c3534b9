"""DDN and FMN: radii that only ever cut, losses that never vanish, and the sparse norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.oracles import Noisy, generator, linear, nearest, samples
from torch import Tensor, nn

from maodun.attacks.minimum.cw import CW
from maodun.attacks.minimum.ddn import DDN, log_odds
from maodun.attacks.minimum.fab import FAB
from maodun.attacks.minimum.fmn import FMN
from maodun.core.oracle import EOT, Oracle
from maodun.core.threat import Threat
from maodun.core.verdict import Rule, judge


def _run(attack, model, x, y, norm, **options):
    return attack.run(Oracle(model), x, y, Threat(norm), check_model=False, **options)


@pytest.mark.parametrize("targeted", [False, True])
def test_log_odds_point_where_cross_entropy_does(targeted):
    logits = torch.randn(20, 6, generator=generator(0), dtype=torch.float64).requires_grad_()
    y, t = torch.arange(20) % 6, (torch.arange(20) + 1) % 6
    entropy = F.cross_entropy(logits, t if targeted else y, reduction="sum") * (-1 if targeted else 1)
    (a,) = torch.autograd.grad(entropy, logits)
    (b,) = torch.autograd.grad(log_odds(logits, y, t if targeted else None).sum(), logits)
    assert torch.allclose(F.cosine_similarity(a, b), torch.ones(20, dtype=torch.float64))


def test_confident_models_do_not_blind_ddn():
    model = linear(classes=2, scale=1e4)
    x, y = samples(model, 8)
    found = _run(DDN(steps=200), model, x, y, "l2")
    assert found.found.all()
    assert torch.allclose(found.distance, nearest(model, x, "l2"), rtol=1e-2)


@pytest.mark.parametrize(("attack", "norm"), [(FMN(steps=300), "l1"), (FMN(steps=60), "l0")])
def test_sparse_norms(attack, norm):
    model = linear(classes=2)
    x, y = samples(model, 10)
    found = _run(attack, model, x, y, norm)
    assert found.found.all()
    if norm == "l1":
        assert torch.allclose(found.distance, nearest(model, x, "l1"), rtol=1e-2)
    else:
        # Each entry can give at most weight * room; the least count takes the largest gains first.
        difference = (model.weight[1 - y] - model.weight[y]).detach()
        flat = x.flatten(1)
        gains = (difference.abs() * torch.where(difference > 0, 1 - flat, flat)).sort(dim=1, descending=True).values
        with torch.no_grad():
            logits = model(x)
        gap = logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None])
        least = (gains.cumsum(1) < gap).sum(1) + 1
        assert (found.distance >= least).all()
        assert (found.distance <= least + 1).all()


@pytest.mark.parametrize(("attack", "norm"), [(FMN(steps=25), "l2"), (FMN(steps=25), "linf"), (DDN(steps=25), "l2")])
def test_no_iterate_is_pushed_out_of_the_box(attack, norm):
    inner = linear(classes=3)
    x, y = samples(inner, 6)
    seen: list[int] = []

    class Watch(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            assert float(z.detach().min()) >= 0.0 and float(z.detach().max()) <= 1.0
            seen.append(len(z))
            return inner(z)

    _run(attack, Watch(), x, y, norm)
    assert len(seen) >= 27


def test_fmn_does_not_inflate_points_already_inside_its_ball():
    # From the clean input the radius is the distance to the boundary: the first move may not be longer than that
    # although the step of length one is.
    model = linear(classes=2)
    x, y = samples(model, 12)
    found = _run(FMN(steps=1), model, x, y, "l2")
    exact = nearest(model, x, "l2")
    assert (found.distance <= exact * 1.001).all()


@pytest.mark.parametrize("attack", [FMN(steps=40), DDN(steps=40), FAB(steps=40), CW(steps=60, searches=4)])
def test_luck_with_a_noisy_model_neither_counts_nor_leads_the_radius_astray(attack):
    model = Noisy(linear(classes=2), 0.05)
    x, y = samples(model.model, 16)
    found = attack.run(Oracle(model, gradient=EOT(draws=4)), x, y, Threat("l2"), check_model=False)
    verdict = judge(model, found.x_adv, x, y, Threat("l2"), rule=Rule("majority", 51), seed=9)
    assert found.found.float().mean() > 0.9
    assert verdict.success.float().mean() > 0.85
