"""Every loss term of the generative attacks against a formula worked by hand in float64; AdvGAN as a special case."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from maodun.attacks.generative import losses as terms
from maodun.attacks.generative.collapse import collapse, mean_cosine
from maodun.attacks.generative.contest import Batch
from maodun.attacks.generative.multi_proxy import MultiProxyGame, MultiProxyOptions
from maodun.attacks.generative.proxies import Proxies
from maodun.core.errors import InputError

F64 = torch.float64


def t(*values):
    return torch.tensor(values, dtype=F64)


class TestTerms:
    def test_margins_are_logit_differences_with_a_floor(self):
        logits = [t([3.0, 1.0, 2.0], [0.0, 5.0, 1.0]), t([1.0, 4.0, 0.0], [2.0, 2.5, 2.0])]
        y = torch.tensor([0, 1])
        # Row by row: 3 - 2, 5 - 1; 1 - 4 cut at -2, 2.5 - 2.
        torch.testing.assert_close(terms.proxy_margins(logits, y, 2.0), t([1.0, 4.0], [-2.0, 0.5]))

    def test_a_sure_proxy_still_gives_a_gradient(self):
        # On probabilities this gradient is below 1e-15; on logits it is one.
        logits = t([40.0, 0.0]).requires_grad_(True)
        terms.proxy_margins([logits], torch.tensor([0]), 0.0).sum().backward()
        torch.testing.assert_close(logits.grad, t([1.0, -1.0]))

    def test_weights_grow_with_the_margin_and_carry_no_gradient(self):
        margins = t(1.0, 3.0).requires_grad_(True)
        soft = terms.hardness(margins, "softmax", 2.0)
        total = math.exp(0.5) + math.exp(1.5)
        torch.testing.assert_close(soft, t(math.exp(0.5) / total, math.exp(1.5) / total))
        assert not soft.requires_grad
        torch.testing.assert_close(terms.hardness(margins, "uniform", 2.0), t(0.5, 0.5))
        assert not terms.hardness(margins, "uniform", 2.0).requires_grad

    def test_adaea_weighs_the_proxy_whose_step_serves_the_others(self):
        ratios = t([1.0, 0.5, 0.1], [0.2, 1.0, 0.4], [0.0, 0.0, 1.0])
        wanted = torch.softmax(10 * t(0.3, 0.3, 0.0), 0)
        torch.testing.assert_close(terms.agreement(ratios, 10.0), wanted)

    def test_least_squares_game(self):
        real, first, second = t(1.0, 0.5), t(0.2, -0.4), t(1.0, 0.0)
        # (0 + 0.25) / 2, and the mean of (0.04 + 0.16) / 2 and (1 + 0) / 2.
        torch.testing.assert_close(terms.critic_loss("lsgan", real, [first, second]), t(0.125 + (0.1 + 0.5) / 2)[0])
        torch.testing.assert_close(terms.critic_loss("lsgan", real, [first]), t(0.225)[0])
        # (0.64 + 1.96) / 2 and (0 + 1) / 2.
        torch.testing.assert_close(terms.realism_loss("lsgan", [first, second]), t((1.3 + 0.5) / 2)[0])

    def test_hinge_game(self):
        real, fake = t(2.0, 0.5), t(-3.0, 0.4)
        torch.testing.assert_close(terms.critic_loss("hinge", real, [fake]), t(0.25 + 0.7)[0])
        torch.testing.assert_close(terms.realism_loss("hinge", [fake]), t(1.3)[0])

    def test_latent_data_terms(self):
        code, noise = t([[1.0, 2.0]]), t([[0.5, -0.5]])
        # ((1.1 - 1.5)^2 + (2.0 - 1.5)^2) / 2.
        torch.testing.assert_close(terms.cycle_term(t([[1.1, 2.0]]), code + noise), t(0.205)[0])
        # ((1.6 - 1 - 0.5)^2 + (1.0 - 2 + 0.5)^2) / 2.
        torch.testing.assert_close(terms.shift_term(t([[1.6, 1.0]]), code, noise), t(0.13)[0])
        # (0.02 + 0.04) / 2 / 0.1.
        torch.testing.assert_close(terms.consistency_term(t([[0.5, 0.5]]), t([[0.52, 0.46]]), 0.1), t(0.3)[0])

    def test_the_latents_aimed_at_get_no_gradient(self):
        code = t([[1.0, 2.0]]).requires_grad_(True)
        moving = t([[0.0, 0.0]]).requires_grad_(True)
        (terms.cycle_term(moving, code) + terms.shift_term(moving, code, torch.zeros_like(code))).backward()
        assert code.grad is None
        torch.testing.assert_close(moving.grad, t([[-2.0, -4.0]]))

    def test_mode_seeking_is_silent_when_images_differ_enough(self):
        near, far = t([[0.0, 0.0]], [[0.0, 0.0]]), t([[0.1, 0.3]], [[0.0, 0.0]])
        z1, z2 = t([[0.0]], [[0.0]]), t([[4.0]], [[2.0]])
        # Row one: 0.2 / 4 = 0.05 of 0.08; row two: 0 of 0.08.
        torch.testing.assert_close(terms.diversity_term(near, far, z1, z2, 0.08), t((0.03 + 0.08) / 2)[0])
        assert terms.diversity_term(near[:1], far[:1], z1[:1], z2[:1], 0.04) == 0

    def test_length_beyond_the_slack(self):
        delta = t([[3.0, 4.0]], [[0.0, 0.0]]).requires_grad_(True)
        loss = terms.norm_term(delta, 2.0)
        torch.testing.assert_close(loss, t(1.5)[0])
        terms.norm_term(delta, 0.0).backward()
        torch.testing.assert_close(delta.grad, t([[0.3, 0.4]], [[0.0, 0.0]]))


class TestCollapse:
    def test_mean_cosine_equals_the_table_of_all_pairs(self):
        delta = torch.randn(7, 2, 3, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
        units = delta.flatten(1) / delta.flatten(1).norm(dim=1, keepdim=True)
        table = units @ units.T
        torch.testing.assert_close(mean_cosine(delta), (table.sum() - 7) / 42)

    @pytest.mark.parametrize(("rows", "wanted"), [([[1, 0], [2, 0]], 1.0), ([[1, 0], [-1, 0]], -1.0), ([[1, 0]], 0.0)])
    def test_ends_of_the_scale(self, rows, wanted):
        assert float(mean_cosine(torch.tensor(rows, dtype=F64))) == pytest.approx(wanted)

    def test_rows_of_zeros_count_as_orthogonal(self):
        assert float(mean_cosine(torch.zeros(3, 4))) == 0.0

    def test_entropy_and_classes(self):
        found = collapse(torch.randn(4, 2), torch.tensor([0, 0, 5, 7]))
        assert (found.classes, found.n) == (3, 4)
        assert found.entropy == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
        assert collapse(torch.randn(4, 2), torch.tensor([3, 3, 3, 3])).entropy == 0.0


def victim(seed, classes=4):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, classes, bias=False))
    nn.init.normal_(model[1].weight, std=0.3, generator=generator)
    return model.double().eval()


def batch(seed=0, n=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 3, 8, 8, generator=generator, dtype=F64)
    # The first victim's own labels, so that its margins are not all at their floor.
    y = victim(0)(x).argmax(1)
    return Batch(x, y, torch.Generator().manual_seed(seed + 1))


def game(options, seeds=(0,), eps=0.1):
    proxies = Proxies([victim(seed) for seed in seeds], batch().x)
    made = MultiProxyGame(proxies, (3, 8, 8), eps, options, width=2, blocks=2, seed=3)
    made.generator.double()
    made.critic.double()
    return made


class TestGame:
    def test_one_proxy_without_latent_branch_is_advgan(self):
        """The published objective, written out here anew: losses and every gradient are the same numbers."""
        contest, b = game(MultiProxyOptions.advgan()), batch()
        parts = contest.losses(b, contest.play(b))
        parts["loss"].backward()
        ours = {name: value.grad.clone() for name, value in contest.generator.named_parameters()}
        contest.generator.zero_grad()

        z, d = contest.proxies.models[0], contest.critic["images"]
        delta = 0.1 * contest.generator(b.x)
        x_adv = (b.x + delta).clamp(0, 1)
        out = z(x_adv)
        right = out[torch.arange(5), b.y]
        others = out.masked_fill(nn.functional.one_hot(b.y, 4).bool(), -math.inf).max(1).values
        adversarial = torch.clamp(right - others, min=0).mean()
        length = delta.reshape(5, -1).pow(2).sum(1).sqrt().mean()
        loss = ((d(x_adv) - 1) ** 2).mean() + 10 * adversarial + 1 * length
        loss.backward()
        assert adversarial > 0.01
        torch.testing.assert_close(parts["loss"], loss, rtol=1e-12, atol=1e-12)
        for name, value in contest.generator.named_parameters():
            torch.testing.assert_close(ours[name], value.grad, rtol=1e-9, atol=1e-12)

        critic = ((d(b.x) - 1) ** 2).mean() + (d(x_adv.detach()) ** 2).mean()
        torch.testing.assert_close(contest.critic_loss(b, contest.play(b)), critic)

    def test_multi_proxy_reduces_to_advgan(self):
        plain = {"latent": False, "noise": 0.0, "latent_data": 0.0, "norm": 1.0}
        b, results = batch(), []
        for options in (MultiProxyOptions.advgan(), MultiProxyOptions(weighting="softmax", **plain)):
            contest = game(options)
            loss = contest.losses(b, contest.play(b))["loss"]
            loss.backward()
            results.append((loss, [each.grad for each in contest.generator.parameters()]))
        assert torch.equal(results[0][0], results[1][0])
        assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))

    def test_all_terms_with_two_proxies(self):
        options = MultiProxyOptions(
            temperature=2.0, kappa=1.0, noise=0.7, latent_data=0.5, cycle=2.0, consistency=3.0, diversity=0.2,
            least=9.0, norm=0.1, slack=0.2, realism=0.3, adversarial=4.0,
        )  # fmt: skip
        contest, b = game(options, (0, 1)), batch()
        made = contest.play(b)
        parts = contest.losses(b, made)
        g, size, eps = contest.generator, (8, 8), 0.1
        draws = torch.Generator().manual_seed(1)
        code = g.encode(b.x)
        zeta, other = (0.7 * torch.randn(code.shape, generator=draws).double() for _ in range(2))
        x_d = (b.x + eps * g.decode(code, size)).clamp(0, 1)
        x_l = (b.x + eps * g.decode(code + zeta, size)).clamp(0, 1)
        x_o = (b.x + eps * g.decode(code + other, size)).clamp(0, 1)
        margins = []
        for z in contest.proxies.models:
            values = []
            for image in (x_d, x_l):
                out = z(image)
                rest = out.masked_fill(nn.functional.one_hot(b.y, 4).bool(), -math.inf).max(1).values
                values.append(torch.clamp(out[torch.arange(5), b.y] - rest, min=-1.0).mean())
            margins.append(sum(values) / 2)
        w = torch.softmax(torch.stack(margins) / 2.0, 0)
        d = contest.critic["images"]
        realism = (((d(x_d) - 1) ** 2).mean() + ((d(x_l) - 1) ** 2).mean()) / 2
        cycle = ((g.encode(x_d) - (code + zeta)) ** 2).mean()
        shift = ((g.encode(x_l) - code - zeta) ** 2).mean()
        consistency = (x_d - x_l).abs().mean() / eps
        ratio = (x_l - x_o).abs().flatten(1).mean(1) / (zeta - other).abs().flatten(1).mean(1)
        diversity = torch.clamp(9.0 - ratio, min=0).mean()
        length = torch.clamp((eps * g.decode(code, size)).flatten(1).norm(dim=1) - 0.2, min=0).mean()
        loss = 4 * (w * torch.stack(margins)).sum() + 0.3 * realism + 0.1 * length
        loss = loss + 0.5 * (2 * cycle + shift + 3 * consistency) + 0.2 * diversity
        torch.testing.assert_close(parts["loss"], loss)
        for name, wanted in {
            "cycle": cycle,
            "shift": shift,
            "consistency": consistency,
            "diversity": diversity,
        }.items():
            torch.testing.assert_close(parts[name], wanted)

    @pytest.mark.parametrize("change", [{"agents": 1.0}, {"weighting": "adaea"}, {"game": "hinge", "agents": 0.5}])
    def test_heads_weightings_and_games_give_finite_gradients(self, change):
        contest, b = game(MultiProxyOptions(**change), (0, 1)), batch()
        made = contest.play(b)
        contest.critic_loss(b, made).backward()
        assert all(each.grad is None for each in contest.generator.parameters())
        assert all(each.grad is not None for each in contest.critic.parameters())
        contest.losses(b, made)["loss"].backward()
        assert all(torch.isfinite(each.grad).all() for each in contest.generator.parameters())

    def test_terms_can_be_switched_off_one_by_one(self):
        full, b = game(MultiProxyOptions()), batch()
        whole = full.losses(b, full.play(b))
        for name in ("cycle", "shift", "consistency"):
            without, b = game(MultiProxyOptions(**{name: 0.0})), batch()
            parts = without.losses(b, without.play(b))
            torch.testing.assert_close(whole["loss"] - parts["loss"], whole[name])

    @pytest.mark.parametrize(
        "option", [{"kappa": -1.0}, {"temperature": 0.0}, {"noise": 0.0}, {"adversarial": math.nan}]
    )
    def test_options_that_cannot_be_meant(self, option):
        with pytest.raises(InputError, match=next(iter(option)) if "noise" not in option else "latent"):
            MultiProxyOptions(**option)


class TestProxies:
    def test_mode_and_flags_come_back(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Dropout())
        model.train()
        proxies = Proxies([model], torch.rand(2, 3, 8, 8))
        with proxies.ready():
            assert not any(each.training for each in model.modules())
            assert not model[1].weight.requires_grad
        assert model.training
        assert model[1].weight.requires_grad

    def test_features_are_what_the_last_linear_layer_reads(self):
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
        x = torch.rand(3, 3, 8, 8)
        logits, features = Proxies([model], x).logits_and_features(x)
        torch.testing.assert_close(model[3](features[0]), logits[0])
        assert not model[3]._forward_pre_hooks

    def test_labels_are_the_mean_opinion(self):
        x = torch.rand(9, 3, 8, 8, dtype=F64)
        models = [victim(0), victim(1)]
        mean = sum(model(x).softmax(1) for model in models)
        assert torch.equal(Proxies(models, x).labels(x, batch_size=4), mean.argmax(1))

    def test_what_cannot_be_a_proxy(self):
        x = torch.rand(2, 3, 8, 8, dtype=F64)
        with pytest.raises(InputError, match="at least one"):
            Proxies([], x)
        with pytest.raises(InputError, match="4, 5 classes"):
            Proxies([victim(0), victim(1, classes=5)], x)
        with pytest.raises(InputError, match="cannot take inputs of shape"):
            Proxies([victim(0)], torch.rand(2, 3, 9, 9, dtype=F64))
        headless = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).double()
        with pytest.raises(InputError, match="no linear layer"):
            game_of = MultiProxyGame(Proxies([headless], x), (3, 8, 8), 0.1, MultiProxyOptions(agents=1.0))
            del game_of
