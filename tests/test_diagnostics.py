"""Diagnostics: each alarm rings for the fault it is about, and none rings for a healthy model."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Linear, Noisy, generator, linear
from torch import Tensor, nn

from maodun.arena import diagnostics
from maodun.arena.crosscheck import cross_check
from maodun.arena.laboratory import SUBSET, RandomNoise, everything
from maodun.arena.recipe import make_recipe
from maodun.arena.run import run
from maodun.arena.setup import Arena, prepare
from maodun.arena.summary import Finding
from maodun.attacks.artifacts import save_artifact
from maodun.attacks.universal.uap import UAP
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.zoo import Dataset
from maodun.zoo.data.base import make_dataset


def arena(model: nn.Module, data: Dataset, eps: float, out: str = "memory://diagnostics", **spear: Any) -> Arena:
    recipe = make_recipe(
        {
            "data": {"spec": "given"},
            "threats": [{"norm": "linf", "eps": eps}],
            "shields": [{"name": "shield", "model": "given:model"}],
            "spears": [{"attack": "pgd", **spear}],
        }
    )
    place = f"{out}/{uuid.uuid4().hex}"
    return prepare(recipe, place, models={"shield": model.eval()}, data=data)


def findings(model: nn.Module, data: Dataset, eps: float, **spear: Any) -> dict[str, Finding]:
    met = arena(model, data, eps, **spear)
    return {finding.name: finding for finding in diagnostics.diagnose(met, met.shields["shield"])}


def levels(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.level for name, finding in found.items()}


def given(x: Tensor, y: Tensor) -> Dataset:
    return make_dataset("given", "given", x.numpy(), y.numpy(), None)


def near(model: Linear, n: int) -> tuple[Tensor, Tensor]:
    """Inputs near the centre of the box, where the classes tie, so that small radii matter."""
    x = 0.4 + 0.2 * torch.rand(n, 1, 4, 6, generator=generator(1))
    with torch.no_grad():
        return x, model(x).argmax(1)


@pytest.fixture(scope="module")
def healthy() -> tuple[Linear, Dataset]:
    model = linear(classes=4)
    return model, given(*near(model, 80))


class Profile(nn.Module):
    """Two classes on the line: class 0 everywhere but where `score` (a function of the first entry) is positive."""

    def __init__(self, score: Any) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor) -> Tensor:
        value = self.score(x.flatten(1)[:, 0])
        return torch.stack([torch.zeros_like(value), value], dim=1)


def line(n: int = 64, spread: float = 0.0) -> Dataset:
    x = 0.5 + spread * (torch.arange(n) / n - 0.5)
    return given(x[:, None].clone(), torch.zeros(n, dtype=torch.long))


def tent(x: Tensor, peak: float, width: float) -> Tensor:
    """Rises with slope one to `width` at `peak` and falls after it; positive within `width` of it."""
    return width - (x - peak).abs()


def test_healthy_model_raises_no_alarm(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    found = findings(model, data, 0.02)
    assert set(levels(found).values()) <= {"ok", "note"}, found
    assert set(found) == {
        "zero_gradient", "eps_zero", "unconstrained", "monotone", "one_step", "black_box", "loss_gap",
        "logit_scale", "finite_differences", "unstable", "incomplete", "silent_success", "verdict", "cost",
    }  # fmt: skip


def test_healthy_noisy_model_raises_no_alarm(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    found = findings(Noisy(model, 0.005), data, 0.02, eot=4)
    assert set(levels(found).values()) <= {"ok", "note"}, found
    assert found["eot_agreement"].level == "ok"
    assert found["eps_zero"].level == "ok"


def test_cost_is_bounded_and_reported(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    met = arena(model, data, 0.02)
    lab = next(iter(diagnostics._laboratories(met, met.shields["shield"])))
    for check in diagnostics.LOOKS + diagnostics.TRIALS:
        check(lab)
    assert lab.n == SUBSET
    assert 0 < lab.forwards < SUBSET * 700
    assert 0 < lab.backwards < SUBSET * 400
    assert "forwards" in findings(model, data, 0.02)["cost"].sentence


class Rounded(nn.Module):
    """A linear model behind a quantiser: right, breakable, and without any gradient."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model((x * 200).round() / 200)
        return answer


def test_model_without_gradients(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    found = findings(Rounded(model), data, 0.03)
    assert found["zero_gradient"].level == "alarm"
    assert "bpda" in found["zero_gradient"].action
    assert found["black_box"].level == "alarm"


def test_the_long_trials_go_through_the_most_adaptive_estimator(healthy: tuple[Linear, Dataset]) -> None:
    class Partnered(Rounded):
        def bpda_partner(self, x: Tensor) -> Tensor:
            answer: Tensor = self.model(x)
            return answer

    model, data = healthy
    spears = [{"attack": "pgd"}, {"attack": "pgd", "gradient": "bpda", "eot": 8, "name": "adaptive"}]
    recipe = make_recipe(
        {
            "data": {"spec": "given"},
            "threats": [{"norm": "linf", "eps": 0.03}],
            "shields": [{"name": "shield", "model": "given:model"}],
            "spears": spears,
        }
    )
    met = prepare(recipe, "memory://diagnostics/adaptive", models={"shield": Partnered(model)}, data=data)
    found = diagnostics.diagnose(met, met.shields["shield"])
    where = {(finding.name, finding.spear): finding.level for finding in found}
    assert where["zero_gradient", "pgd"] == "alarm"
    assert where["zero_gradient", "adaptive"] == "ok"
    assert where["black_box", "adaptive"] in ("ok", "note")
    assert ("black_box", "pgd") not in where


class Saturated(nn.Module):
    """Logits so large that the softmax rounds to certainty, as after distillation at a high temperature."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.scale * self.model(x)
        return answer


def test_saturated_logits_hide_the_gradient_of_the_cross_entropy() -> None:
    # A strong threat and a model whose margins all exceed what float32's softmax can show.
    model = linear(classes=4)
    x, y = near(model, 64)
    with torch.no_grad():
        top = model(x).topk(2, dim=1).values
    sure = (top[:, 0] - top[:, 1]) > 0.1
    data = given(x[sure], y[sure])
    found = findings(Saturated(model, 20_000.0), data, 0.05)
    assert found["zero_gradient"].level == "alarm"
    assert "margin" in found["zero_gradient"].action
    assert found["loss_gap"].level == "alarm"
    assert found["logit_scale"].level == "alarm"
    assert found["eps_zero"].level == "ok"


def test_one_long_step_beats_many_short_ones() -> None:
    # A small hill hides the pass: climbing stops on it, a jump of the whole radius lands behind it.
    trap = Profile(lambda x: torch.maximum(0.5 * tent(x, 0.51, 0.02) - 0.02, 4 * (x - 0.5985).clamp(-0.02, 1)))
    found = findings(trap, line(), 0.1)
    assert found["one_step"].level == "alarm"


def test_larger_radius_that_helps_the_defence() -> None:
    # A window of 0.0055: steps of eps / 16 = 0.005 cannot miss it, steps of 0.01 miss it half of the time.
    window = Profile(lambda x: 10 * tent(x, 0.533, 0.00275))
    found = findings(window, line(spread=0.002), 0.08)
    assert found["monotone"].level == "alarm"


def test_what_cannot_be_reached_with_every_input_allowed() -> None:
    constant = Profile(lambda x: -1.0 - 0.1 * x)
    found = findings(constant, line(), 0.1)
    assert found["unconstrained"].level == "alarm"


class Tiring(nn.Module):
    """Forgets what it knows after some calls, so that repeating a question changes the answer."""

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.model, self.left = model, calls

    def forward(self, x: Tensor) -> Tensor:
        self.left -= 1
        answer: Tensor = self.model(x)
        return answer if self.left > 0 else answer.roll(1, dims=1)


def test_control_run_catches_a_verdict_that_is_not_repeatable(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    met = arena(Tiring(model, 12), data, 0.02)
    lab = next(iter(diagnostics._laboratories(met, met.shields["shield"])))
    assert diagnostics.eps_zero(lab).level == "alarm"


class Blinking(nn.Module):
    """The sign of the slope is drawn anew at every call: single gradients say nothing about the mean."""

    stochastic = True

    def forward(self, x: Tensor) -> Tensor:
        from maodun.core.context import noise

        flat = x.flatten(1)
        wild = 20 * (flat * noise(x, "blink").normal().flatten(1)).sum(1)
        value = 0.2 * (flat.mean(1) - 0.5) + wild - wild.detach()
        return torch.stack([value.new_full(value.shape, 0.0), value], dim=1)


def test_draws_that_disagree() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(64, 1, 4, 6, generator=generator)
    y = (x.flatten(1).mean(1) > 0.5).long()
    found = findings(Blinking(), given(x, y), 0.05, eot=2)
    assert found["eot_agreement"].level == "warning"
    assert "Raise eot above 2" in found["eot_agreement"].action


def test_every_finding_is_a_sentence_with_an_action(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    for finding in (*findings(Rounded(model), data, 0.03).values(), *findings(model, data, 0.02).values()):
        assert finding.sentence.endswith(".")
        assert finding.sentence.count(". ") == 0
        assert finding.level in ("ok", "note", "warning", "alarm")
        assert bool(finding.action) == (finding.level != "ok")


def test_findings_are_stored_and_made_once(tmp_path: Path, healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    met = arena(model, data, 0.02, out=str(tmp_path))
    place, recipe = met.store.location, met.recipe
    summary = run(recipe, place, progress="quiet", models={"shield": model}, data=data)
    assert summary.complete
    assert "eps_zero" in {finding.name for finding in summary.findings}
    run(recipe, place, progress="quiet", models={"shield": model}, data=data)
    assert sum(event["event"] == "diagnosed" for event in met.store.events()) == 1


def test_random_noise_stays_inside_and_counts_its_queries(healthy: tuple[Linear, Dataset]) -> None:
    model, data = healthy
    found = RandomNoise(draws=7).run(Oracle(model), data.x, data.y, Threat("linf", 0.01))
    assert float((found.x_adv - data.x).abs().max()) <= 0.01 + 1e-6
    assert int(found.queries.max()) == 8
    assert int(found.backwards.sum()) == 0


@pytest.mark.parametrize(("norm", "radius"), [("linf", 1.0), ("l2", 24**0.5), ("l1", 24.0), ("l0", 24.0)])
def test_everything_holds_the_whole_box(norm: str, radius: float) -> None:
    x = torch.rand(3, 1, 4, 6, generator=torch.Generator().manual_seed(0))
    threat = Threat(norm, everything(Threat(norm), x))
    assert threat.eps == pytest.approx(radius)
    assert torch.allclose(threat.project(1 - x.round(), x), 1 - x.round(), atol=1e-5)


def cell(name: str, success: list[int], **about: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    usual = {"shield": "s", "spear": name, "norm": "linf", "eps": 0.1, "targeted": False, "steps": 40}
    columns = {
        "sample_id": np.arange(len(success)),
        "success": np.array(success, bool),
        "status": np.array(["found" if hit else "exhausted_steps" for hit in success], dtype=object),
        "audited": np.zeros(len(success), bool),
        "overturned": np.zeros(len(success), bool),
    }
    return {**usual, "access": "gradient", **about}, columns


def test_the_best_of_several_must_win_by_more() -> None:
    expected = torch.zeros(64, dtype=torch.bool)
    suspect = expected.clone()
    suspect[:5] = True  # 5 against 0: p = 1/32
    assert diagnostics._suspicion(suspect, expected) == ("alarm", 5, 0)
    assert diagnostics._suspicion(suspect, expected, 4) == ("note", 5, 0)
    suspect[:8] = True
    assert diagnostics._suspicion(suspect, expected, 4) == ("alarm", 8, 0)


def test_records_themselves_raise_suspicions() -> None:
    weak, strong = [0] * 20, [1] * 20
    assert cross_check([cell("pgd", strong), cell("fgsm", weak, steps=1), cell("square", weak, access="scores")]) == []
    odd = cross_check([cell("pgd", weak), cell("fgsm", strong, steps=1), cell("square", strong, access="scores")])
    assert [(finding.name, finding.spear, finding.level) for finding in odd] == [
        ("one_step", "fgsm", "alarm"),
        ("black_box", "square", "alarm"),
    ]
    shrinking = cross_check([cell("pgd", weak, eps=0.2), cell("pgd", strong, eps=0.1)])
    assert [(finding.name, finding.level) for finding in shrinking] == [("monotone", "alarm")]
    assert cross_check([cell("pgd", weak), cell("fgsm", strong, steps=1, shield="other")]) == []
    about, columns = cell("pgd", weak)
    columns["status"][:5] = "zero_gradient"
    columns["status"][5] = "non_finite"
    columns["status"][6] = "exhausted_budget"
    found = cross_check([(about, columns)])
    assert [finding.name for finding in found] == ["zero_gradient", "non_finite", "budget"]


def test_an_audit_is_reported_with_what_it_overturned() -> None:
    about, columns = cell("sharp", [0] * 30 + [1] * 10)
    columns["audited"][[0, 1, 2, 35]] = True
    columns["overturned"][35] = True
    (finding,) = cross_check([(about, columns)])
    assert finding.name == "audit" and finding.level == "note"
    assert "Of 31 samples given up 4 were audited" in finding.sentence and "overturned 1 (25.0 %" in finding.sentence


@pytest.mark.parametrize(("split", "names"), [("train", ["seen_before"]), ("test", [])])
def test_a_trained_attack_on_its_own_training_images_is_named(split, names, tmp_path):
    x = 0.3 + 0.4 * torch.rand(20, 1, 4, 6, generator=generator(2))
    model = linear(3)
    data = make_dataset("given", "given", x.numpy(), model(x).argmax(1).numpy(), None)
    about = {"recipe": {"data": {"spec": "given", "split": "train"}}}
    uap = UAP(shape=(1, 4, 6), eps=0.1, tensors={"delta": torch.full((1, 4, 6), 0.1)}, about=about)
    file = save_artifact(uap, tmp_path / "uap.safetensors")
    recipe = make_recipe(
        {
            "data": {"spec": "given", "split": split},
            "threats": [{"norm": "linf", "eps": 0.1}],
            "shields": [{"name": "shield", "model": "given:model"}],
            "spears": [{"attack": f"file:{file}", "name": "mine"}],
        }
    )
    made = prepare(recipe, f"memory://diagnostics/{uuid.uuid4().hex}", models={"shield": model}, data=data)
    found = [each for each in diagnostics.diagnose(made, made.shields["shield"]) if each.name != "cost"]
    assert [each.name for each in found] == names
    assert all(each.spear == "mine" and "train split" in each.sentence for each in found)


def test_a_norm_without_trials_says_so_and_runs():
    x = 0.3 + 0.4 * torch.rand(20, 1, 4, 6, generator=generator(2))
    model = linear(3)
    data = make_dataset("given", "given", x.numpy(), model(x).argmax(1).numpy(), None)
    for norm, eps, attack in (("flow", 0.5, "stadv"), ("l0", 4, "fmn")):
        recipe = make_recipe(
            {
                "data": {"spec": "given"},
                "threats": [{"norm": norm, "eps": eps}],
                "shields": [{"name": "shield", "model": "given:model"}],
                "spears": [{"attack": attack}],
            }
        )
        made = prepare(recipe, f"memory://diagnostics/{uuid.uuid4().hex}", models={"shield": model}, data=data)
        found = {each.name: each for each in diagnostics.diagnose(made, made.shields["shield"])}
        assert set(found) == {"zero_gradient", "finite_differences", "trials", "cost"}
        assert norm in found["trials"].sentence and found["trials"].level == "note"
