"""Classifiers that answer as one, defences behind one another, and the gradient the plan chooses for them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.arena.recipe import make_recipe
from maodun.arena.run import run
from maodun.arena.setup import prepare
from maodun.arena.strategy import DRAWS, derive
from maodun.attacks.gradient.pgd import PGD
from maodun.core import context
from maodun.core.ensemble import price_of
from maodun.core.errors import InputError
from maodun.core.estimators import BPDA, EOT, Estimator, Exact
from maodun.core.oracle import Oracle, is_stochastic
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge
from maodun.defenses import Stack, build_defense
from maodun.defenses.ensembles import Committee
from maodun.defenses.purification import GDMP, Denoiser, DiffusionFilter, DistributionTransfer
from maodun.defenses.training.adp import ADP, entropy, log_diversity
from maodun.defenses.training.input_gradient import InputGradient
from maodun.defenses.training.objective import Batch
from maodun.zoo import load_data, load_model
from maodun.zoo.architectures import build_architecture


class Fixed(nn.Module):
    """Answers the same logits for every input, plus a little of the input."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0.0 * x.flatten(1)[:, :1]


ONE, TWO, THREE = Fixed([3.0, 0.0, 0.0]), Fixed([0.0, 1.0, 0.0]), Fixed([0.0, 1.5, 1.0])
X = torch.rand(5, 2, generator=torch.Generator().manual_seed(0))


def drawn(model: nn.Module, x: Tensor, ids: list[int], number: int = 0) -> Tensor:
    with context.draw(Stream(0, "test"), torch.tensor(ids), torch.full((len(ids),), number)):
        return model(x)


class TestCommittee:
    def test_closed_forms(self) -> None:
        logits = torch.stack([each.logits for each in (ONE, TWO, THREE)])
        mean = Committee([ONE, TWO, THREE])(X)
        assert torch.allclose(mean, logits.mean(0).expand(5, 3))
        shares = Committee([ONE, TWO, THREE], fusion="probabilities")(X)
        assert torch.allclose(shares, logits.softmax(1).mean(0).log().expand(5, 3))
        votes = Committee([ONE, TWO, THREE], fusion="majority")(X)
        # Two votes for class 1, one for class 0: the mean of logits says otherwise.
        assert votes.argmax(1).tolist() == [1] * 5
        assert mean.argmax(1).tolist() == [0] * 5
        assert torch.allclose(votes.softmax(1)[0], torch.tensor([1.0, 2.0, 0.0]) / 3, atol=0.01)

    def test_ties_go_to_the_mean_probability(self) -> None:
        assert Committee([TWO, ONE], fusion="majority")(X).argmax(1).tolist() == [0] * 5

    def test_one_member_is_itself_and_order_does_not_matter(self) -> None:
        assert torch.equal(Committee([ONE])(X), ONE(X))
        for fusion in ("logits", "probabilities", "majority"):
            one, two = (Committee(each, fusion=fusion)(X) for each in ([ONE, TWO, THREE], [THREE, ONE, TWO]))
            assert torch.allclose(one, two, atol=1e-6)

    def test_random_members_belong_to_the_sample_and_the_draw(self) -> None:
        committee = Committee([ONE, TWO, THREE], subset=1)
        assert is_stochastic(committee)
        x = torch.zeros(400, 2)
        together = drawn(committee, x, list(range(400)))
        for logits in (ONE.logits, TWO.logits, THREE.logits):
            assert 90 < int((together == logits).all(1).sum()) < 180
        assert torch.equal(drawn(committee, x[:3], [399, 0, 7]), together[[399, 0, 7]])
        assert not torch.equal(drawn(committee, x, list(range(400)), number=1), together)
        assert not is_stochastic(Committee([ONE, TWO], subset=2))
        pair = drawn(Committee([ONE, TWO, THREE], subset=2, fusion="probabilities"), x, list(range(400)))
        assert len(pair.exp().mul(1e4).round().unique(dim=0)) == 3

    def test_votes_have_no_derivative_and_their_partner_has(self) -> None:
        members = [nn.Linear(4, 3), nn.Linear(4, 3)]
        committee, x = Committee(members, fusion="majority"), torch.rand(6, 4)
        plain = gradient(committee, x, torch.zeros(6, dtype=torch.int64), Exact())
        through = gradient(committee, x, torch.zeros(6, dtype=torch.int64), BPDA(every=False))
        assert float(plain.abs().max()) == 0.0
        assert bool((through != 0).flatten(1).any(1).all())

    def test_sure_members_do_not_hide_the_way_to_the_other_class(self) -> None:
        class Sure(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.stack([60.0 + x.sum(1), -x.sum(1), -9.0 - x[:, 0]], dim=1)

        x = torch.rand(4, 5, requires_grad=True)
        committee = Committee([Sure(), Sure()], fusion="majority")
        with BPDA(every=False).around(committee):
            logits = committee(x)
        (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), x)
        assert bool((slope < 0).all())

    def test_each_member_by_its_own_loss(self) -> None:
        members = [nn.Linear(4, 3), nn.Linear(4, 3)]
        x, y = torch.rand(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
        own = sum(gradient(member, x, y, Exact()) for member in members) / 2
        for fusion in ("logits", "majority"):
            committee = Committee(members, fusion=fusion)
            assert torch.allclose(gradient(committee, x, y, Exact(members=True)), own, atol=1e-7)
            assert torch.allclose(gradient(committee, x, y, EOT(BPDA(members=True), 3)), own, atol=1e-7)
        with pytest.raises(InputError, match="has no members"):
            gradient(members[0], x, y, Exact(members=True))

    def test_members_defended_alike_draw_apart(self) -> None:
        class Same(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(1)

        one, two = (build_defense("random_resize_pad").wrap(Same()) for _ in range(2))
        committee = Committee([one, two])
        with context.draw(Stream(0, "test"), torch.arange(8), torch.zeros(8, dtype=torch.int64)):
            answers = committee.answers(torch.rand(8, 1, 8, 8))
        assert not torch.equal(answers[:, 0], answers[:, 1])

    def test_price_counts_every_member_once(self) -> None:
        committee = Committee([ONE, Committee([TWO, THREE])])
        assert price_of(committee) == 3
        assert price_of(build_defense("bit_depth").wrap(committee)) == 3
        assert price_of(ONE) == 1

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"fusion": "mayority"}, "did you mean 'majority'"), ({"subset": 4}, "cannot be drawn from 3 members")],
    )
    def test_refusals(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Committee([ONE, TWO, THREE], **options)

    def test_members_of_other_classes(self) -> None:
        with pytest.raises(InputError, match="member '2': answers 2 classes where member '1' answers 3"):
            Committee([ONE, Fixed([0.0, 1.0])])(X)


def gradient(model: nn.Module, x: Tensor, y: Tensor, estimator: Estimator) -> Tensor:
    oracle, rows = Oracle(model, gradient=estimator), torch.arange(len(x))
    session = oracle.session(x, rows, 0)
    heads = lambda logits, at: F.cross_entropy(logits, y[at], reduction="none").unsqueeze(1)  # noqa: E731
    return session.estimate(x, rows, heads)[2][0]


@pytest.mark.parametrize("fusion", ["logits", "probabilities", "majority"])
def test_attacking_the_average_fells_at_least_what_attacking_any_member_fells(fusion: str) -> None:
    data = load_data("digits", limit=64)
    members = [load_model(spec).model for spec in ("zoo:digits-cnn", "zoo:digits-cnn-distilled-t1")]
    committee, threat, attack = Committee(members, fusion=fusion), Threat("linf", 0.1), PGD(steps=6)

    def standing(searched: nn.Module, estimator: Estimator) -> int:
        found = attack.run(Oracle(searched, gradient=estimator), data.x, data.y, threat, check_model=False)
        return int((~judge(committee, found.x_adv, data.x, data.y, threat).success).sum())

    alone = min(standing(member, Exact()) for member in members)
    assert standing(committee, BPDA(every=False)) < alone
    assert standing(committee, BPDA(members=True, every=False)) < alone


class TestADP:
    def test_equations(self) -> None:
        draw = torch.Generator().manual_seed(0)
        model = build_architecture("ensemble", {"of": "digits-cnn", "members": 3}, seed=1).double()
        x, y = torch.rand(4, 1, 8, 8, generator=draw).double(), torch.tensor([1, 0, 9, 4])
        value = ADP(alpha=1.3, beta=0.7)(model, Batch(x, y, torch.arange(4), 0))
        total = 0.0
        for row in range(4):
            shares = [member(x[row : row + 1]).softmax(1)[0].detach() for member in model.members]
            mean = sum(shares) / 3
            total += sum(-math.log(share[y[row]].detach()) for share in shares)
            total -= 1.3 * -sum(float(p) * math.log(p) for p in mean)
            rest = [torch.cat([share[: y[row]], share[y[row] + 1 :]]) for share in shares]
            matrix = torch.stack([each / each.norm() for each in rest])
            total -= 0.7 * math.log(torch.linalg.det(matrix @ matrix.T + 1e-6 * torch.eye(3)))
        assert abs(float(value.detach()) - float(total) / 4) < 1e-10

    def test_orthogonal_members_are_as_diverse_as_can_be_and_equal_ones_are_not(self) -> None:
        y = torch.tensor([0])
        apart = torch.tensor([[[0.8, 0.2, 0.0, 0.0], [0.7, 0.0, 0.3, 0.0], [0.9, 0.0, 0.0, 0.1]]]).double()
        assert float(log_diversity(apart, y)) == pytest.approx(0.0, abs=1e-5)
        assert float(log_diversity(apart[:, [0, 0, 0]], y)) < -25
        assert float(entropy(torch.full((1, 2, 4), 0.25).double())) == pytest.approx(math.log(4))

    def test_no_weights_is_the_sum_of_cross_entropies_and_gradients_reach_all_members(self) -> None:
        model = build_architecture("ensemble", {"members": 2}, seed=0)
        batch = Batch(torch.rand(6, 1, 8, 8), torch.arange(6), torch.arange(6), 0)
        plain = sum(F.cross_entropy(member(batch.x), batch.y) for member in model.members)
        assert float(ADP(0.0, 0.0)(model, batch)) == pytest.approx(float(plain), rel=1e-5)
        ADP()(model, batch).backward()
        assert all(bool((parameter.grad != 0).any()) for parameter in model.parameters() if parameter.ndim > 1)

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="must be at least 0"):
            ADP(alpha=-1)
        batch = Batch(torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), torch.arange(2), 0)
        with pytest.raises(InputError, match="has no members"):
            ADP()(build_architecture("digits-cnn"), batch)
        crowd = build_architecture("ensemble", {"members": 3, "num_classes": 3})
        with pytest.raises(InputError, match="at most 2 members"):
            ADP()(crowd, batch)
        with pytest.raises(InputError, match="did you mean 'digits-cnn'"):
            build_architecture("ensemble", {"of": "digit-cnn"})


def test_input_gradient_of_a_linear_binary_model_in_closed_form() -> None:
    weight = torch.tensor([[1.0, -2.0], [0.5, 1.0]]).double()
    model = nn.Linear(2, 2, bias=False).double()
    model.weight.data.copy_(weight)
    x, y = torch.rand(5, 2).double(), torch.tensor([0, 1, 0, 1, 1])
    shares = model(x).softmax(1)
    slope = (shares - F.one_hot(y, 2)) @ weight
    expected = F.cross_entropy(model(x), y) + 0.3 * slope.pow(2).sum(1).mean()
    value = InputGradient(weight=0.3)(model, Batch(x, y, torch.arange(5), 0))
    assert abs(float(value) - float(expected)) < 1e-10
    with pytest.raises(InputError, match="at least 0"):
        InputGradient(weight=-1.0)


class TestStack:
    def test_is_the_composition_and_wraps_in_order(self) -> None:
        x = torch.rand(3, 1, 8, 8)
        bits, blur = build_defense("bit_depth"), build_defense("gaussian")
        stack, flat = Stack([bits, blur]), nn.Flatten()
        assert torch.equal(stack(x), blur(bits(x)))
        assert torch.equal(stack.wrap(flat)(x), flat(blur(bits(x))))
        assert torch.equal(stack.bpda_partner(x), blur(x))
        scaled = Stack([bits, build_defense("logit_scale", factor=10.0)]).wrap(flat)
        assert torch.allclose(scaled(x), 10 * flat(bits(x)))

    def test_refusals(self) -> None:
        with pytest.raises(InputError, match="holds no defence"):
            Stack([])
        with pytest.raises(InputError, match="stands in it twice"):
            Stack([build_defense("bit_depth"), build_defense("bit_depth", bits=2)])
        score = Denoiser()
        with pytest.raises(InputError, match="draws the very noise of 'diffusion_filter'"):
            Stack([DiffusionFilter(score), DistributionTransfer(score)])
        Stack([DiffusionFilter(score), GDMP(score)])
        detector = build_defense("max_softmax")
        with pytest.raises(InputError, match="put what refuses first"):
            Stack([build_defense("bit_depth"), detector])
        Stack([detector, build_defense("bit_depth")])


class TestStrategy:
    def test_reads_every_part(self) -> None:
        net = load_model("zoo:digits-cnn").model
        plain = derive(net)
        assert (plain.gradient, plain.eot) == ("exact", 1)
        stack = Stack([build_defense(name) for name in ("random_resize_pad", "bit_depth", "gaussian")]).wrap(net)
        mixed = derive(stack)
        assert (mixed.gradient, mixed.eot, dict(mixed.options)) == ("bpda", DRAWS, {"every": False})
        assert "bit_depth by its stand-in" in mixed.why
        assert "random_resize_pad, gaussian and the classifier exactly" in mixed.why
        assert f"{DRAWS} draws" in mixed.why
        assert derive(stack, eot=7).eot == 7
        votes = derive(Committee([net, net], fusion="majority"))
        assert votes.gradient == "bpda"
        assert "majority vote" in votes.why
        assert derive(Committee([net, net, net], subset=1)).eot == DRAWS

    def test_scores_only(self) -> None:
        class Remote(nn.Module):
            access = "scores"

            def forward(self, x: Tensor) -> Tensor:
                return x.flatten(1)

        assert derive(Remote()).gradient == "nes"


def recipe(shield: dict[str, Any], **more: Any) -> Any:
    return make_recipe(
        {
            "data": {"spec": "digits", "limit": 16},
            "threats": [{"norm": "linf", "eps": 0.1}],
            "shields": [shield],
            "spears": [{"attack": "pgd", "options": {"steps": 3}, "gradient": "auto"}],
            "diagnostics": False,
            **more,
        }
    )


class TestRecipes:
    def test_a_stack_before_an_ensemble_runs_and_says_why(self, tmp_path: Path) -> None:
        members = ["zoo:digits-cnn", {"model": "zoo:digits-cnn-at", "defense": "median"}]
        plan = recipe({"model": members, "fusion": "majority", "defense": ["gaussian", {"jpeg": {"quality": 60}}]})
        label = "zoo:digits-cnn & zoo:digits-cnn-at + median (majority) + gaussian + jpeg"
        assert plan.shields[0].label == label
        summary = run(plan, tmp_path, progress="quiet")
        why = summary.shields[label]["gradient"]
        assert why.startswith("The gradient passes jpeg and majority vote by their stand-ins (BPDA)")
        assert summary.cells[0].spear == "pgd (auto)"
        assert summary.cells[0].forwards >= 2
        assert run(plan, tmp_path, progress="quiet").cells == summary.cells

    def test_identity_of_recipes_without_ensembles_is_what_it_was(self) -> None:
        plain = recipe({"model": "zoo:digits-cnn"}).identity()["shields"][0]
        assert set(plain) == {"name", "model", "weights", "model_options", "defense", "options"}

    @pytest.mark.parametrize(
        ("shield", "message"),
        [
            ({"model": "zoo:digits-cnn", "defense": ["k_wta", "jpeg"]}, "put 'k_wta' last"),
            ({"model": "zoo:digits-cnn", "defense": ["jpeg", "jpag"]}, "did you mean 'jpeg'"),
            ({"model": ["zoo:digits-cnn"], "subset": 3}, "cannot be drawn from 1 members"),
            ({"model": ["zoo:digits-cnn", "zoo:cifar10-resnet8"]}, "have 1 channels where the model takes 3"),
            ({"model": "zoo:digits-cnn", "defense": "quilting"}, "no patches of clean images"),
            ({"model": "zoo:digits-cnn", "defense": ["jpeg"], "options": {"quality": 3}}, "stand in the list"),
            ({"defense": "jpeg"}, "'model' is missing"),
        ],
    )
    def test_refusals_come_before_any_work(self, shield: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=message):
            prepare(recipe(shield), tmp_path)
        assert not list(tmp_path.iterdir())

    def test_quilting_takes_patches_from_a_training_split(self, tmp_path: Path) -> None:
        options = {"source": "digits", "side": 3, "overlap": 1, "size": 200}
        arena = prepare(recipe({"model": "zoo:digits-cnn", "defense": "quilting", "options": options}), tmp_path)
        (shield,) = arena.shields.values()
        assert shield.model.defense.bank.shape[0] > 150


def test_the_command_line_takes_several_defences_and_gives_them_again() -> None:
    from maodun.app.flags import Flags, parse_defenses
    from maodun.arena.commands import evaluate_command
    from maodun.arena.plan import make_plan

    assert parse_defenses("jpeg:quality=40") == {"defense": "jpeg", "options": {"quality": 40}}
    flags = Flags(model="zoo:digits-cnn", data="digits", defense="gaussian,jpeg:quality=40", gradient="auto", eps="0.1")
    plan = make_plan(flags.recipe(), 4)
    assert [part.name for part in plan.recipe.shields[0].parts] == ["gaussian", "jpeg"]
    line = evaluate_command(plan.recipe, plan.cells[0])
    assert line is not None
    assert "--defense gaussian,jpeg:quality=40" in line
    # It is what the line means without saying so.
    assert "--gradient" not in line
    exact = dataclasses.replace(flags, gradient="exact").recipe()
    assert "--gradient exact" in str(evaluate_command(exact, make_plan(exact, 4).cells[0]))
    with pytest.raises(InputError, match="names no defence"):
        parse_defenses(" , ")
