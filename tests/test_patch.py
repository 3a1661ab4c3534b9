"""Patches: placements that fit and arrive to the bit, the closed-form best on linear models, and honest budgets."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import Linear, generator
from torch import Tensor, nn

import maodun
from maodun.attacks.artifacts import load_attack, save_artifact
from maodun.attacks.universal.patch import Patch, train_patch
from maodun.attacks.universal.placement import Placement
from maodun.attacks.universal.training import UniversalFit
from maodun.core.errors import InputError, UnsupportedError
from maodun.core.oracle import Oracle
from maodun.core.streams import Stream
from maodun.core.threat import Threat
from maodun.core.verdict import judge

SHAPE = (3, 9, 12)
IDS = torch.arange(50)
STREAM = Stream(0, "test")
CLIMB = UniversalFit(epochs=12, batch_size=16, clip=math.inf, starts=1, rate=0.2)


def images(n: int = 50) -> Tensor:
    return 0.3 + 0.4 * Stream(0, "x").uniform(torch.arange(n), SHAPE)


def picture(side: int) -> Tensor:
    return Stream(0, "p").uniform(torch.zeros(1, dtype=torch.int64), (3, side, side))[0]


def linear(classes: int = 2) -> Linear:
    weight = torch.randn(classes, math.prod(SHAPE), generator=generator(0))
    return Linear(weight, -weight.sum(1) / 2).eval()


def test_a_still_patch_arrives_to_the_bit():
    x, patch = images(), picture(4)
    for at, corner in (((0.0, 0.0), (0, 0)), ((1.0, 1.0), (5, 8)), ((0.4, 0.5), (2, 4))):
        put = Placement(side=4, at=at).put(patch, x, STREAM, IDS)
        row, column = corner
        assert torch.equal(put[:, :, row : row + 4, column : column + 4], patch.expand(50, -1, -1, -1))
        changed = (put != x).any(1)
        changed[:, row : row + 4, column : column + 4] = False
        assert not changed.any()


def test_anywhere_means_every_place_where_it_fits():
    put = Placement(side=3).put(torch.ones(3, 3, 3), torch.zeros(3000, *SHAPE), STREAM, torch.arange(3000))
    assert (put.sum((1, 2, 3)) == 27).all()
    corners = put[:, 0].flatten(1).argmax(1)
    places = torch.bincount(corners, minlength=108).reshape(9, 12)
    assert (places[:7, :10] > 15).all() and places[7:].sum() == 0 and places[:, 10:].sum() == 0


@pytest.mark.parametrize("form", ["square", "circle"])
@pytest.mark.parametrize(
    ("scale", "rotation"), [((1.0, 1.0), 0.0), ((0.5, 1.5), 0.0), ((1.0, 1.0), 45.0), ((0.7, 1.2), 180.0)]
)
def test_it_covers_what_it_may_and_no_more(form, scale, rotation):
    placement = Placement(side=4, form=form, scale=scale, rotation=rotation)
    placement.check(SHAPE)
    ids = torch.arange(400)
    put = placement.put(torch.ones(3, 4, 4), torch.zeros(400, *SHAPE), STREAM, ids)
    assert torch.allclose(put, put.round(), atol=1e-5)
    covered = put[:, 0].round().sum((1, 2))
    assert covered.max() <= placement.pixels
    area = 16 * (1 if form == "square" else math.pi / 4) * sum(s**2 for s in scale) / 2
    assert abs(float(covered.mean()) / area - 1) < 0.15
    # It keeps off the border only as far as it must: every pixel is met by some draw.
    if form == "square":
        assert put[:, 0].amax(0)[1:-1, 1:-1].min() > 0.99


def test_scaling_and_turning_move_the_picture_as_they_should():
    patch, x = picture(3), torch.zeros(1, 3, 12, 12)
    double = Placement(side=3, scale=(2.0, 2.0), at=(0.0, 0.0)).put(patch, x, STREAM, IDS[:1])
    assert torch.allclose(double[0, :, 0, 0], patch[:, 0, 0], atol=1e-6)
    assert torch.allclose(double[0, :, 5, 5], patch[:, 2, 2], atol=1e-6)
    assert torch.allclose(double[0, :, 2:4, 2:4].mean((1, 2)), patch[:, 1, 1] * 0.5625 + 0.1875 * (
        patch[:, 0, 1] + patch[:, 2, 1] + patch[:, 1, 0] + patch[:, 1, 2]
    ) / 2 + 0.0625 * (patch[:, 0, 0] + patch[:, 0, 2] + patch[:, 2, 0] + patch[:, 2, 2]) / 4, atol=1e-5)  # fmt: skip
    black = torch.zeros(80, 3, 15, 15)
    turned = Placement(side=3, rotation=180.0, at=(0.5, 0.5)).put(patch, black, STREAM, torch.arange(80))
    assert (turned.flatten(2).sum((1, 2)) > 0).all()


def test_lighting_multiplies_and_adds_within_the_box():
    placement = Placement(side=3, lighting=0.3, at=(0.0, 0.0))
    put = placement.put(torch.full((3, 3, 3), 0.5), torch.zeros(200, *SHAPE), STREAM, torch.arange(200))[:, 0, 0, 0]
    assert 0.05 <= float(put.min()) < 0.2 and 0.8 < float(put.max()) <= 0.95
    lit = placement.put(torch.ones(3, 3, 3), torch.zeros(200, *SHAPE), STREAM, torch.arange(200))
    assert lit.max() <= 1.0


def test_a_placement_is_the_samples_own():
    placement = Placement(side=3, scale=(0.8, 1.3), rotation=30.0, lighting=0.2)
    x, patch = images(), picture(3)
    whole = placement.put(patch, x, STREAM, IDS, 4)
    order = torch.randperm(50, generator=generator(0))
    assert torch.equal(placement.put(patch, x[order], STREAM, IDS[order], 4), whole[order])
    parts = [placement.put(patch, a, STREAM, b, 4) for a, b in zip(x.split(7), IDS.split(7), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(placement.put(patch, x, STREAM, IDS, 5), whole)


@pytest.mark.parametrize("target", [None, 1])
def test_the_best_patch_on_a_linear_model_is_a_corner_of_the_box(target):
    model = linear()
    x = images()
    if target is None:  # All of one class, so that there is one way to go.
        x = x[model(x).argmax(1) == 0]
    y = model(x).argmax(1)
    patch = train_patch(Oracle(model), x, y, Placement(side=4, at=(1.0, 0.0)), CLIMB, target=target)
    gain = (model.weight[1] - model.weight[0]).reshape(SHAPE)[:, 5:9, :4]
    assert torch.equal(patch.tensors["patch"], (gain > 0).float())
    assert patch.eps == patch.entries == 48


def test_anywhere_on_a_model_that_knows_no_places():
    class Colour(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            score = (image * torch.tensor([1.0, -2.0, 0.5]).reshape(1, 3, 1, 1)).mean((1, 2, 3)) + 0.08
            return torch.stack([score, -score], 1)

    x = images()
    y = Colour()(x).argmax(1)
    placement = Placement(side=3, scale=(0.8, 1.2), rotation=25.0)
    patch = train_patch(Oracle(Colour()), x, y, placement, CLIMB, target=0)
    middle = patch.tensors["patch"][:, 1, 1]
    assert torch.equal(middle, torch.tensor([1.0, 0.0, 1.0]))


def test_it_is_an_attack_whose_budget_the_verdict_checks(tmp_path):
    model, x = linear(), images(120)
    y = model(x).argmax(1)
    placement = Placement(side=4, scale=(0.9, 1.1), rotation=10.0)
    patch = train_patch(Oracle(model), x[:60], y[:60], placement, UniversalFit(epochs=2, starts=1))
    path = save_artifact(patch, tmp_path / "patch.safetensors")
    again = load_attack(path)
    assert again == patch and again.scale == (0.9, 1.1) and again.at is None
    threat = Threat("l0", patch.entries)
    found = patch.run(Oracle(model), x[60:], y[60:], threat, ids=torch.arange(60) + 60)
    assert found.queries.max() <= 2 and found.found.any()
    verdict = judge(model, found.x_adv, x[60:], y[60:], threat)
    assert verdict.valid.all() and torch.equal(verdict.success, found.found)
    many = load_attack(path, draws=6).run(Oracle(model), x[60:], y[60:], threat, ids=torch.arange(60) + 60)
    assert (many.found | ~found.found).all() and many.found.sum() > found.found.sum()
    with pytest.raises(InputError, match=f"covers up to {patch.entries} entries and the threat allows 10"):
        patch.run(Oracle(model), x, y, Threat("l0", 10))
    with pytest.raises(UnsupportedError, match="does not search in linf"):
        patch.run(Oracle(model), x, y, Threat("linf", 0.5))
    summary = maodun.evaluate(model, (x, y), norm="l0", eps=patch.entries, attack=f"file:{path}", diagnostics=False)
    assert summary.robust.n == 120


def test_the_order_of_the_images_does_not_matter():
    model, x = linear(), images()
    y = model(x).argmax(1)
    fit, order = UniversalFit(epochs=1, batch_size=7, draws=2, starts=1), torch.randperm(50, generator=generator(1))
    placement = Placement(side=3, rotation=20.0, lighting=0.1)
    whole = train_patch(Oracle(model), x, y, placement, fit, ids=IDS)
    other = train_patch(Oracle(model, batch_size=3), x[order], y[order], placement, fit, ids=IDS[order])
    assert torch.allclose(whole.tensors["patch"], other.tensors["patch"], atol=1e-5)


def test_bad_input_is_refused_with_a_reason():
    model, x = linear(), images()
    y = model(x).argmax(1)
    for call, words in (
        (lambda: train_patch(Oracle(model), x, y, Placement(side=10)), "larger than the image of 9 x 12"),
        (lambda: train_patch(Oracle(model), x, y, Placement(side=9, rotation=5)), "larger than the image"),
        (lambda: train_patch(Oracle(model), x, y, Placement(side=6, scale=(1.0, 1.6))), "larger than the image"),
        (lambda: train_patch(Oracle(model), x.flatten(1), y, Placement(side=2)), "needs images"),
        (lambda: Placement(side=0), "is no patch"),
        (lambda: Placement(side=2, form="star"), "is not known"),
        (lambda: Placement(side=2, scale=(0.0, 1.0)), "range of factors"),
        (lambda: Placement(side=2, rotation=200), "no angle"),
        (lambda: Placement(side=2, lighting=2.0), "no share"),
        (lambda: Placement(side=2, at=(0.0, 2.0)), "no place"),
        (lambda: Patch(shape=SHAPE, eps=27, side=3, tensors={"patch": torch.zeros(1, 3, 3)}), "needs a tensor patch"),
        (lambda: Patch(shape=SHAPE, eps=27, side=3, draws=0, tensors={"patch": torch.zeros(3, 3, 3)}), "no candidate"),
    ):
        with pytest.raises(InputError, match=words):
            call()
