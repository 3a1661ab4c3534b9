"""The benchmark harness: its arithmetic, its referee and its counters. No peer is needed."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flags, rounds, table
from benchmarks.cases import CASES, QUICK, shortened
from benchmarks.meter import Bare, Calls, Counting, bare_cost
from benchmarks.scoring import distances, score


def linear() -> nn.Sequential:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]]))
        net[1].bias.zero_()
    return net.eval()


# -- arithmetic -------------------------------------------------------------------------------------------------------


def test_rotation_gives_everyone_every_place():
    names = ["a", "b", "c"]
    laps = [rounds.rotation(names, i) for i in range(6)]
    for name in names:
        assert sorted(order.index(name) for order in laps) == [0, 0, 1, 1, 2, 2]
    assert laps[3] != laps[0]
    assert rounds.rotation([], 3) == []


def test_paired_ratio_cancels_a_machine_that_slows_down():
    drift = [1.0, 2.0, 4.0, 8.0, 16.0]
    assert rounds.paired_ratio([0.5 * d for d in drift], drift) == 0.5
    with pytest.raises(ValueError, match="same rounds"):
        rounds.paired_ratio([1.0], [1.0, 2.0])


def test_fastest_peer_is_neither_ours_nor_one_that_does_less_work():
    times = {"maodun": [0.1], "cheat": [0.2], "honest": [0.5], "slow": [0.9]}
    assert rounds.fastest_peer(times, {"cheat": False}) == "honest"
    assert rounds.fastest_peer({"maodun": [1.0]}, {}) is None


def test_ratios_and_overhead():
    times = {"maodun": [2.0, 4.0, 2.0], "peer": [4.0, 8.0, 4.0]}
    bare = {"maodun": [1.0, 2.0, 1.0], "peer": [4.0, 8.0, 4.0]}
    ours, peer = rounds.ratios(times, bare, {})
    assert (ours.to_fastest_peer, ours.overhead, peer.to_fastest_peer, peer.overhead) == (0.5, 2.0, 1.0, 1.0)
    alone = rounds.ratios({"maodun": [1.0]}, {"maodun": [1.0]}, {})[0]
    assert math.isnan(alone.to_fastest_peer)


def test_bare_price_counts_the_forward_inside_a_gradient_once():
    bare = Bare(forward=1.0, gradient=3.0)
    assert bare.price(10, 0) == 10.0
    assert bare.price(10, 10) == 30.0


def test_flags_survive_packing():
    for n in (0, 1, 3, 4, 5, 97):
        row = [bool((i * 7) % 3) for i in range(n)]
        assert flags.unpack(flags.pack(row), n) == row
    assert flags.discordant([True, True, False], [False, True, True]) == (1, 1)
    assert flags.sign_test(0, 0) == 1.0
    assert flags.sign_test(0, 5) == pytest.approx(2 / 2**5)
    assert flags.sign_test(3, 3) == 1.0


def test_quick_cases_shorten_ours_and_the_peers_alike():
    for case in CASES:
        short = shortened(case)
        for options in (short.options, *(given for _, given in short.ours.values())):
            assert all(options[k] <= QUICK[k] for k in QUICK if k in options)
        if case.function == "standard":
            assert short.options["steps"] == QUICK["steps"]


# -- the referee ------------------------------------------------------------------------------------------------------


def test_score_judges_by_the_ball_the_box_and_the_model():
    net, y = linear(), torch.zeros(5, dtype=torch.long)
    x = torch.tensor([0.6, 0.5, 0.0, 0.0]).repeat(5, 1)
    adv = x.clone()
    adv[0] = torch.tensor([0.5, 0.6, 0, 0])  # a success at linf 0.1
    adv[1] = torch.tensor([0.3, 0.8, 0, 0])  # wrong class, but outside the ball
    adv[2] = torch.tensor([0.6, 0.5, 0, -0.05])  # in the ball, outside the box
    adv[3, 0] = float("nan")
    found = score(net, adv, x, y, "linf", 0.1)
    assert found.robust.tolist() == [False, True, True, True, True]
    assert found.outside_ball == 1
    assert found.outside_box == 1
    assert found.not_finite == 1
    assert found.distance[0].item() == pytest.approx(0.1, abs=1e-6)
    assert found.distance[1].item() == pytest.approx(0.3, abs=1e-6)
    assert torch.isinf(found.distance[2:]).all()
    assert found.success_rate == pytest.approx(0.4)


def test_score_counts_a_clean_mistake_as_distance_zero_and_not_robust():
    net, y = linear(), torch.tensor([1])
    x = torch.tensor([[0.6, 0.5, 0.0, 0.0]])
    found = score(net, x, x, y, "l2", 0.1)
    assert found.robust.tolist() == [False]
    assert found.distance.tolist() == [0.0]


def test_distances():
    x, adv = torch.zeros(1, 1, 2, 2), torch.tensor([[[[0.3, -0.4], [0.0, 0.0]]]])
    for norm, expected in (("linf", 0.4), ("l2", 0.5), ("l1", 0.7)):
        assert distances(adv, x, norm).item() == pytest.approx(expected, abs=1e-6)


# -- the counters -----------------------------------------------------------------------------------------------------


def test_counting_sees_forwards_backwards_and_weight_gradients():
    net = linear()
    wrapper, x = Counting(net), torch.rand(6, 4)
    assert not wrapper.training
    with torch.no_grad():
        wrapper(x)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(wrapper(leaf)[:, 0].sum(), leaf)
    assert torch.equal(gradient, net[1].weight[0].detach().expand(6, 4))
    calls = wrapper.calls
    assert (calls.forward_samples, calls.backward_samples, calls.weight_gradients) == (12, 6, 0)
    wrapper(x[:2].clone().requires_grad_(True)).sum().backward()
    assert (calls.backward_samples, calls.weight_gradients) == (8, 2)
    wrapper.close()
    net(x).sum().backward()
    assert calls.weight_gradients == 2


def test_counting_counts_every_pass_over_a_retained_graph():
    wrapper = Counting(linear())
    leaf = torch.rand(5, 4).requires_grad_(True)
    logits = wrapper(leaf)
    for k in range(3):
        torch.autograd.grad(logits[:, k].sum(), leaf, retain_graph=True)
    assert wrapper.calls.backward_calls == 3
    assert wrapper.calls.backward_samples == 15


def test_bare_cost_restores_the_parameters_flags():
    net = linear()
    net[1].bias.requires_grad_(False)
    cost = bare_cost(net, torch.rand(4, 4), seconds=0.0)
    assert [p.requires_grad for p in net.parameters()] == [True, False]
    assert cost.forward > 0


# -- the table --------------------------------------------------------------------------------------------------------


def test_table_puts_ours_first_and_explains_the_star():
    case = next(c for c in CASES if c.name == "cw-l2")
    batch = SimpleNamespace(y=torch.zeros(4), subject=SimpleNamespace(name="toy", eps={"l2": 0.5}))
    x, net = torch.rand(4, 4), linear()
    verdict = score(net, x, x, net(x).argmax(1), "l2", 0.5)

    def trial(seconds: float) -> SimpleNamespace:
        return SimpleNamespace(calls=Calls(40, 20, 10, 5, 0), score=verdict, seconds=[seconds], price=[1.0])

    trials = {"torchattacks": trial(0.5), "advlib": trial(2.0), "maodun": trial(1.0)}
    outcome = SimpleNamespace(case=case, batch=batch, trials=trials, absent={"foolbox": "no wheel"})
    found = table.rows(outcome)
    assert [r["who"] for r in found] == ["maodun", "torchattacks", "advlib"]
    assert found[0]["to_fastest_peer"] == 0.5
    assert found[0]["forward_per_sample"] == 10.0
    text = table.markdown(found)
    assert "torchattacks *" in text
    assert "no binary search" in text
    assert table.absences([outcome]) == ["cw-l2 on toy: foolbox did not run: no wheel"]
