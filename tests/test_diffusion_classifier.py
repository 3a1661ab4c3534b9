"""The diffusion classifier: Bayes' rule for Gaussian classes, and an exact gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from maodun.core import context
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.defenses import Defended, Stack
from maodun.defenses.purification import Denoiser, Levels
from maodun.defenses.purification.classifier import DiffusionClassifier
from maodun.defenses.purification.likelihood import LikelihoodMaximisation
from maodun.defenses.purification.replay import Plain, Replay


class Gaussian(Denoiser):
    """Pixels that are independent N(mean, spread^2) in [-1, 1] space: the noise's posterior mean in closed form."""

    def __init__(self, mean: float, spread: float = 0.3) -> None:
        super().__init__()
        self.mean, self.spread = mean, spread

    def forward(self, u: Tensor, t: int, levels: Levels) -> Tensor:
        scale, sigma = levels.at(t)
        return sigma * (u - scale * self.mean) / ((scale * self.spread) ** 2 + sigma**2)


def shield(**options: object) -> Defended:
    return Defended(DiffusionClassifier([Gaussian(-0.2), Gaussian(0.1)], **options), nn.Identity())  # type: ignore[arg-type]


def run(model: nn.Module, x: Tensor, ids: Tensor | None = None) -> Tensor:
    ids = torch.arange(len(x)) if ids is None else ids
    with context.draw(Stream(0, "test"), ids, torch.zeros_like(ids)):
        out: Tensor = model(x)
    return out


def images(n: int = 6, dtype: torch.dtype = torch.float64) -> Tensor:
    return 0.3 + 0.4 * torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)


def test_with_the_likelihoods_weight_it_is_bayes_rule() -> None:
    """log p(x | 1) - log p(x | 0) of two Gaussians is linear in the sum of pixels; noise averages out over draws."""
    x = images()
    model = shield(weight="likelihood", points=250, least=0.02, most=9.0, levels="ve")
    draws = 200
    wide, ids = x.repeat(draws, 1, 1, 1), torch.arange(len(x) * draws)
    logits = run(model, wide, ids).reshape(draws, len(x), 2).mean(0)
    u = 2 * x - 1
    true = ((u + 0.2).square() - (u - 0.1).square()).flatten(1).sum(1) / (2 * 0.3**2)
    assert torch.allclose(logits[:, 1] - logits[:, 0], true, atol=0.35)


def test_the_gradient_is_plain_autograds_and_the_state_recomputed_to_the_bit() -> None:
    grads = []
    for way in (Plain(), Replay(check=True)):
        model, x = shield(points=5), images().requires_grad_()
        model.defense.gradient = way  # type: ignore[union-attr]
        grads.append(torch.autograd.grad((run(model, x) * torch.tensor([1.0, -2.0])).sum(), x)[0])
    assert (grads[0] - grads[1]).abs().max() <= 1e-10 * grads[0].abs().max()


def test_a_sample_is_judged_alone_as_in_a_batch_and_more_noise_is_no_other_sample() -> None:
    model, x = shield(), images(64, torch.float32)
    whole = run(model, x)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    for rows in (*order[:3].split(1), *order.split(7)[:2], order):
        assert torch.allclose(run(model, x[rows], rows), whole[rows], rtol=1e-4)


def test_behind_likelihood_maximisation_it_is_the_robust_one() -> None:
    stack = Stack(
        [LikelihoodMaximisation(Gaussian(0.0), steps=2), DiffusionClassifier([Gaussian(-0.2), Gaussian(0.1)])]
    )
    assert run(stack.wrap(nn.Identity()), images()).shape == (6, 2)
    with pytest.raises(InputError, match="last"):
        Stack([DiffusionClassifier([Gaussian(-0.2), Gaussian(0.1)]), LikelihoodMaximisation(Gaussian(0.0))])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"scores": "one.safetensors"}, "every class"),
        ({"points": 0}, "points"),
        ({"least": 2.0}, "empty"),
        ({"weight": "edn"}, "edm"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word):
        DiffusionClassifier(**{"scores": [Gaussian(-0.2), Gaussian(0.1)], **options})  # type: ignore[arg-type]
