"""Uncertainty-aware distributional training: each part equals its equation, and without them it is its base."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses.training import MART, TRADES, UAD, Adversarial, AdversarialTraining, Batch
from maodun.defenses.training.features import feature_layer, pooled
from maodun.defenses.training.statistics import ClassStatistics
from maodun.defenses.training.uad import gradient_gap, resample
from maodun.zoo.architectures import initialise

N, K = 6, 3
GENERATOR = torch.Generator().manual_seed(7)
X = torch.rand(N, 2, 6, 6, generator=GENERATOR, dtype=torch.float64)
OFFSET = 0.2 * torch.rand(N, 2, 6, 6, generator=GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BATCH = Batch(X, Y, torch.arange(N), 4)


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, K)
    ).double()
    initialise(model, 0)
    return model


def moved(_model: nn.Module, batch: Batch) -> Tensor:
    return batch.x + OFFSET


@pytest.mark.parametrize("base", [AdversarialTraining(moved), TRADES(moved), MART(moved)])
def test_without_its_parts_it_is_its_base_to_the_bit(base: Adversarial) -> None:
    model = network()
    assert torch.equal(UAD(base, resampling=0.0, beta=0.0, gamma=0.0)(model, BATCH), base(model, BATCH))


class TestResampling:
    def test_statistics_become_the_redrawn_ones(self) -> None:
        h = torch.randn(5, 3, 4, 4, generator=GENERATOR, dtype=torch.float64)
        draws = torch.randn(5, 2, 3, generator=GENERATOR, dtype=torch.float64)
        out = resample(h, draws, torch.tensor([True, True, True, True, False]))
        assert torch.equal(out[4], h[4])
        for c in range(3):
            means = torch.stack([h[i, c].mean() for i in range(5)])
            deviations = torch.stack([(h[i, c].var(unbiased=False) + 1e-5).sqrt() for i in range(5)])
            for i in range(4):
                e1, e2 = draws[i, 0, c].clamp(-2, 2), draws[i, 1, c].clamp(-2, 2)
                centre = means[i] + e1 * means.var(unbiased=False).sqrt()
                scale = deviations[i] + e2 * deviations.var(unbiased=False).sqrt()
                expected = scale * (h[i, c] - means[i]) / deviations[i] + centre
                assert torch.allclose(out[i, c], expected, atol=1e-12)

    def test_a_batch_of_equal_samples_has_no_uncertainty(self) -> None:
        h = torch.rand(1, 3, 4, 4, generator=GENERATOR, dtype=torch.float64).expand(4, 3, 4, 4)
        out = resample(h, torch.randn(4, 2, 3, generator=GENERATOR), torch.ones(4, dtype=torch.bool))
        assert torch.allclose(out, h, atol=1e-12)

    def test_draws_belong_to_the_sample_and_the_step(self) -> None:
        objective = UAD(AdversarialTraining(moved), resampling=1.0)
        h = torch.randn(N, 3, 4, 4, generator=GENERATOR, dtype=torch.float64)
        first = objective.redraw(h, BATCH)
        noise = Stream(0, "train/uad/noise").normal(torch.arange(N), (2, 3), 4)
        assert torch.allclose(first, resample(h, noise, torch.ones(N, dtype=torch.bool)))
        assert torch.equal(first, objective.redraw(h, BATCH))
        assert not torch.equal(first, objective.redraw(h, Batch(X, Y, BATCH.rows, 5)))

    def test_waits_for_its_step(self) -> None:
        model = network()
        late = UAD(AdversarialTraining(moved), resampling=1.0, beta=0.0, gamma=0.0, start=5)
        assert torch.equal(late(model, BATCH), AdversarialTraining(moved)(model, BATCH))
        assert not torch.equal(late(model, Batch(X, Y, BATCH.rows, 5)), AdversarialTraining(moved)(model, BATCH))


class TestReference:
    h = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 3.0], [5.0, 5.0]])
    answer = torch.tensor([[0.2, 0.8, 0.0], [0.9, 0.1, 0.0], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    y = torch.tensor([0, 0, 0, 1])

    def test_the_nearest_right_sample_of_the_class_answers_for_a_wrong_one(self) -> None:
        out = ClassStatistics().refine(self.answer, self.h, self.y)
        assert torch.equal(out[0], self.answer[1])
        assert torch.equal(out[1:3], self.answer[1:3])
        assert torch.allclose(out[3], torch.tensor([0.1 / 3, 0.9 + 0.1 / 3, 0.1 / 3]))

    def test_nearest_is_measured_in_the_class_spread(self) -> None:
        statistics = ClassStatistics()
        spread = torch.tensor([[-0.1, -30.0], [0.1, 30.0], [-0.1, 30.0], [0.1, -30.0]])
        certain = torch.tensor([[1.0, 0.0, 0.0]]).repeat(4, 1)
        statistics.update(spread, spread, certain, torch.zeros(4, dtype=torch.int64), 0.9)
        out = statistics.refine(self.answer, self.h, self.y)
        assert torch.equal(out[0], self.answer[2])

    def test_the_mean_answer_of_the_class_where_nobody_in_the_batch_is_right(self) -> None:
        statistics = ClassStatistics()
        known = torch.tensor([[0.1, 0.9, 0.0], [0.3, 0.7, 0.0], [0.6, 0.4, 0.0]])
        statistics.update(self.h[:3], self.h[:3], known, torch.ones(3, dtype=torch.int64), 0.9)
        out = statistics.refine(self.answer, self.h, self.y)
        assert torch.allclose(out[3], torch.tensor([0.2, 0.8, 0.0]))

    def test_running_statistics_follow_the_classes_they_see(self) -> None:
        statistics = ClassStatistics()
        first, second = torch.tensor([[0.0], [2.0]]), torch.tensor([[11.0], [13.0]])
        answer, y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])
        statistics.update(first, first, answer, y, 0.75)
        statistics.update(second, second, answer, y, 0.75)
        state = statistics.state()
        assert torch.equal(state["statistics.clean_mean"][:, 0], torch.tensor([0.75 * 1.0 + 0.25 * 12.0, 0.0]))
        assert torch.equal(state["statistics.clean_var"][:, 0], torch.tensor([1.0, 1.0]))
        assert torch.equal(state["statistics.count"], torch.tensor([4.0, 0.0]))
        twin = ClassStatistics()
        twin.restore(state)
        assert torch.equal(twin.refine(answer, second, y), statistics.refine(answer, second, y))


class TestWhole:
    def test_alignment_and_introspection_by_hand(self) -> None:
        model = network()
        objective = UAD(AdversarialTraining(moved), resampling=0.0, beta=2.0, gamma=0.5)
        value = objective(model, BATCH)

        twin = network()
        twin.eval()
        with torch.no_grad():
            answer = twin(X).softmax(1)
            own = pooled(twin[2](twin[1](twin[0](X))))
        reference = ClassStatistics().refine(answer, own, Y)
        twin.train()
        adv = twin(X + OFFSET)
        twin.eval()
        inputs = []
        for point in (X, X + OFFSET):
            leaf = point.clone().requires_grad_(True)
            loss = F.cross_entropy(twin(leaf), Y, reduction="sum")
            inputs.append(torch.autograd.grad(loss, leaf, create_graph=True)[0])
        one, two = (gradient.flatten(1) for gradient in inputs)
        gap = (1 - F.cosine_similarity(one.detach(), two)).sum()
        align = sum((reference[i] * (reference[i].log() - adv[i].log_softmax(0))).sum() for i in range(N))
        expected = F.cross_entropy(adv, Y) + 2.0 * align / N + 0.5 * gap / N
        assert abs(float(value.detach()) - float(expected.detach())) < 1e-10
        value.backward()
        expected.backward()
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert a.grad is not None
            assert b.grad is not None
            assert torch.allclose(a.grad, b.grad, atol=1e-9)

    def test_introspection_rests_on_odd_steps_and_leaves_modes_alone(self) -> None:
        model = network()
        with_it, without = (UAD(AdversarialTraining(moved), 0.0, 0.0, gamma) for gamma in (0.5, 1e-30))
        odd = Batch(X, Y, BATCH.rows, 3)
        assert torch.equal(with_it(model, odd), without(model, odd))
        assert not torch.equal(with_it(model, BATCH), without(model, BATCH))
        assert all(module.training for module in model.modules())

    def test_aligned_gradients_cost_nothing_and_zero_gradients_do_no_harm(self) -> None:
        g = torch.randn(3, 2, 4, 4, generator=GENERATOR)
        assert float(gradient_gap(g, 2.0 * g)) == pytest.approx(0.0, abs=1e-6)
        assert float(gradient_gap(g, -g)) == pytest.approx(2.0)
        zero = torch.zeros_like(g).requires_grad_(True)
        value = gradient_gap(g, zero)
        value.backward()
        assert float(value) == 0.0
        assert zero.grad is not None
        assert torch.isfinite(zero.grad).all()

    def test_vectors_are_redrawn_by_the_spread_of_their_class(self) -> None:
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, K)).double()
        initialise(model, 0)
        x = torch.rand(N, 4, generator=GENERATOR, dtype=torch.float64)
        objective = UAD(AdversarialTraining(lambda _, batch: batch.x), resampling=1.0, beta=1.0, gamma=0.0)
        first = objective(model, Batch(x, Y, BATCH.rows, 0))
        h = torch.zeros(N, 5, dtype=torch.float64)
        changed = objective.redraw(h, Batch(x, Y, BATCH.rows, 1))
        limit = 2.0 * objective.memory.deviation(h, Y)
        assert (changed.abs() <= limit + 1e-12).all()
        assert changed.abs().max() > 0
        assert torch.isfinite(first)

    def test_layers_are_chosen_or_named(self) -> None:
        model = network()
        assert feature_layer(model, X) is model[2]
        assert feature_layer(model, X, "0") is model[0]
        with pytest.raises(InputError, match="layer 'nowhere'"):
            feature_layer(model, X, "nowhere")
        flat = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, K))
        assert feature_layer(flat, torch.rand(2, 4)) is flat[1]
