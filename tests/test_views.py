"""Relations between views of one image: the loss worked out, views in range, training that tells images apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from maodun.attacks.multitask.attack import Relation, Weights
from maodun.attacks.multitask.generator import relation_value
from maodun.attacks.multitask.module import build_module
from maodun.attacks.multitask.views import ViewsFit, fit_views, view, view_loss
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat

BALL = Threat("linf", 16 / 255)


def patches(n: int, name: str = "patches") -> Tensor:
    noise = Stream(0, name).uniform(torch.arange(n), (3, 8, 8))
    return torch.nn.functional.interpolate(noise, size=(32, 32), mode="bilinear")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_loss_of_two_images_worked_out():
    # Views agree with themselves (similarity 1) and are orthogonal to the other image's.
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    right = math.log(math.exp(2.0) + 2.0) - 2.0
    assert view_loss(z, 0.5).item() == pytest.approx(right, abs=1e-6)
    # Swapped partners: the own view is orthogonal, a stranger is the same.
    wrong = math.log(math.exp(2.0) + 2.0)
    assert view_loss(z[[0, 1, 3, 2]], 0.5).item() == pytest.approx(wrong, abs=1e-6)


def test_views_stay_in_range_and_come_from_the_image():
    x = patches(64)
    seen = view(x, generator())
    assert seen.shape == x.shape and float(seen.min()) >= 0 and float(seen.max()) <= 1
    assert torch.equal(seen, view(x, generator())) and not torch.equal(seen, view(x, torch.Generator().manual_seed(4)))
    # A constant image has no place and no contrast: only its brightness may change, by at most 0.2.
    flat = view(torch.full((64, 3, 32, 32), 0.5), generator())
    assert torch.allclose(flat, flat.mean((1, 2, 3), keepdim=True).expand_as(flat), atol=1e-6)
    assert float((flat - 0.5).abs().max()) <= 0.2 + 1e-6 and float(flat.std(0).max()) > 0.05
    # Without a shift and a hole a grey image's view is a line of its values, or of its mirror image.
    grey = x.mean(1, keepdim=True).expand(-1, 3, -1, -1) * 0.2 + 0.4
    still = view(grey, generator(), shift=0, hole=0)
    for before, after in zip(grey, still, strict=True):
        scores = [
            torch.corrcoef(torch.stack([b[0].flatten(), after[0].flatten()]))[0, 1] for b in (before, before.flip(2))
        ]
        assert max(scores) > 0.99


def test_training_brings_views_of_one_image_together_and_repeats_itself():
    x, held = patches(80), patches(32, "held")
    made = [build_module("views", x, width=8, anchors=64) for _ in range(2)]
    first, second = (view(held, torch.Generator().manual_seed(seed), 1, 1) for seed in (8, 9))

    @torch.no_grad()
    def loss(module) -> float:
        return float(view_loss(module.codes(torch.cat([first, second])).flatten(1), 0.2))

    before, losses = loss(made[0]), []
    settings = ViewsFit(steps=26, batch_size=16, rate=2e-3, warmup=2, shift=1, hole=1)
    for each in made:
        fit_views(each, x, settings, on_step=lambda _, value: losses.append(value))
    assert losses[0] == losses[1]
    assert loss(made[0]) < before - 0.1, (loss(made[0]), before)
    assert torch.equal(made[0].bank, made[1].bank)
    assert not any(weight.requires_grad for weight in made[0].encoder.parameters())
    assert made[0].codes(patches(2)).shape == (2, 8, 1, 1)


def test_the_attack_and_the_generator_climb_the_earlier_maps_too():
    x = patches(80)
    module = build_module("views-random", x, width=8, anchors=64)
    victims = patches(4, "victims")

    def moved(x_adv: Tensor) -> Tensor:
        return relation_value(module, Weights(0.0, 0.0, 0.0, near=5, far=8), smooth=0.0, levels=1.0)(x_adv, victims)

    attack = Relation(steps=4, near=5, far=8, levels=3.0, disperse=0.0)
    y = torch.zeros(4, dtype=torch.int64)
    found = attack.run(Oracle(module, surrogate=True), victims, y, BALL, check_model=False).x_adv
    noise = BALL.random_start(victims, Stream(1, "noise"), torch.arange(4))
    assert BALL.contains(found, victims).all()
    assert torch.equal(moved(victims), torch.zeros(4))
    assert (moved(found) > 1.5 * moved(noise)).all()


def test_bad_input_is_refused():
    x = patches(80)
    with pytest.raises(InputError, match="does not learn from views"):
        fit_views(build_module("views-random", x, width=8, anchors=64), x, ViewsFit(steps=1))
    with pytest.raises(InputError, match="give 3 x 32 x 32"):
        fit_views(build_module("views", x, width=8, anchors=64), x[:, :, :16], ViewsFit(steps=1))
    with pytest.raises(InputError, match="temperature"):
        ViewsFit(temperature=0.0)
