"""The six small families: shapes, sizes, and weights that lie in the checkout and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from maodun.core.errors import InputError
from maodun.zoo import cards, load_data, load_model
from maodun.zoo.architectures import build_architecture
from maodun.zoo.cards import all_cards, checkout

FAMILIES = ("vgg", "inception", "densenet", "mobilenet", "cct", "convmixer")
CHECKOUT = [card for card in all_cards() if card.kind == "checkout" and card.name.startswith("cifar10")]


@pytest.mark.parametrize("family", FAMILIES)
def test_each_is_small_normalises_inside_and_learns_from_its_seed(family):
    model = build_architecture(f"{family}-small", {"num_classes": 7}, seed=3).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) <= 200_000
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    logits = model(x)
    assert logits.shape == (3, 7)
    twin = build_architecture(f"{family}-small", {"num_classes": 7}, seed=3).eval()
    assert torch.equal(twin(x), logits)
    # A sample's answer is its own.
    assert torch.allclose(model(x[1:2]), logits[1:2], atol=1e-5)
    x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(x).square().sum(), x)
    assert (gradient.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_number_of_channels_is_an_error_not_a_broadcast(family):
    with pytest.raises(InputError, match="have 1 channels where the model takes 3"):
        build_architecture(f"{family}-small").eval()(torch.rand(1, 1, 32, 32))


@pytest.mark.parametrize("card", CHECKOUT, ids=lambda card: card.name)
def test_weights_of_the_checkout_load_in_half_the_bytes(card):
    if checkout() is None:
        pytest.skip("this package is installed without its repository")
    loaded = load_model(card.spec)
    assert loaded.card == card
    parameters = list(loaded.model.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    assert sum(parameter.numel() for parameter in parameters) == card.parameters <= 200_000
    assert card.path().stat().st_size < 2.3 * card.parameters + 20_000
    assert Path(__file__).parents[1].joinpath(str(card.recipe)).is_file()
    assert card.measured[0].n == 10_000


def test_all_of_them_stay_under_four_megabytes():
    assert sum(card.path().stat().st_size for card in all_cards() if card.kind == "checkout") < 4_000_000


def test_outside_a_checkout_the_error_says_what_to_do(monkeypatch):
    card = CHECKOUT[0]
    monkeypatch.setattr(cards, "checkout", lambda: None)
    assert not card.available
    with pytest.raises(InputError, match=r"without it; install from a checkout .* maodun train recipes/train"):
        load_model(card.spec)


@pytest.mark.parametrize("card", CHECKOUT, ids=lambda card: card.name)
def test_the_accuracy_on_the_card_holds(card, real_data):
    data = load_data("cifar10", limit=400)
    model = load_model(card.spec).model
    with torch.no_grad():
        right = (model(data.x).argmax(1) == data.y).float().mean()
    # 400 of the 10,000 samples the card was measured on: four standard errors.
    assert abs(float(right) - card.measured[0].value) < 0.09
