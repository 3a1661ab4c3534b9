"""The diffusion filter: a Gaussian whose score is known makes every chain a closed form."""

from __future__ import annotations

import pytest
import torch
from gaussians import Gaussian
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses import Defended
from maodun.defenses.purification import CLEAN, SAMPLERS, DiffusionFilter, vp_discrete


def images(n: int, seed: int = 0, shape: tuple[int, ...] = (2, 4, 4)) -> Tensor:
    return 0.5 + 0.1 * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, x: Tensor, ids: Tensor | None = None, number: int = 0) -> Tensor:
    ids = torch.arange(len(x)) if ids is None else ids
    with context.draw(Stream(0, "test"), ids, torch.full_like(ids, number)):
        out: Tensor = model(x)
    return out


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_result_does_not_depend_on_batch_or_order(batch: int, sampler: str) -> None:
    x, steps = images(14), 1 if sampler == "tweedie" else 4
    model = Defended(DiffusionFilter(Gaussian(), steps=steps, sampler=sampler, rounds=2, votes=2), nn.Flatten())
    whole = run(model, x)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    parts = [run(model, x[rows], rows) for rows in order.split(batch)]
    assert torch.allclose(torch.cat(parts), whole[order], atol=1e-6)
    assert not torch.allclose(run(model, x, number=1), whole, atol=1e-3)


def test_votes_average_probabilities_of_independent_purifications() -> None:
    x, filter_ = images(5), DiffusionFilter(Gaussian(), votes=3)
    ids = torch.arange(5)
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        each = []
        for v in range(3):
            with context.part(f"vote-{v}"):
                each.append(filter_(x).flatten(1).softmax(1))
    assert not torch.allclose(each[0], each[1])
    assert torch.allclose(run(Defended(filter_, nn.Flatten()), x).exp(), torch.stack(each).mean(0), atol=1e-6)
    assert filter_.spec.nfe == 15
    assert filter_.spec.votes == 3


def test_votes_of_a_sure_classifier_keep_their_derivative() -> None:
    class Sure(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 300.0 * (torch.tensor([2.0, -1.0]) + torch.tensor([1.0, -1.0]) * x.flatten(1).mean(1, keepdim=True))

    x = images(3).requires_grad_(True)
    logits = Defended(DiffusionFilter(Gaussian(), votes=3), Sure())(x)
    (slope,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), x)
    assert bool((slope != 0).flatten(1).any(1).all())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"t_star": 0.0}, "t_star"),
        ({"t_star": 1.0}, "t_star"),
        ({"steps": 0}, "steps 0"),
        ({"steps": 101}, "at most 100"),
        ({"rounds": 0}, "rounds"),
        ({"votes": 0}, "votes"),
        ({"sampler": "ddimm"}, "ddim"),
        ({"sampler": "tweedie"}, "one step"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word.replace("*", r"\*")):
        DiffusionFilter(Gaussian(), **options)  # type: ignore[arg-type]


def test_the_grid_visits_the_levels_of_lee_and_kim() -> None:
    sampler = SAMPLERS["ddim"]
    assert sampler.grid(99, 5) == (99, 79, 59, 39, 19, CLEAN)
    assert sampler.grid(4, 5) == (4, 3, 2, 1, 0, CLEAN)


def test_the_filter_moves_between_the_levels_it_names() -> None:
    filter_ = DiffusionFilter(Gaussian(), t_star=0.1, steps=2, rounds=2)
    assert list(filter_.moves()) == [(CLEAN, 99), (99, 49), (49, CLEAN)] * 2
    assert filter_.levels == vp_discrete()


def test_the_trajectory_ends_where_the_filter_does() -> None:
    x = images(3).clamp(0, 1)
    filter_ = DiffusionFilter(Gaussian(), steps=3, rounds=2)
    path = filter_.trajectory(x, seed=4)
    assert path.shape == (9, *x.shape)
    assert torch.equal(path[0], x)
    assert torch.equal(path[-1], filter_.purify(x, seed=4))
    assert float((path[1] - x).std()) > 0.05
