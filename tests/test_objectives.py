"""Training objectives: each equals a hand-written loop of its equation, and without its extras it is its base."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.losses import divergence, square_gap
from maodun.core.threat import Threat
from maodun.defenses.training import (
    ACE,
    AWP,
    DKL,
    MART,
    SCORE,
    TRADES,
    Adversarial,
    AdversarialTraining,
    Batch,
    Free,
    Inner,
    MixedTraining,
    NoisyFGSM,
    calibration_term,
    complement_term,
    entropy_term,
)
from maodun.zoo.architectures import initialise

N, D, K = 7, 5, 4
GENERATOR = torch.Generator().manual_seed(3)
X = torch.rand(N, D, generator=GENERATOR, dtype=torch.float64)
OFFSET = 0.3 * torch.rand(N, D, generator=GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 3, 0, 1, 2])
BATCH = Batch(X, Y, torch.arange(N), 4)


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, K)).double()
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return model


def moved(_model: nn.Module, batch: Batch) -> Tensor:
    return batch.x + OFFSET


def by_hand(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Return the probabilities of every sample, one scalar at a time."""
    first, second = model[0], model[2]
    answers = []
    for row in x:
        hidden = [
            torch.tanh(sum(first.weight[i, j] * row[j] for j in range(D)) + first.bias[i]) for i in range(6)
        ]  # fmt: skip
        logits = [sum(second.weight[k, i] * hidden[i] for i in range(6)) + second.bias[k] for k in range(K)]
        total = sum(torch.exp(z) for z in logits)
        answers.append([torch.exp(z) / total for z in logits])
    return answers


def kl(p: list[Tensor], q: list[Tensor]) -> Tensor:
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


def gradients(value: Tensor, model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(value, list(model.parameters())))


def agree(objective: object, loop: Callable[[list[list[Tensor]], list[list[Tensor]]], Tensor]) -> None:
    """Check value and parameter gradients of an objective against a loop over clean and adversarial probabilities."""
    model = network()
    value = objective(model, BATCH)  # type: ignore[operator]
    expected = loop(by_hand(model, X), by_hand(model, X + OFFSET))
    assert abs(float(value) - float(expected)) < 1e-10
    for own, other in zip(gradients(value, model), gradients(expected, model), strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-10)


def mean(terms: list[Tensor]) -> Tensor:
    return sum(terms) / len(terms)


class TestEquations:
    def test_adversarial_training(self) -> None:
        agree(AdversarialTraining(moved), lambda _, q: mean([-torch.log(q[i][Y[i]]) for i in range(N)]))

    def test_label_smoothing(self) -> None:
        def loop(_: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            weight = [[0.1 / K + 0.9 * (k == int(Y[i])) for k in range(K)] for i in range(N)]
            return mean([-sum(weight[i][k] * torch.log(q[i][k]) for k in range(K)) for i in range(N)])

        agree(AdversarialTraining(moved, smoothing=0.1), loop)

    def test_mixed(self) -> None:
        agree(
            MixedTraining(moved, alpha=0.3),
            lambda p, q: mean([-0.3 * torch.log(p[i][Y[i]]) - 0.7 * torch.log(q[i][Y[i]]) for i in range(N)]),
        )

    def test_trades(self) -> None:
        agree(
            TRADES(moved, beta=6.0),
            lambda p, q: mean([-torch.log(p[i][Y[i]]) + 6.0 * kl(p[i], q[i]) for i in range(N)]),
        )

    def test_mart(self) -> None:
        def loop(p: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            terms = []
            for i in range(N):
                y = int(Y[i])
                rival = max((q[i][k] for k in range(K) if k != y), key=float)
                boosted = -torch.log(q[i][y]) - torch.log(1.0001 - rival)
                terms.append(boosted + 5.0 * kl(p[i], q[i]) * (1.0000001 - p[i][y]))
            return mean(terms)

        agree(MART(moved, beta=5.0), loop)

    def test_score(self) -> None:
        def loop(p: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            terms = []
            for i in range(N):
                error = sum((p[i][k] - float(k == int(Y[i]))) ** 2 for k in range(K))
                terms.append(error + 3.0 * sum((q[i][k] - p[i][k]) ** 2 for k in range(K)))
            return mean(terms)

        agree(SCORE(moved, beta=3.0), loop)

    def test_dkl_has_the_gradient_of_trades(self) -> None:
        model = network()
        ours, published = DKL(moved, beta=6.0)(model, BATCH), TRADES(moved, beta=6.0)(model, BATCH)
        for own, other in zip(gradients(ours, model), gradients(published, model), strict=True):
            assert torch.allclose(own, other, rtol=0, atol=1e-12)

    def test_ikl_with_pairs_written_out(self) -> None:
        means = torch.rand(K, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        means = means / means.sum(1, keepdim=True)

        def loop(p: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            terms = []
            for i in range(N):
                w = means[Y[i]]
                gap = [torch.log(p[i][k]) - torch.log(q[i][k]) for k in range(K)]
                pairs = sum(w[j] * w[k] * (gap[j] - gap[k]) ** 2 for j in range(K) for k in range(K))
                soft = -sum(p[i][k].detach() * torch.log(q[i][k]) for k in range(K))
                terms.append(-torch.log(p[i][Y[i]]) + 4.0 * (2.0 * 0.25 * pairs + 0.5 * soft))
            return mean(terms)

        agree(DKL(moved, beta=4.0, weight=2.0, soft=0.5, improved=True, memory={"means": means.clone()}), loop)

    def test_ikl_remembers_the_mean_answer_of_each_class(self) -> None:
        model, objective = network(), DKL(moved, improved=True, momentum=0.75)
        objective(model, BATCH)
        answer = model(X).softmax(1)
        for k in range(K):
            expected = 0.75 / K + 0.25 * answer[k == Y].mean(0)
            assert torch.allclose(objective.state()["means"][k], expected, atol=1e-12)


class TestFixedNumbers:
    """Values worked out by hand, with the public codes' own rounding terms, for two samples of three classes."""

    clean = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]], dtype=torch.float64)
    adv = torch.tensor([[1.0, 0.5, 0.0], [0.2, 0.1, 0.0]], dtype=torch.float64)
    y = torch.tensor([0, 1])

    def test_trades_beta_6(self) -> None:
        assert float(TRADES(moved, beta=6.0).of_logits(self.clean, self.adv, self.y)) == pytest.approx(
            1.399382890, abs=1e-9
        )

    def test_mart_beta_5(self) -> None:
        assert float(MART(moved, beta=5.0).of_logits(self.clean, self.adv, self.y)) == pytest.approx(
            1.488808091, abs=1e-9
        )

    def test_awp_gamma_001(self) -> None:
        # diag(3, 4), norm 5; at x = (1, 0), y = 0 the gradient lies along ((-1, 0), (1, 0)): the gap loses .1/sqrt 2.
        model = nn.Linear(2, 2, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(torch.diag(torch.tensor([3.0, 4.0])))
        x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        objective = AWP(AdversarialTraining(lambda _model, batch: batch.x), gamma=0.01)
        assert float(objective(model, Batch(x, torch.tensor([0]), torch.arange(1), 0))) == pytest.approx(
            0.052056253, abs=1e-9
        )


class TestACE:
    def test_entropy_form(self) -> None:
        def loop(_: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            terms = []
            for i in range(N):
                y = int(Y[i])
                entropy = -sum(v * torch.log(v) for v in q[i]) / math.log(K)
                rival = max(float(torch.log(q[i][k])) for k in range(K) if k != y)
                gate = 1 / (1 + math.exp(-(float(torch.log(q[i][y])) - rival) / 0.5))
                cross = -torch.log(q[i][y])
                terms.append(cross + 0.2 * (gate * entropy - 0.7 * (1 - gate) * entropy))
            return mean(terms)

        agree(ACE(AdversarialTraining(moved), weight=0.2, eta=0.7, tau=0.5), loop)

    def test_complement_form(self) -> None:
        def loop(_: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            terms = []
            for i in range(N):
                y = int(Y[i])
                others = [q[i][k] / (1 - q[i][y]) for k in range(K) if k != y]
                entropy = -sum(v * torch.log(v) for v in others)
                terms.append(-torch.log(q[i][y]) - 0.3 * (1 - q[i][y]) * entropy)
            return mean(terms)

        agree(ACE(AdversarialTraining(moved), weight=0.3, form="complement"), loop)

    def test_calibration_form(self) -> None:
        def loop(_: list[list[Tensor]], q: list[list[Tensor]]) -> Tensor:
            bins = 15
            shares = [[] for _ in range(bins)]
            for i in range(N):
                confidence = max(q[i], key=float)
                right = float(max(range(K), key=lambda k: float(q[i][k])) == int(Y[i]))
                place = min(max(float(confidence), 0.5 / bins), 1 - 0.5 / bins)
                for b in range(bins):
                    weight = 1 - abs(place - (b + 0.5) / bins) * bins
                    if weight > 0:
                        inside = 0.5 / bins < float(confidence) < 1 - 0.5 / bins
                        share = 1 - abs((confidence if inside else place) - (b + 0.5) / bins) * bins
                        shares[b].append((share, confidence - right))
            total = torch.zeros((), dtype=torch.float64)
            for found in shares:
                if found:
                    weight = sum(share for share, _ in found)
                    total = total + weight / N * (sum(share * gap for share, gap in found) / weight) ** 2
            return mean([-torch.log(q[i][Y[i]]) for i in range(N)]) + 2.0 * total

        agree(ACE(AdversarialTraining(moved), weight=2.0, form="calibration"), loop)

    @pytest.mark.parametrize("base", [AdversarialTraining(moved), TRADES(moved), MART(moved)])
    def test_weight_zero_is_the_base_to_the_bit(self, base: Adversarial) -> None:
        model = network()
        assert torch.equal(ACE(base, weight=0.0)(model, BATCH), base(model, BATCH))

    def test_sharpens_what_is_right_and_softens_what_is_wrong(self) -> None:
        logits = torch.tensor([[2.0, 0.0, 0.0]], requires_grad=True)
        (right,) = torch.autograd.grad(entropy_term(logits, torch.tensor([0]), tau=0.0), logits)
        (wrong,) = torch.autograd.grad(entropy_term(logits, torch.tensor([1]), tau=0.0), logits)
        assert right[0, 0] < 0 < wrong[0, 0]

    def test_terms_survive_certainty_and_two_classes(self) -> None:
        logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
        for term in (entropy_term, complement_term, calibration_term):
            value = term(logits, torch.tensor([0, 0]))
            (gradient,) = torch.autograd.grad(value, logits)
            assert torch.isfinite(value)
            assert torch.isfinite(gradient).all()

    def test_unknown_form_is_refused(self) -> None:
        with pytest.raises(InputError, match="form 'entopy'"):
            ACE(AdversarialTraining(moved), form="entopy")  # type: ignore[arg-type]


class TestAWP:
    def test_one_ascent_step_scaled_to_each_layer(self) -> None:
        model, base = network(), TRADES(moved)
        weights = dict(model.named_parameters())
        ascent = dict(zip(weights, gradients(base(model, BATCH), model), strict=True))
        value = AWP(base, gamma=0.01)(model, BATCH)
        own = gradients(value, model)
        twin = network()
        with torch.no_grad():
            for name, parameter in twin.named_parameters():
                if parameter.ndim > 1:
                    parameter.add_(0.01 * parameter.norm() * ascent[name] / ascent[name].norm())
        expected = base(twin, BATCH)
        assert abs(float(value) - float(expected)) < 1e-12
        assert float(value) > float(base(model, BATCH))
        for a, b in zip(own, gradients(expected, twin), strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-12)

    def test_gamma_zero_and_warmup_are_the_base_to_the_bit(self) -> None:
        model, base = network(), MART(moved)
        assert torch.equal(AWP(base, gamma=0.0)(model, BATCH), base(model, BATCH))
        assert torch.equal(AWP(base, gamma=0.1, warmup=5)(model, BATCH), base(model, BATCH))

    def test_leaves_weights_statistics_and_memory_as_one_pass_would(self) -> None:
        model = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, K)).double()
        initialise(model, 0)
        model.train()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        objective = AWP(DKL(moved, improved=True), gamma=0.1)
        objective(model, BATCH).backward()
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert int(model[1].num_batches_tracked) == 2  # clean and adversarial, once each
        assert all(parameter.grad is not None for parameter in model.parameters())
        fresh = DKL(moved, improved=True)
        # The probe's pass is forgotten: one batch has been learnt from, not two.
        twin = DKL(moved, improved=True)
        twin.of_logits(torch.zeros(N, K).double(), torch.zeros(N, K).double(), Y)
        assert set(objective.state()) == set(twin.state()) == {"means"}
        fresh.restore({"means": objective.state()["means"], "statistics.count": torch.ones(1)})
        assert set(fresh.state()) == {"means"}
        fresh.restore({})
        assert fresh.state() == {}


class TestInnerMaximiser:
    def test_departures_climb_from_the_clean_answer(self) -> None:
        """On a linear model with two classes KL and squared gap are monotone in the logit gap: both reach a corner."""
        model = nn.Linear(D, 2).eval()
        initialise(model, 0)
        x = torch.full((3, D), 0.5)
        batch = Batch(x, torch.tensor([0, 1, 0]), torch.arange(3), 0)
        threat = Threat("linf", 0.1)
        for loss, measure in (("kl", divergence), ("square", square_gap)):
            attack = Inner(build_attack("pgd", loss=loss, steps=10), threat)
            x_adv = attack(model, batch)
            assert torch.allclose((x_adv - x).abs(), torch.full_like(x, 0.1), atol=1e-6)
            clean = model(x)
            corners = x + 0.1 * (model.weight[0] - model.weight[1]).sign() * torch.tensor([[1.0], [-1.0]]).unsqueeze(1)
            best = torch.stack([measure(model(corner), clean) for corner in corners]).amax(0)
            assert (measure(model(x_adv), clean) <= best + 1e-6).all()
            assert (measure(model(x_adv), clean) > 0).all()

    def test_noisy_fgsm_on_a_linear_model(self) -> None:
        model = nn.Linear(D, 2)
        initialise(model, 0)
        x = torch.full((4, D), 0.5)
        batch = Batch(x, torch.tensor([0, 1, 0, 1]), torch.arange(4), 3)
        crafted = NoisyFGSM(Threat("linf", 0.05))(model, batch)
        away = (model.weight[1] - model.weight[0]).sign() * torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        noise = crafted - x - 0.05 * away
        assert (noise.abs() <= 0.1 + 1e-6).all()
        assert noise.abs().max() > 0.05
        again = NoisyFGSM(Threat("linf", 0.05))(model, Batch(x[2:], batch.y[2:], batch.rows[2:], 3))
        assert torch.equal(again, crafted[2:])
        with pytest.raises(InputError, match="N-FGSM"):
            NoisyFGSM(Threat("l2", 0.5))

    def test_free_moves_inputs_by_the_gradient_of_the_same_backward(self) -> None:
        model = nn.Linear(D, 2)
        initialise(model, 0)
        x = torch.full((2, D), 0.5)
        objective = Free(Threat("linf", 0.05), replays=2)
        y, rows = torch.tensor([0, 1]), torch.arange(2)
        first = objective(model, Batch(x, y, rows, 0))
        assert torch.equal(first, F.cross_entropy(model(x), y))
        first.backward()
        objective.after_backward(Batch(x, y, rows, 0))
        second = objective(model, Batch(x, y, rows, 1))
        away = (model.weight[1] - model.weight[0]).detach().sign() * torch.tensor([[1.0], [-1.0]])
        assert torch.allclose(second, F.cross_entropy(model(x + 0.05 * away), y))
        third = objective(model, Batch(x, y, rows, 2))
        assert torch.equal(third, first)


def test_the_probe_of_awp_teaches_the_class_means_nothing() -> None:
    model = network()
    plain, wrapped = DKL(moved, improved=True), DKL(moved, improved=True)
    probe = AWP(wrapped, gamma=1e-12)
    plain(model, BATCH)
    probe(model, BATCH)
    assert torch.allclose(plain.state()["means"], wrapped.state()["means"], atol=1e-9)
