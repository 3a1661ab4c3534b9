"""Objectives in recipes: each name trains, resumes to the same weights, and refuses what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maodun.arena.objectives import ObjectiveSpec, build_objective
from maodun.core.errors import InputError
from maodun.defenses.training import ACE, AWP, DKL, UAD, FitSettings, Free, NoisyFGSM, fit
from maodun.zoo.architectures import build_architecture

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(48, 1, 8, 8, generator=GENERATOR)
Y = (X[:, 0, :4].mean((1, 2)) > X[:, 0, 4:].mean((1, 2))).long()
INNER = {"attack": "pgd", "options": {"steps": 2}, "eps": 0.05}

SPECS: dict[str, dict[str, Any]] = {
    "adversarial": {"kind": "adversarial"},
    "mixed": {"kind": "mixed", "inner": {**INNER, "attack": "fgsm", "options": {}}, "options": {"alpha": 0.4}},
    "n-fgsm": {"kind": "adversarial", "inner": {**INNER, "attack": "n-fgsm", "options": {"noise": 1.5}}},
    "free": {"kind": "free", "options": {"replays": 3}},
    "trades": {"kind": "trades", "inner": {**INNER, "options": {"steps": 2, "loss": "kl"}}, "options": {"beta": 3.0}},
    "mart": {"kind": "mart"},
    "score": {"kind": "score", "inner": {**INNER, "options": {"steps": 2, "loss": "square"}}},
    "dkl": {"kind": "dkl"},
    "ikl": {"kind": "ikl", "awp": {"gamma": 0.01}},
    "uad": {"kind": "adversarial", "uad": {"gamma": 0.5, "layer": "conv2"}},
    "uad trades awp": {"kind": "trades", "uad": {"gamma": 0.0}, "awp": {"gamma": 0.005, "warmup": 1}},
    "ace": {"kind": "mart", "ace": {"weight": 0.2, "form": "complement", "warmup": 1}},
}


def spec(name: str) -> ObjectiveSpec:
    return ObjectiveSpec.model_validate({"inner": INNER, **SPECS[name]})


def trained(name: str, checkpoint: Path | None = None, stop: bool = False) -> nn.Module:
    model = build_architecture("digits-cnn", {}, seed=0)
    objective = build_objective(spec(name), seed=3, per_epoch=3, epochs=2)

    def after(line: dict[str, float]) -> None:
        if stop and line["epoch"] == 0:
            raise KeyboardInterrupt

    fit(
        model, X, Y, objective, FitSettings(epochs=2, batch_size=16, rate=0.05), validate=lambda _: 0.0,
        checkpoint=checkpoint, on_epoch=after,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("name", SPECS)
def test_trains_and_resumes_to_the_same_weights(name: str, tmp_path: Path) -> None:
    spec(name).check("recipe")
    whole = trained(name)
    with pytest.raises(KeyboardInterrupt):
        trained(name, tmp_path / "run.ckpt", stop=True)
    resumed = trained(name, tmp_path / "run.ckpt")
    before = build_architecture("digits-cnn", {}, seed=0)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(a, b) for a, b in zip(whole.parameters(), before.parameters(), strict=True))
    assert all(parameter.requires_grad for parameter in whole.parameters())


def test_words_become_the_objects_they_name() -> None:
    built = {name: build_objective(spec(name), seed=0, per_epoch=5, epochs=2) for name in SPECS}
    assert isinstance(built["free"], Free)
    assert built["free"].replays == 3
    ikl = built["ikl"]
    assert isinstance(ikl, AWP)
    assert isinstance(ikl.base, DKL)
    assert ikl.base.improved
    both = built["uad trades awp"]
    assert isinstance(both, AWP)
    assert both.warmup == 5
    assert isinstance(both.base, UAD)
    ace = built["ace"]
    assert isinstance(ace, ACE)
    assert (ace.weight, ace.form, ace.warmup) == (0.2, "complement", 5)
    noisy = built["n-fgsm"]
    assert isinstance(noisy.attack, NoisyFGSM)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"kind": "trades"}, "no inner attack"),
        ({"kind": "standard", "awp": {}}, "do not extend 'standard'"),
        ({"kind": "mart", "inner": INNER, "uad": {}, "ace": {}}, "keep one"),
        ({"kind": "trades", "inner": INNER, "options": {"betta": 3}}, "did you mean 'beta'"),
        ({"kind": "standard", "options": {"beta": 3}}, "leave it out"),
    ],
)
def test_what_does_not_fit_is_refused(content: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ObjectiveSpec.model_validate(content).check("recipe 'x.yaml'")


def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path: Path) -> None:
    model = build_architecture("digits-cnn", {}, seed=0)
    settings = FitSettings(epochs=3, batch_size=16)
    file = tmp_path / "run.ckpt"

    def objective(network: nn.Module, batch: Any) -> torch.Tensor:
        value = network(batch.x).square().mean()
        return value * float("nan") if batch.step == 4 else value

    with pytest.raises(InputError, match="epoch 1, step 4: the loss is nan"):
        fit(model, X, Y, objective, settings, validate=lambda _: 0.0, checkpoint=file)
    kept = torch.load(file, weights_only=True)
    assert len(kept["history"]) == 1
    assert all(torch.isfinite(value).all() for value in kept["model"].values())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
