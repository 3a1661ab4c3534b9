"""Relations: every term against an oracle in float64, the module and its controls, and the attack on closed forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from maodun.attacks.multitask import relations
from maodun.attacks.multitask.attack import Relation, Weights, relation_objective, without_relations
from maodun.attacks.multitask.fit import RelationFit, fit_relation, quality, relation_terms
from maodun.attacks.multitask.generator import (
    GeneratorSettings,
    RelationGenerator,
    relation_value,
    separation_value,
    train_generator,
)
from maodun.attacks.multitask.module import RelationModule, build_module
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat

BALL = Threat("linf", 0.06)


def draw(name: str, *shape: int) -> Tensor:
    return Stream(0, name).normal(torch.arange(shape[0]), shape[1:]).double()


def patches(n: int = 96, side: int = 32, name: str = "patches") -> Tensor:
    """Smooth random images: blurred noise with a colour of its own."""
    noise = Stream(0, name).uniform(torch.arange(n), (3, side // 4, side // 4))
    return torch.nn.functional.interpolate(noise, size=(side, side), mode="bilinear")


@pytest.fixture(scope="module")
def module() -> RelationModule:
    return build_module("learned", patches(), width=8, anchors=64)


def plain_affinities(h: Tensor, perplexity: float) -> list[list[float]]:
    """t-SNE's affinities with loops and a bisection of each sigma."""
    n = h.shape[0]
    conditional = [[0.0] * n for _ in range(n)]
    for i in range(n):
        squares = [float(((h[i] - h[j]) ** 2).sum()) for j in range(n)]
        low, high = 1e-6, 1e6
        for _ in range(200):
            beta = math.sqrt(low * high)
            nearest = min(s for k, s in enumerate(squares) if k != i)
            weights = [0.0 if j == i else math.exp(-beta * (squares[j] - nearest)) for j in range(n)]
            shares = [w / sum(weights) for w in weights]
            entropy = -sum(p * math.log(p) for p in shares if p > 0)
            low, high = (beta, high) if entropy > math.log(perplexity) else (low, beta)
        conditional[i] = shares
    return [[(conditional[i][j] + conditional[j][i]) / (2 * n) for j in range(n)] for i in range(n)]


def test_affinities_are_those_of_a_plain_bisection():
    h = draw("h", 12, 5)
    p = relations.affinities(h, 4.0)
    assert torch.allclose(p, torch.tensor(plain_affinities(h, 4.0), dtype=torch.float64), atol=1e-8)
    assert math.isclose(float(p.sum()), 1.0, rel_tol=1e-9)
    assert torch.equal(p, p.T) and (p.diagonal() == 0).all()
    # Neither a shift nor a scale of the features changes who is near whom.
    assert torch.allclose(relations.affinities(3.0 * h + 7.0, 4.0), p, atol=1e-8)
    with pytest.raises(InputError, match="perplexity"):
        relations.affinities(h, 20.0)


def test_the_terms_agree_with_loops():
    h, z = draw("h", 10, 5), draw("z", 10, 3)
    p = relations.affinities(h, 4.0)
    pairs = [(i, j) for i, j in itertools.product(range(10), repeat=2) if i != j]
    square = {(i, j): float(((z[i] - z[j]) ** 2).sum()) for i, j in pairs}
    total = sum(1 / (1 + 3 * square[pair]) for pair in pairs)
    divergence = sum(float(p[pair]) * math.log(float(p[pair]) * (1 + 3 * square[pair]) * total) for pair in pairs)
    assert math.isclose(float(relations.neighbourhood_divergence(p, z, 3.0)), divergence, rel_tol=1e-9)
    assert math.isclose(float(relations.laplacian(p, z)), sum(float(p[pair]) * square[pair] for pair in pairs))
    before = [float((h[i] - h[j]).norm()) for i, j in pairs if i < j]
    after = [math.sqrt(square[i, j]) for i, j in pairs if i < j]
    a, b = sum(before) / 45, sum(after) / 45
    over = sum((s - a) * (t - b) for s, t in zip(before, after, strict=True))
    under = math.sqrt(sum((s - a) ** 2 for s in before) * sum((t - b) ** 2 for t in after))
    assert math.isclose(float(relations.distance_decorrelation(h, z)), 1 - over / under, rel_tol=1e-6)
    assert abs(float(relations.distance_decorrelation(h, 2 * h))) < 1e-6


def test_whitening_is_zero_exactly_for_codes_that_use_all_dimensions_alike():
    corners = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)
    z = corners * math.sqrt(7 / 8 / 3)
    assert float(relations.whitening(z)) < 1e-20
    # One dimension only: (1 - 1/3)^2 off in the first, (1/3)^2 in each of the others.
    flat = torch.zeros(8, 3, dtype=torch.float64)
    flat[:, 0] = corners[:, 0] * math.sqrt(7 / 8)
    assert math.isclose(float(relations.whitening(flat)), 4 / 9 + 2 / 9, rel_tol=1e-9)


def test_total_variation_of_a_step():
    d = torch.zeros(1, 1, 4, 4)
    d[..., 2:] = 1.0
    assert relations.total_variation(d).item() == pytest.approx(4 / 12)


@pytest.mark.parametrize("term", ["divergence", "geometry", "laplacian", "whitening"])
def test_the_terms_have_right_gradients_and_fall_along_them(term):
    h, z = draw("h", 8, 4), draw("z", 8, 3).requires_grad_(True)
    p = relations.affinities(h, 3.0)
    value = {
        "divergence": lambda z: relations.neighbourhood_divergence(p, z),
        "geometry": lambda z: relations.distance_decorrelation(h, z),
        "laplacian": lambda z: relations.laplacian(p, z),
        "whitening": relations.whitening,
    }[term]
    assert torch.autograd.gradcheck(value, (z,))
    (slope,) = torch.autograd.grad(value(z), z)
    assert value(z - 1e-3 * slope / slope.norm()) < value(z)


def test_the_module_reads_windows_eight_pixels_apart(module):
    x = patches(2, 64, "large")
    codes = module.codes(x)
    assert codes.shape == (2, 8, 5, 5) and torch.allclose(codes.norm(dim=1), torch.ones(2, 5, 5), atol=1e-5)
    assert torch.equal(module(x), codes.flatten(1))
    assert module.codes(x[:, :, :40, :56]).shape == (2, 8, 2, 4)
    assert module.bank.shape == (64, 8) and module.sharpness > 0
    for bad in (x[:, :, :31], x[:, :1], x[0]):
        with pytest.raises(InputError, match="relation module"):
            module.codes(bad)


def test_the_sharpness_gives_the_bank_its_perplexity(module):
    inner = (module.bank @ module.bank.T).fill_diagonal_(-torch.inf)
    shares = (module.sharpness * inner).softmax(1)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1).mean()
    assert math.isclose(float(entropy), math.log(20.0), rel_tol=1e-3)


def test_the_pca_control_is_a_projection_on_principal_components():
    x = patches(128)
    control = build_module("pca", x, width=6, anchors=64)
    flat = x.flatten(1)
    _, _, basis = torch.linalg.svd((flat - flat.mean(0)).double(), full_matrices=False)
    raw = control.encoder(x).flatten(1).double()
    wanted = (flat - flat.mean(0)).double() @ basis[:6].T
    # Components are free up to sign and rotation: the plane, hence the inner products, are not.
    assert torch.allclose(raw @ raw.T, wanted @ wanted.T, atol=0.02 * float((wanted @ wanted.T).abs().max()))


def test_training_improves_every_gate_repeats_itself_and_refuses_controls():
    x, held = patches(160), patches(96, 32, "held")
    settings = RelationFit(steps=25, batch_size=48, perplexity=8.0, rate=5e-3)
    made = [build_module("learned", x, width=8, anchors=64) for _ in range(2)]
    before = quality(made[0], held)
    lines: list[dict[str, float]] = []
    for each in made:
        fit_relation(each, x, settings, on_step=lambda _, line: lines.append(line))
    after = quality(made[0], held, torch.zeros(96, dtype=torch.int64))
    assert all(after[name] > before[name] for name in ("trustworthiness", "continuity", "psnr"))
    assert after["trustworthiness"] > 0.6 and after["knn_accuracy"] == 1.0
    assert torch.equal(made[0].bank, made[1].bank) and len(lines) == 2
    assert set(relation_terms(made[0], x[:48], settings)) == set(lines[0])
    with pytest.raises(InputError, match="control"):
        fit_relation(build_module("random", x, width=8, anchors=64), x, settings)
    with pytest.raises(InputError, match="anchors"):
        build_module("learned", x[:10], width=8, anchors=64)


def test_the_objective_agrees_with_a_single_window_worked_out():
    tiny = RelationModule("learned", width=2, anchors=3)
    tiny.bank.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    tiny.sharpness.fill_(2.0)
    clean, moved = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    shape = (1, 2, 1, 1)
    assert (
        relation_objective(tiny, moved.reshape(shape), clean.reshape(shape), Weights(1, 0, 0, near=1, far=1)).item()
        == 2
    )
    p = torch.tensor([2.0, 0.0, -2.0]).softmax(0)
    q = torch.tensor([1 / 21, 1.0, 1 / 21])
    q = q / q.sum()
    wanted = (p * (p / q).log()).sum()
    got = relation_objective(tiny, moved.reshape(shape), clean.reshape(shape), Weights(0, 1, 0, near=1, far=1))
    assert torch.allclose(got, wanted.reshape(1), atol=1e-5)
    # Steering: similarity to the far anchor (-1, 0) less that to the near one (1, 0), over the temperature.
    turned = torch.tensor([-1.0, 0.0]).reshape(shape)
    got = relation_objective(tiny, turned, clean.reshape(shape), Weights(0, 0, 1, 0.5, near=1, far=1))
    assert torch.allclose(got, torch.tensor([(1.0 + 1.0) / 0.5]))


def attack(model, x: Tensor, ids: Tensor | None = None, found: Relation | None = None, **oracle) -> Tensor:
    found = Relation(steps=4, near=5, far=8) if found is None else found
    made = found.run(
        Oracle(model, surrogate=True, **oracle), x, torch.zeros(len(x), dtype=torch.int64), BALL, ids=ids,
        check_model=False,
    )  # fmt: skip
    assert BALL.contains(made.x_adv, x).all()
    return made.x_adv


def value(module: RelationModule, x_adv: Tensor, x: Tensor) -> Tensor:
    return relation_objective(module, module.codes(x_adv), module.codes(x), Weights(near=5, far=8))


def test_the_attack_climbs_what_it_says_and_beats_noise(module):
    x = patches(6, 40, "victims")
    noise = BALL.random_start(x, Stream(1, "noise"), torch.arange(6))
    assert (value(module, attack(module, x), x) > 2 * value(module, noise, x).clamp(min=0)).all()
    alone = attack(module, x, found=without_relations(Relation(steps=4, near=5, far=8)))
    far = (module.codes(alone) - module.codes(x)).square().sum(1).mean((1, 2))
    assert (far > (module.codes(noise) - module.codes(x)).square().sum(1).mean((1, 2))).all()


def test_results_do_not_depend_on_batch_or_order(module):
    x, ids = patches(7, 40, "victims"), torch.arange(7) + 5
    whole = attack(module, x, ids)

    def same(other: Tensor, rows: Tensor) -> bool:
        # A slope of almost nothing may have either sign by rounding; nothing else may differ.
        return float(((other - whole[rows]).abs() < 1e-5).float().mean()) > 0.98

    everyone = torch.arange(7)
    for size in (1, 3, 64):
        assert same(attack(module, x, ids, batch_size=size), everyone)
    order = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    assert same(attack(module, x[order], ids[order]), order)
    assert not same(attack(module, x, ids + 100), everyone)


def test_levels_move_the_first_maps(module):
    x = patches(4, 40, "victims")

    def moved(x_adv: Tensor) -> Tensor:
        return (module.filters(x_adv) - module.filters(x)).square().flatten(1).mean(1)

    plain, deep = (attack(module, x, found=Relation(steps=6, near=5, far=8, levels=w)) for w in (0.0, 30.0))
    assert (moved(deep) > moved(plain)).all()


def test_smoothness_is_paid_for(module):
    x = patches(4, 40, "victims")
    rough, smooth = (attack(module, x, found=Relation(steps=6, near=5, far=8, smooth=s)) for s in (0.0, 2.0))
    assert (relations.total_variation(smooth - x) < relations.total_variation(rough - x)).all()


def test_bad_input_is_refused(module):
    x, y = patches(2), torch.zeros(2, dtype=torch.int64)
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 3))
    with pytest.raises(InputError, match="RelationModule"):
        attack(plain, x)
    with pytest.raises(InputError, match="at least 32 pixels"):
        attack(module, x[:, :, :20])
    with pytest.raises(InputError, match="64 anchors"):
        attack(module, x, found=Relation(far=100))
    with pytest.raises(InputError, match="temperature"):
        Relation(temperature=0.0)
    with pytest.raises(UnsupportedError, match="l1"):
        Relation().run(Oracle(module), x, y, Threat("l1", 1.0))
    with pytest.raises(InputError, match="of no known kind"):
        RelationModule("wrong")  # type: ignore[arg-type]


def test_generators_learn_both_objectives_and_take_any_size(module):
    x = patches(48)
    settings = GeneratorSettings(steps=15, batch_size=8, width=4, blocks=1, rate=5e-3)
    goals = (relation_value(module, Weights(near=5, far=8)), separation_value(module, "encoder.2"))
    for goal in goals:
        made = train_generator(RelationGenerator, module, goal, x, 0.06, settings)
        again = train_generator(RelationGenerator, module, goal, x, 0.06, settings)
        assert made == again
        x_adv = made.candidates(x, torch.arange(48), BALL)
        noise = BALL.random_start(x, Stream(1, "noise"), torch.arange(48))
        assert BALL.contains(x_adv, x).all()
        assert goal(x_adv, x).mean() > goal(noise, x).mean()
        wide = made.replace(shape=(3, 40, 48)).candidates(patches(2, 48, "wide")[:, :, :40], torch.arange(2), BALL)
        assert wide.shape == (2, 3, 40, 48)
    assert all(p.requires_grad for p in module.encoder.parameters())
