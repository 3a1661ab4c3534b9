"""The oracle: gradients against closed forms, counts, budgets, restored flags, and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maodun.attacks.gradient.pgd import PGD
from maodun.core import context
from maodun.core.admission import check_inputs, check_outputs, check_samples
from maodun.core.errors import InputError
from maodun.core.oracle import BPDA, EOT, NES, SPSA, Budget, BudgetExceededError, Exact, Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge

IDS = torch.arange(6)


class Linear(nn.Module):
    """Logits W x + b, optionally with keyed noise added to the input."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(Stream(0, "w").normal(torch.arange(3), (8,)))
        self.noise = noise
        self.stochastic = noise > 0

    def forward(self, x: Tensor) -> Tensor:
        if self.noise:
            x = x + self.noise * context.noise(x, "test").normal()
        return x.flatten(1) @ self.weight.T


def _first(logits: Tensor, index: Tensor) -> Tensor:
    return logits[:, :1] - logits[:, 1:2]


def _data() -> tuple[Tensor, Tensor]:
    x = 0.2 + 0.6 * Stream(0, "x").uniform(IDS, (8,))
    return x, Linear()(x).argmax(1)


def _session(oracle: Oracle):
    x, _ = _data()
    return oracle.session(x, IDS, 0), x, torch.arange(6)


@pytest.mark.parametrize(
    ("estimator", "tolerance"),
    [(Exact(), 1e-6), (BPDA(), 1e-6), (EOT(Exact(), 4), 1e-5), (NES(2000, 0.01), 0.2), (SPSA(2000, 0.01), 0.2)],
)
def test_every_estimator_finds_the_gradient_of_a_linear_model(estimator, tolerance):
    model = Linear()
    session, x, rows = _session(Oracle(model, gradient=estimator))
    logits, values, grads = session.estimate(x, rows, _first)
    true = (model.weight[0] - model.weight[1]).expand(6, -1)
    assert torch.allclose(logits, model(x), atol=1e-5)
    assert torch.allclose(values[:, 0], logits[:, 0] - logits[:, 1], atol=1e-5)
    assert ((grads[0] - true).norm(dim=1) / true.norm(dim=1)).max() < tolerance


def test_eot_gradient_ascends_and_averages_losses_of_a_noisy_quadratic():
    class Quadratic(nn.Module):
        stochastic = True

        def forward(self, x: Tensor) -> Tensor:
            z = x + 0.5 * context.noise(x, "q").normal()
            return torch.stack([(z**2).sum(1), torch.zeros(x.shape[0])], 1)

    x = 0.2 + 0.6 * Stream(1, "x").uniform(IDS, (8,))
    oracle = Oracle(Quadratic(), gradient=EOT(Exact(), 4000), batch_size=4000)
    _, values, grads = oracle.session(x, IDS, 0).estimate(x, torch.arange(6), lambda z, i: z[:, :1])
    # E ||x + s e||^2 = ||x||^2 + d s^2 with gradient 2 x.
    assert torch.allclose(values[:, 0], (x**2).sum(1) + 8 * 0.25, atol=0.2)
    assert torch.nn.functional.cosine_similarity(grads[0], 2 * x).min() > 0.99


def test_search_noise_depends_on_sample_id_not_on_the_batch():
    oracle = Oracle(Linear(noise=1.0), gradient=EOT(Exact(), 3))
    session, x, rows = _session(oracle)
    whole = session.estimate(x, rows, _first)[0]
    order = torch.tensor([4, 1])
    small = Oracle(oracle.model, gradient=oracle.gradient, batch_size=1)
    part = small.session(x[order], IDS[order], 0).estimate(x[order], torch.arange(2), _first)[0]
    assert torch.allclose(part, whole[order], atol=1e-5)


def test_bpda_takes_the_partners_derivative_and_keeps_the_forward_value():
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x > 0.5).float()

        def bpda_partner(self, x: Tensor) -> Tensor:
            return 3.0 * x

    model = nn.Sequential(Step(), Linear())
    session, x, rows = _session(Oracle(model, gradient=BPDA()))
    logits, _, grads = session.estimate(x, rows, _first)
    assert torch.allclose(logits, model(x), atol=1e-5)
    weight = model[1].weight
    assert torch.allclose(grads[0], 3.0 * (weight[0] - weight[1]).expand(6, -1), atol=1e-5)
    exact, x, rows = _session(Oracle(model))
    assert not exact.estimate(x, rows, _first)[2][0].any()
    assert not model[0]._forward_hooks


def test_counts_are_per_sample_and_exact():
    session, x, rows = _session(Oracle(Linear(), batch_size=4))
    session.estimate(x[:3], rows[:3], lambda z, i: z[:, :2])
    session.logits(x, rows)
    assert session.meter.forwards.tolist() == [2, 2, 2, 1, 1, 1]
    assert session.meter.backwards.tolist() == [2, 2, 2, 0, 0, 0]
    assert session.meter.queries.tolist() == [1] * 6
    session, x, rows = _session(Oracle(Linear(0.1), gradient=EOT(Exact(), 5)))
    session.estimate(x, rows, _first)
    assert session.meter.forwards.tolist() == [5] * 6 and session.meter.backwards.tolist() == [5] * 6
    session, x, rows = _session(Oracle(Linear(), access="scores", gradient=NES(10)))
    session.estimate(x, rows, _first)
    assert session.meter.queries.tolist() == [11] * 6 and session.meter.backwards.tolist() == [0] * 6


@pytest.mark.parametrize("budget", [Budget(forwards=7), Budget(backwards=5), Budget(queries=3)])
def test_budget_is_never_exceeded_and_says_so(budget):
    x, y = _data()
    found = PGD(steps=30).run(Oracle(Linear(), budget=budget), x, y, Threat("linf", 1e-4))
    for limit, spent in (
        (budget.forwards, found.forwards),
        (budget.backwards, found.backwards),
        (budget.queries, found.queries),
    ):
        assert limit is None or int(spent.max()) <= limit
    if budget.queries is None:
        assert (found.status == 2).all()


def test_budget_error_names_the_rows():
    session, x, rows = _session(Oracle(Linear(), budget=Budget(forwards=1)))
    session.logits(x[:2], rows[:2])
    with pytest.raises(BudgetExceededError) as caught:
        session.logits(x, rows)
    assert caught.value.rows.tolist() == [0, 1]


def test_access_levels_refuse():
    session, x, rows = _session(Oracle(Linear(), access="scores"))
    with pytest.raises(InputError, match="needs gradient access"):
        session.estimate(x, rows, _first)
    session, x, rows = _session(Oracle(Linear(), access="decision"))
    with pytest.raises(InputError, match="only tells decisions"):
        session.logits(x, rows)
    assert session.decisions(x, rows).shape == (6,)


def test_every_flag_comes_back():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    model.train()
    model[0].eval()
    model[2].bias.requires_grad_(False)
    x = 0.2 + 0.6 * Stream(0, "x").uniform(IDS, (8,))
    PGD(steps=2).run(Oracle(model), x, torch.zeros(6, dtype=torch.int64), Threat("linf", 0.01))
    assert [m.training for m in model] == [False, True, True]
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_weight_gradients_are_never_computed():
    model = Linear()
    x, y = _data()
    touched = []
    model.weight.register_hook(lambda g: touched.append(g))
    PGD(steps=3).run(Oracle(model), x, y, Threat("linf", 0.01))
    assert touched == []


def test_batchnorm_in_training_mode_is_refused_and_global_rng_untouched():
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    with pytest.raises(InputError, match="training mode and contains BatchNorm"):
        Oracle(model)
    model.eval()
    x, _ = _data()
    state = torch.random.get_rng_state()
    PGD(steps=2).run(Oracle(model), x, torch.zeros(6, dtype=torch.int64), Threat("l2", 0.1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_undeclared_noise_is_noticed_seeded_and_leaves_the_global_rng():
    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3] + torch.randn(x.shape[0], 3)

    x, y = _data()
    state = torch.random.get_rng_state()
    runs = [PGD(steps=3).run(Oracle(Noisy()), x, y.clamp(max=2), Threat("linf", 0.1), seed=3) for _ in range(2)]
    assert torch.equal(runs[0].x_adv, runs[1].x_adv)
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.full((2, 3), float("nan")), "NaN"),
        (torch.full((2, 3), 200.0), "0-255"),
        (torch.tensor([[-2.0, 2.0]]), "standardised"),
        (torch.zeros(2, 3, dtype=torch.uint8), "divide by 255"),
        (torch.zeros(3), "N x"),
    ],
)
def test_inputs_refused(x, match):
    with pytest.raises(InputError, match=match):
        check_inputs(x)


def test_labels_and_targets_refused():
    x = torch.rand(2, 3)
    with pytest.raises(InputError, match="one integer per sample"):
        check_samples(x, torch.zeros(3, dtype=torch.int64), None, None, Threat("linf"))
    with pytest.raises(InputError, match="numbered from 0"):
        check_samples(x, torch.tensor([0, -1]), None, None, Threat("linf"))
    with pytest.raises(InputError, match="missing for a targeted threat"):
        check_samples(x, torch.tensor([0, 1]), None, None, Threat("linf", targeted=True))


@pytest.mark.parametrize(
    ("logits", "y", "match"),
    [
        (torch.full((4, 2), 0.5), [0, 1, 0, 1], "probabilities"),
        (torch.randn(4, 1), [0, 0, 0, 0], "one logit per class"),
        (torch.randn(4, 3), [0, 1, 2, 3], "has 3 classes"),
        (torch.full((4, 3), float("nan")), [0, 1, 2, 0], "NaN"),
        (torch.randn(4, 3, 2), [0, 1, 2, 0], "shape"),
        (torch.eye(10).repeat(10, 1), [(i * 7 + 3) % 10 for i in range(100)], "no better than guessing"),
    ],
)
def test_outputs_refused(logits, y, match):
    with pytest.raises(InputError, match=match):
        check_outputs(logits * (1 if "prob" in match else 3.0), torch.tensor(y), None)


def test_conv_weights_change_layout_for_the_run_only_and_never_values():
    seen = []

    class Spy(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(self.weight.is_contiguous(memory_format=torch.channels_last))
            return super().forward(x)

    model = nn.Sequential(Spy(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    before = model[0].weight.detach().clone()
    strides = model[0].weight.stride()
    x = Stream(0, "x").uniform(IDS, (3, 6, 6))
    y = torch.zeros(6, dtype=torch.int64)
    fast = PGD(steps=3).run(Oracle(model), x, y, Threat("linf", 0.1))
    assert any(seen) and model[0].weight.stride() == strides and torch.equal(model[0].weight, before)
    slow = PGD(steps=3).run(Oracle(model, channels_last=False), x, y, Threat("linf", 0.1))
    assert torch.allclose(fast.x_adv, slow.x_adv, atol=1e-4)


def test_bf16_searches_under_autocast_is_no_reference_and_is_judged_in_float32():
    types = []

    class Spy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            types.append(out.dtype)
            return out

    model = Spy(8, 3)
    x, _ = _data()
    with torch.no_grad():
        y = model(x).argmax(1)
    oracle = Oracle(model, precision="bf16")
    types.clear()
    found = PGD(steps=2).run(oracle, x, y, Threat("linf", 0.2), check_model=False)
    assert torch.bfloat16 in types and not oracle.reference and Oracle(model).reference
    types.clear()
    judge(oracle, found.x_adv, x, y, Threat("linf", 0.2))
    assert set(types) == {torch.float32}
