"""Ways to differentiate a stochastic defence, the batching of draws, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from maodun.arena.plan import estimator
from maodun.arena.recipe import SpearSpec
from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.oracle import BPDA, EOT, Adjoint, Exact, Oracle, Surrogate
from maodun.core.sizing import activation_bytes
from maodun.defenses import Defended
from maodun.defenses.purification import Denoiser, DiffusionFilter, Levels

IDS = torch.arange(5)


class Shift(Denoiser):
    """Predicts a tenth of what it sees, through a leaf module so that activations can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Identity()
        self.rows: list[int] = []

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        self.rows.append(len(u))
        return self.leaf(torch.tanh(u))


def data() -> Tensor:
    return 0.3 + 0.4 * torch.rand(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def estimate(oracle: Oracle) -> tuple[Tensor, Tensor, Tensor]:
    x = data()
    logits, values, grads = oracle.session(x, IDS, 0).estimate(x, torch.arange(5), lambda z, i: z[:, :1] - z[:, 5:6])
    return logits, values, grads[0]


def shield(steps: int = 10) -> Defended:
    return Defended(DiffusionFilter(Shift(), t_star=0.1, steps=steps), nn.Flatten())


@pytest.mark.parametrize("inner", [Exact(), BPDA(), Surrogate(2)])
def test_draws_are_the_same_however_they_are_batched(inner: Exact | BPDA | Surrogate) -> None:
    whole = estimate(Oracle(shield(), gradient=EOT(inner, 12), batch_size=60))
    for size in (1, 7, 24):
        model = shield()
        cut = estimate(Oracle(model, gradient=EOT(inner, 12), batch_size=size))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, cut, strict=True))
        assert max(model.defense.denoiser.rows) <= size  # type: ignore[union-attr, operator]


def test_a_surrogate_is_the_filter_of_fewer_steps() -> None:
    found = estimate(Oracle(shield(10), gradient=Surrogate(2), batch_size=8))
    for own, asked in ((2, 2), (2, 7), (2, 0), (10, 0)):
        own_steps = estimate(Oracle(shield(own), gradient=Surrogate(asked), batch_size=8))
        assert torch.equal(own_steps[2], found[2]) == ((own == 2 and asked > 0) or own == 10)
    model = shield(10)
    estimate(Oracle(model, gradient=Surrogate(2), batch_size=8))
    assert len(model.defense.path) == 11  # type: ignore[arg-type, union-attr]


def test_bpda_passes_the_identity_and_modules_without_a_surrogate_stand() -> None:
    gradient = estimate(Oracle(shield(), gradient=BPDA(), batch_size=8))[2]
    assert gradient[:, 0, 0, 0].eq(1).all() and gradient[:, 0, 1, 1].eq(-1).all()
    plain = nn.Sequential(nn.Flatten(), nn.Tanh())
    assert torch.equal(estimate(Oracle(plain))[2], estimate(Oracle(plain, gradient=Surrogate(3)))[2])
    assert torch.equal(estimate(Oracle(plain))[2], estimate(Oracle(plain, gradient=Adjoint()))[2])


class Small(nn.Module):
    """A noisy model that has memory for `most` rows only."""

    stochastic = True

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + 0.1 * context.noise(x, "small").normal()
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return torch.tanh(noisy).flatten(1)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_out_of_memory_means_smaller_batches_and_the_same_answer(most: int) -> None:
    x, rows = data(), torch.arange(5)
    for gradient in (Exact(), EOT(Exact(), 4)):
        roomy, cramped = (Oracle(Small(k), gradient=gradient, batch_size=20).session(x, IDS, 0) for k in (99, most))
        for session in (roomy, cramped):
            session.logits(x, rows, 3)
        a, b = (each.estimate(x, rows, lambda z, i: z[:, :1]) for each in (roomy, cramped))
        assert torch.allclose(a[0], b[0], atol=1e-6)
        assert torch.allclose(a[2][0], b[2][0], atol=1e-6)
        assert torch.equal(roomy.meter.forwards, cramped.meter.forwards)
        assert torch.equal(roomy.meter.backwards, cramped.meter.backwards)
        assert cramped.batch_size <= most


def test_when_not_one_sample_fits_it_says_so() -> None:
    with pytest.raises(InputError, match=r"memory.*not even one sample"):
        estimate(Oracle(Small(0), batch_size=8))

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        estimate(Oracle(Broken(), batch_size=8))


def test_a_replayed_filter_is_sized_by_one_step() -> None:
    few, many = (activation_bytes(shield(steps), data()) for steps in (2, 50))
    assert few == many


def test_recipes_name_the_modes() -> None:
    spear = SpearSpec(attack="pgd", gradient="surrogate", gradient_options={"steps": 3}, eot=4)
    assert estimator(spear) == EOT(Surrogate(3), 4)
    assert estimator(SpearSpec(attack="pgd", gradient="adjoint")) == Adjoint()
    with pytest.raises(InputError, match="steps"):
        estimator(SpearSpec(attack="pgd", gradient="surrogate", gradient_options={"sigma": 3}))


def test_any_module_may_offer_a_cheaper_process() -> None:
    class Rough(nn.Module):
        slope = 3.0

        @contextmanager
        def surrogate_process(self, steps: int) -> Iterator[None]:
            self.slope = float(steps)
            yield
            self.slope = 3.0

        def forward(self, x: Tensor) -> Tensor:
            return self.slope * x.flatten(1)

    model = Rough()
    assert estimate(Oracle(model, gradient=Surrogate(7), batch_size=8))[2][0, 0, 0, 0] == 7
    assert model.slope == 3.0
