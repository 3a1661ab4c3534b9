"""A network trained behind a defence: the weights are its own, the noise keyed, what cannot be is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from maodun.arena.train import train
from maodun.arena.train_defense import Keyed, right
from maodun.arena.train_recipe import TrainRecipe
from maodun.core.errors import InputError
from maodun.defenses import build_defense
from maodun.defenses.training import Standard
from maodun.defenses.training.objective import Batch
from maodun.zoo.architectures import build_architecture
from maodun.zoo.data import load_data


def recipe(**more: Any) -> TrainRecipe:
    return TrainRecipe.model_validate(
        {
            "name": "behind",
            "data": {"spec": "digits", "limit": 150},
            "architecture": "digits-cnn",
            "defense": {"name": "k_wta", "options": {"share": 0.1}},
            "fit": {"epochs": 2, "batch_size": 32, "rate": 0.05},
            "measure": {"limit": 100},
            "card": {"summary": "s", "provenance": "p", "data": "digits"},
            **more,
        }
    )


def test_the_weights_are_the_networks_and_the_numbers_those_of_the_defended(tmp_path: Path) -> None:
    made = train(recipe(), tmp_path)
    net = build_architecture("digits-cnn")
    net.load_state_dict(load_file(made.weights))
    test = load_data("digits", split="test", limit=100)
    shield = build_defense("k_wta", share=0.1).wrap(net).eval()
    assert made.card.measured[0].value == pytest.approx(float(right(shield, test.x, test.y, 0).float().mean()))
    with torch.no_grad():
        assert torch.equal(made.model(test.x), shield(test.x))
        # It has learnt to live with few winners: without the mask it is another network.
        assert not torch.allclose(net(test.x), shield(test.x), atol=1e-3)
    plain = train(recipe(defense=None, name="plain"), tmp_path)
    assert any(not torch.equal(value, load_file(plain.weights)[name]) for name, value in net.state_dict().items())


def test_a_random_defence_draws_by_seed_sample_and_step(tmp_path: Path) -> None:
    net = build_architecture("digits-cnn", seed=1)
    shield = build_defense("noise_layers", sigma=1.0).wrap(net)
    data = load_data("digits", limit=20)
    rows = torch.arange(20)

    def loss(order: torch.Tensor, step: int, seed: int = 0) -> float:
        batch = Batch(data.x[order], data.y[order], rows[order], step)
        return float(Keyed(Standard(), seed)(shield, batch))

    assert loss(rows, 3) == pytest.approx(loss(rows.flip(0), 3), rel=1e-5)
    assert loss(rows, 3) == loss(rows, 3)
    assert abs(loss(rows, 3) - loss(rows, 4)) > 1e-5
    assert abs(loss(rows, 3) - loss(rows, 3, seed=1)) > 1e-5
    random = recipe(defense={"name": "noise_layers"}, fit={"epochs": 1, "batch_size": 32})
    first = load_file(train(random, tmp_path / "a").weights)
    torch.rand(7)  # the default generator stands elsewhere now
    again = load_file(train(random, tmp_path / "b").weights)
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_an_inner_attack_meets_the_defence_too(tmp_path: Path) -> None:
    inner = {"options": {"steps": 1}, "eps": 0.1}
    more = {"data": {"spec": "digits", "limit": 60}, "fit": {"epochs": 1, "batch_size": 30}, "measure": {"limit": 20}}
    attacked = recipe(defense="noise_layers", objective={"kind": "adversarial", "inner": inner}, select=inner, **more)
    first = load_file(train(attacked, tmp_path / "a").weights)
    plain = load_file(train(recipe(defense="noise_layers", **more), tmp_path / "b").weights)
    again = load_file(train(attacked, tmp_path / "c").weights)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"defense": "k_vta"}, "there is none of that name"),
        ({"defense": {"name": "k_wta", "options": {"shares": 1}}}, "does not take it"),
        ({"defense": "max_softmax"}, "may refuse to answer"),
        ({"objective": {"kind": "distillation"}}, "two networks"),
        ({"fit": {"compile": "inductor"}}, "leave fit.compile out"),
        ({"objective": {"kind": "free", "inner": {"eps": 0.1}}}, "trains behind none"),
    ],
)
def test_what_cannot_be_is_refused_before_any_step(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        train(recipe(**change), tmp_path)
    assert not list(tmp_path.glob("*.ckpt"))
