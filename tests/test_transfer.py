"""Transfer attacks: every hook against its closed form, every reduction to a simpler attack, and ensembles."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles import Counting, Flat, linear, samples
from torch import Tensor, nn

from maodun.attacks.gradient.apgd import APGD, APGDT
from maodun.attacks.gradient.pgd import BIM, MIFGSM, NIFGSM, PGD
from maodun.attacks.query.square import Square
from maodun.attacks.registry import build_attack
from maodun.attacks.transfer.inputs import perturb_spectrum, resize_and_pad
from maodun.attacks.transfer.loop import Transfer
from maodun.attacks.transfer.rules import RULES
from maodun.attacks.transfer.smoothing import gaussian_kernel, smooth
from maodun.core.engine import Candidates
from maodun.core.ensemble import Ensemble
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.geometry import cosine_basis
from maodun.core.oracle import Budget, Oracle
from maodun.core.status import Status
from maodun.core.streams import Stream
from maodun.core.threat import Threat

THREAT = Threat("linf", 16 / 255)
IDS = torch.arange(12)
X = Stream(0, "x").uniform(IDS, (3, 8, 8))


def net(seed: int = 0, classes: int = 5) -> nn.Module:
    """A small smooth convolutional net: gradients differ from place to place."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 6, 3, padding=1), nn.Tanh(), nn.Flatten(),
        nn.Linear(384, classes),
    ).eval()  # fmt: skip


NET, OTHER = net(0), net(1)
Y = NET(X).argmax(1)


def run(attack, model: nn.Module = NET, x: Tensor = X, y: Tensor = Y, threat: Threat = THREAT, **more) -> Candidates:
    oracle = Oracle(model, surrogate=True, stochastic=False, batch_size=more.pop("batch_size", None))
    return attack.run(oracle, x, y, threat, seed=3, **more)


def same(one: Candidates, two: Candidates) -> bool:
    return torch.equal(one.x_adv, two.x_adv)


class TestReductions:
    @pytest.mark.parametrize(
        ("hooks", "options", "plain"),
        [
            ("", {}, BIM()),
            ("mi", {}, MIFGSM()),
            ("ni", {}, NIFGSM()),
            ("mi-ni", {}, NIFGSM()),
            ("mi", {"decay": 0.0}, MIFGSM(decay=0.0)),
            ("vmi", {"neighbours": 0}, MIFGSM()),
            ("vmi", {"beta": 0.0}, MIFGSM()),
            ("di-mi", {"probability": 0.0}, MIFGSM()),
            ("si-mi", {"scales": 1}, MIFGSM()),
            ("ti-mi", {"kernel": 1}, MIFGSM()),
        ],
    )
    def test_without_its_effect_a_hook_is_the_plain_attack(self, hooks, options, plain):
        assert same(run(Transfer(hooks=hooks, **options)), run(plain))

    def test_ssm_without_noise_and_mask_is_the_plain_attack(self):
        still = run(Transfer(hooks="ssm-mi", rho=0.0, sigma=0.0, spectra=2))
        # The transform there and back rounds: equal where no sign hangs on it.
        assert (still.x_adv - run(MIFGSM()).x_adv).abs().gt(1e-5).float().mean() < 0.01

    @pytest.mark.parametrize("hooks", ["di", "si", "ssm", "vmi", "ti", "ni"])
    def test_with_its_effect_every_hook_changes_the_result(self, hooks):
        few = Transfer(hooks=f"{hooks}-mi", spectra=2, neighbours=2)
        assert not same(run(few), run(MIFGSM()))

    @pytest.mark.parametrize("rule", RULES)
    def test_every_rule_is_the_plain_attack_for_one_member(self, rule):
        assert same(run(Transfer(hooks="mi", ensemble=rule), Ensemble([NET])), run(MIFGSM()))
        assert same(run(Transfer(hooks="mi", ensemble=rule), NET), run(MIFGSM()))

    @pytest.mark.parametrize("fusion", ["logits", "probabilities"])
    @pytest.mark.parametrize("rule", ["fused", "losses", "adaea"])
    def test_twins_are_one_model(self, rule, fusion):
        twins = run(Transfer(hooks="mi", ensemble=rule), Ensemble([NET, NET], fusion=fusion))
        assert (twins.x_adv - run(MIFGSM()).x_adv).abs().gt(1e-5).float().mean() < 0.01

    def test_svre_of_twins_needs_no_variance_reduction(self):
        # With equal members the correction cancels: one inner step is one step of MI.
        twins = run(Transfer(hooks="mi", ensemble="svre", inner=1), Ensemble([NET, NET]))
        assert (twins.x_adv - run(MIFGSM()).x_adv).abs().gt(1e-5).float().mean() < 0.01


class TestClosedForms:
    def test_ti_is_a_convolution_of_the_gradient(self):
        x = X.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(NET(x), Y, reduction="sum"), x)
        kernel = gaussian_kernel(5)
        padded = F.pad(gradient, (2, 2, 2, 2))
        expected = sum(
            kernel[i, j] * padded[:, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)
        )  # fmt: skip
        assert torch.allclose(smooth(gradient, 5), expected, atol=1e-6)
        one = run(Transfer(hooks="ti", kernel=5, steps=1)).x_adv
        sure = expected.abs() > 1e-4
        moved = (X + THREAT.eps * expected.sign()).clamp(0, 1)
        assert torch.allclose(one[sure], moved[sure], atol=1e-6)

    @pytest.mark.parametrize("size", [1, 3, 7, 15])
    def test_the_kernel_is_a_normalised_gaussian_cut_at_three_sigma(self, size):
        kernel = gaussian_kernel(size)
        assert kernel.sum() == pytest.approx(1.0, abs=1e-6)
        assert torch.equal(kernel, kernel.flip(0)) and torch.equal(kernel, kernel.T)
        if size > 1:
            assert float(kernel[size // 2, 0] / kernel.max()) == pytest.approx(math.exp(-4.5), rel=1e-4)

    def test_si_on_a_linear_model_is_the_mean_of_the_scales(self):
        seen: list[Tensor] = []

        class Spy(Transfer):
            def direction(self, problem, state, gradient):
                seen.append(gradient)
                return super().direction(problem, state, gradient)

        model = linear(3, 192)
        x, y = samples(model, 6, (3, 8, 8))
        run(Spy(hooks="", loss="margin", steps=1), model, x, y)
        run(Spy(hooks="si", loss="margin", steps=1, scales=5), model, x, y)
        # The margin's gradient does not depend on the scale unless another class comes second.
        share = (seen[1] / seen[0]).flatten(1)
        steady = share.std(1) < 1e-4
        assert steady.any()
        assert torch.allclose(share[steady].mean(1), torch.tensor((1 + 1 / 2 + 1 / 4 + 1 / 8 + 1 / 16) / 5), atol=1e-5)

    def test_vmi_of_a_linear_loss_has_no_variance(self):
        model = linear(2, 192)
        x, y = samples(model, 6, (3, 8, 8))
        kinds = [Transfer(hooks="vmi", loss="margin", neighbours=3), MIFGSM(loss="margin")]
        one, two = (run(kind, model, x, y) for kind in kinds)
        assert same(one, two)

    def test_vmi_adds_the_variance_of_the_step_before(self):
        # By hand: two steps with two neighbours.
        noise = Stream(3, "transfer/vmi")

        def slope(x: Tensor) -> Tensor:
            x = x.clone().requires_grad_(True)
            return torch.autograd.grad(F.cross_entropy(NET(x), Y, reduction="sum"), x)[0]

        eps, first = THREAT.eps, slope(X)
        near = [(X + 1.5 * eps * (2 * noise.uniform(IDS, (3, 8, 8), k) - 1)).clamp(0, 1) for k in range(2)]
        variance = sum(slope(one) for one in near) / 2 - first
        velocity = first / first.abs().mean((1, 2, 3), keepdim=True)
        x = (X + eps / 2 * velocity.sign()).clamp(0, 1)
        second = slope(x) + variance
        velocity = second / second.abs().mean((1, 2, 3), keepdim=True) + velocity
        expected = THREAT.project(x + eps / 2 * velocity.sign(), X)
        found = run(Transfer(hooks="vmi", neighbours=2, steps=2)).x_adv
        assert (found - expected).abs().gt(1e-5).float().mean() < 0.005

    def test_the_cosine_basis_is_orthonormal_and_flat_first(self):
        basis = cosine_basis(8)
        assert torch.allclose(basis @ basis.T, torch.eye(8), atol=1e-6)
        assert torch.allclose(basis[0], torch.full((8,), 8**-0.5))

    def test_a_changed_spectrum_keeps_its_mean_and_a_known_spread(self):
        copies = torch.stack([perturb_spectrum(X, Stream(0, "s"), IDS, k, 0.5, 0.0) for k in range(400)])
        assert torch.allclose(copies.mean(0), X, atol=0.12)
        # Each coefficient's factor has variance rho^2 / 3, so the change's energy is a twelfth of the picture's.
        energy = (copies - X).square().sum((2, 3, 4)).mean(0) / X.square().sum((1, 2, 3))
        assert torch.allclose(energy, torch.full((12,), 0.25 / 3), rtol=0.15)

    def test_resizing_shrinks_to_whole_pixels_inside_the_frame(self):
        white = torch.ones(200, 1, 20, 20)
        ids = torch.arange(200)
        moved = resize_and_pad(white, Stream(0, "d"), ids, 0, 1.5, 1.0)
        # Content between 20 and 29 of 30 pixels, scaled back: the share of white is the square of that.
        share = moved.mean((1, 2, 3)).sqrt() * 30
        assert share.min() > 19.5 and share.max() < 29.6
        assert set(share.round().int().tolist()) == set(range(20, 30))
        sides = torch.stack([moved[:, 0, 0].mean(1), moved[:, 0, -1].mean(1)])
        assert sides.std() > 0.1

    def test_probability_is_the_share_of_changed_pictures(self):
        ids = torch.arange(400)
        x = Stream(0, "y").uniform(ids, (1, 8, 8))
        changed = (resize_and_pad(x, Stream(0, "d"), ids, 0, 1.2, 0.3) != x).flatten(1).any(1)
        assert 0.22 < changed.float().mean() < 0.38


class TestEnsemble:
    def test_fusions(self):
        ones, twos = NET(X), OTHER(X)
        assert torch.allclose(Ensemble([NET, OTHER])(X), (ones + twos) / 2)
        mean = (ones.softmax(1) + twos.softmax(1)) / 2
        assert torch.allclose(Ensemble([NET, OTHER], fusion="probabilities")(X).softmax(1), mean, atol=1e-6)

    def test_losses_are_averaged_over_the_members(self):
        x = X.clone().requires_grad_(True)
        loss = (F.cross_entropy(NET(x), Y, reduction="sum") + F.cross_entropy(OTHER(x), Y, reduction="sum")) / 2
        (gradient,) = torch.autograd.grad(loss, x)
        found = run(Transfer(hooks="", ensemble="losses", steps=1), Ensemble([NET, OTHER])).x_adv
        sure = gradient.abs() > 1e-6
        assert torch.equal(found[sure], (X + THREAT.eps * gradient.sign()).clamp(0, 1)[sure])

    @pytest.mark.parametrize(
        ("options", "forwards", "backwards"),
        [
            ({}, 2, 2),
            ({"ensemble": "losses"}, 2, 2),
            ({"hooks": "si-mi", "scales": 3}, 6, 6),
            ({"hooks": "vmi", "neighbours": 2}, 6, 6),
            ({"ensemble": "adaea"}, 6, 2),
            ({"ensemble": "cwa"}, 4, 4),
        ],
    )
    def test_every_member_call_is_metered(self, options, forwards, backwards):
        members = [Counting(NET), Counting(OTHER)]
        attack = Transfer(**{"hooks": "mi", "steps": 4, **options})
        found = run(attack, Ensemble(members))
        assert (found.forwards == 4 * forwards + 2).all() and (found.backwards == 4 * backwards).all()
        # One row passes once more, to size the micro-batch.
        assert sum(member.rows for member in members) - 2 == 12 * (4 * forwards + 2)
        assert sum(member.backward_rows for member in members) == 12 * 4 * backwards

    def test_a_budget_counts_members(self):
        oracle = Oracle(Ensemble([NET, OTHER]), surrogate=True, stochastic=False, budget=Budget(backwards=5))
        found = MIFGSM().run(oracle, X, Y, THREAT)
        assert (found.backwards == 4).all()
        assert (found.status != int(Status.exhausted_steps)).all()
        assert torch.equal(found.x_adv, run(MIFGSM(steps=2, step_size=THREAT.eps / 10), Ensemble([NET, OTHER])).x_adv)

    def test_svre_meters_what_it_asks(self):
        found = run(Transfer(hooks="mi", steps=2, ensemble="svre", inner=8), Ensemble([NET, OTHER]))
        assert (found.backwards >= 2 * (2 + 1 + 8)).all() and (found.backwards <= 2 * (2 + 2 + 8)).all()

    def test_what_fools_one_member_alone_is_no_success(self):
        found = Transfer(hooks="mi", ensemble="losses").run(Oracle(Ensemble([NET, OTHER])), X, Y, THREAT)
        hit = found.status == int(Status.found)
        assert (Ensemble([NET, OTHER])(found.x_adv).argmax(1) != Y)[hit].all()

    def test_other_attacks_take_an_ensemble_for_a_model(self):
        found = PGD(steps=5).run(Oracle(Ensemble([NET, OTHER])), X, Y, THREAT, check_model=False)
        assert found.backwards.max() <= 10

    def test_bad_ensembles(self):
        with pytest.raises(InputError, match="has no member"):
            Ensemble([])
        with pytest.raises(InputError, match="holds a str"):
            Ensemble([NET, "zoo:x"])
        with pytest.raises(InputError, match="did you mean 'logits'"):
            Ensemble([NET], fusion="logit")
        with pytest.raises(InputError, match="take models of the same classes"):
            Ensemble([NET, net(2, 4)])(X)


class TestSurrogate:
    def test_the_answer_is_the_last_iterate_of_every_sample(self):
        found = run(BIM())
        state = PGD(steps=10, step_size=THREAT.eps / 10, random_start=False)
        assert same(found, run(state))
        reached = (found.x_adv - X).abs().amax((1, 2, 3))
        assert (reached > 0.5 * THREAT.eps).all()
        assert (found.backwards == 10).all() and (found.forwards == 11).all()
        # An ordinary oracle stops at the first success and excuses what is wrong from the start.
        early = BIM().run(Oracle(NET), X, Y, THREAT, check_model=False)
        assert early.backwards.float().mean() < 10

    def test_wrong_samples_of_the_surrogate_are_searched_too(self):
        wrong = (Y + 1) % 5
        found = run(BIM(), y=wrong)
        assert (found.x_adv != X).flatten(1).any(1).all()
        assert not (found.status == int(Status.skipped_misclassified)).any()

    def test_flat_surrogates_give_the_clean_input_back(self):
        found = run(Transfer(), Flat(5), y=torch.zeros(12, dtype=torch.int64))
        assert torch.equal(found.x_adv, X)
        assert (found.status == int(Status.zero_gradient)).all()

    @pytest.mark.parametrize("attack", [PGD(steps=4), APGD(steps=6), APGDT(steps=4, targets=2), Square(queries=30)])
    def test_attacks_of_all_kinds_hand_over_where_they_stand(self, attack):
        found = run(attack)
        assert (found.x_adv != X).flatten(1).any(1).all()
        assert THREAT.contains(found.x_adv, X).all()

    def test_apgd_hands_over_its_point_of_highest_loss(self):
        found = run(APGD(steps=20))
        climbed, clean = (F.cross_entropy(NET(x), Y, reduction="none") for x in (found.x_adv, X))
        assert (climbed > clean).all()
        assert (climbed >= F.cross_entropy(NET(run(BIM()).x_adv), Y, reduction="none") - 0.1).float().mean() > 0.9

    @pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
    def test_answers_stay_in_the_ball_and_the_box(self, norm):
        threat = Threat(norm, {"linf": 0.1, "l2": 1.0, "l1": 5.0}[norm])
        x = torch.cat([torch.zeros_like(X[:4]), torch.ones_like(X[:4]), X[:4]])
        found = run(Transfer(hooks="di-ti-mi"), x=x, threat=threat)
        assert threat.contains(found.x_adv, x).all()
        assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1

    def test_targeted(self):
        targets = (Y + 1) % 5
        found = run(Transfer(hooks="di-mi", steps=20), threat=replace(THREAT, eps=0.3, targeted=True), targets=targets)
        assert (NET(found.x_adv).argmax(1) == targets).float().mean() > 0.9


@pytest.mark.parametrize("hooks", ["di-ti-mi", "si-ni", "vmi", "ssm-mi"])
@pytest.mark.parametrize("rule", ["fused", "svre", "cwa"])
def test_results_do_not_depend_on_batches_or_order(hooks, rule):
    if hooks == "vmi" and rule != "fused":
        pytest.skip("refused")
    attack = Transfer(hooks=hooks, ensemble=rule, steps=3, scales=2, spectra=2, neighbours=2)
    both = Ensemble([NET, OTHER])
    whole = run(attack, both, ids=IDS)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    mixed = run(attack, both, X[order], Y[order], ids=IDS[order], batch_size=7)
    single = run(attack, both, X[4:5], Y[4:5], ids=IDS[4:5], batch_size=1)
    # A sign of a gradient of nearly zero may turn with the rounding of another batch.
    assert (mixed.x_adv - whole.x_adv[order]).abs().gt(1e-5).float().mean() < 0.01
    assert (single.x_adv - whole.x_adv[4:5]).abs().gt(1e-5).float().mean() < 0.01


class TestWords:
    def test_hooks_joined_by_dashes_name_an_attack(self):
        assert build_attack("di-ti-mi") == Transfer(hooks="di-ti-mi")
        assert build_attack("vmi", neighbours=3) == Transfer(hooks="vmi", neighbours=3)
        assert build_attack("mi", ensemble="svre") == Transfer(hooks="mi", ensemble="svre")

    def test_what_cannot_be_meant(self):
        with pytest.raises(InputError, match="hook 'mo': is not a hook"):
            Transfer(hooks="di-mo")
        with pytest.raises(InputError, match="name one hook twice"):
            Transfer(hooks="mi-mi")
        with pytest.raises(InputError, match="did you mean 'svre'"):
            Transfer(ensemble="svr")
        with pytest.raises(InputError, match="has no middle"):
            Transfer(kernel=4)
        with pytest.raises(InputError, match="must be at least 1"):
            Transfer(scales=0)
        with pytest.raises(InputError, match="vmi could correct"):
            Transfer(hooks="vmi", ensemble="cwa")
        with pytest.raises(UnsupportedError, match="needs images"):
            run(Transfer(hooks="di"), x=X.flatten(1))

    def test_vectors_take_the_hooks_that_need_no_picture(self):
        model = linear()
        x, y = samples(model, 4, (24,))
        assert run(Transfer(hooks="si-vmi-ni", neighbours=2), model, x, y).x_adv.shape == x.shape
