"""Verdicts on models whose answer is known: a sound one holds, a masked one is named with its bound."""

from __future__ import annotations

import json
import shlex
import uuid

import pytest
import torch
from oracles import Linear, Noisy, generator, linear
from torch import Tensor, nn

from maodun.app.cli import run as command
from maodun.arena.diagnostics import Examination, examine
from maodun.arena.fallback import bare
from maodun.arena.indicators import agreement, jumps
from maodun.arena.laboratory import Laboratory
from maodun.arena.recipe import SpearSpec, make_recipe
from maodun.arena.remedies import Contrast, Double, StraightThrough
from maodun.arena.setup import Arena, prepare
from maodun.core.errors import InputError
from maodun.core.threat import Threat
from maodun.defenses import Defended, build_defense
from maodun.report.diagnosis import surface_svg
from maodun.zoo.data.base import make_dataset

EPS = 0.02


def arena(model: nn.Module, mode: bool | str = True, n: int = 40, **spear) -> Arena:
    base = linear(classes=2)
    x = 0.4 + 0.2 * torch.rand(n, 1, 4, 6, generator=generator(1))
    with torch.no_grad():
        y = base(x).argmax(1)
    recipe = make_recipe(
        {
            "data": {"spec": "given"},
            "threats": [{"norm": "linf", "eps": EPS}],
            "shields": [{"name": "shield", "model": "given:model"}],
            "spears": [{"attack": "pgd", **spear}],
            "diagnostics": mode,
        }
    )
    data = make_dataset("given", "given", x.numpy(), y.numpy(), None)
    return prepare(recipe, f"memory://diagnosis/{uuid.uuid4().hex}", models={"shield": model.eval()}, data=data)


def examined(model: nn.Module, mode: bool | str = True, **more) -> Examination:
    met = arena(model, mode, **more)
    return examine(met, met.shields["shield"])


def laboratory(model: nn.Module) -> Laboratory:
    met = arena(model)
    return Laboratory(met.shields["shield"], Threat("linf", EPS), met, SpearSpec(attack="pgd"), None)


class Around(nn.Module):
    """The linear model between two functions, of inputs and of logits."""

    def __init__(self, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = linear(classes=2), before, after

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.after(self.model(self.before(x)))
        return answer


def standing(model: Linear) -> int:
    """How many samples no attack in the ball can turn: linear, so in closed form."""
    met = arena(model)
    x, y = met.data.x, met.data.y
    with torch.no_grad():
        logits = model(x)
        weight = model.scale * model.weight
        gap = logits.gather(1, y[:, None]) - logits
        reach = (weight[None] - weight[y][:, None]).abs().sum(2) * EPS
        return int(((gap > reach) | (torch.arange(2) == y[:, None])).all(1).sum())


@pytest.mark.parametrize("mode", [True, "thorough"])
def test_a_sound_model_holds_at_its_exact_number(mode) -> None:
    (diagnosis,) = examined(linear(classes=2), mode).diagnoses
    assert diagnosis.verdict == "holds"
    assert diagnosis.plain.value == diagnosis.bound.value == standing(linear(classes=2)) / 40
    assert diagnosis.action == ""
    assert len(diagnosis.trials) == (3 if mode is True else 8)


def test_a_sound_noisy_model_holds() -> None:
    (diagnosis,) = examined(Noisy(linear(classes=2), 0.005), eot=4).diagnoses
    assert diagnosis.verdict == "holds"


MASKS = {
    "large logits": Around(after=lambda z: 20_000 * z),
    "rounded inputs": Around(before=lambda x: (200 * x).round() / 200),
    "saturated logits": Around(after=lambda z: torch.tanh(60 * (z - z.mean(1, keepdim=True)))),
    "broken graph": Around(before=lambda x: x.detach().clone()),
}


@pytest.mark.parametrize("name", ["large logits", "broken graph"])
def test_a_masked_model_is_named_with_both_numbers(name) -> None:
    found = examined(MASKS[name])
    (diagnosis,) = found.diagnoses
    told = next(finding for finding in found.findings if finding.name == "verdict")
    assert diagnosis.verdict == "masked" and told.level == "alarm"
    assert "the real number is at most" in diagnosis.sentence and diagnosis.action
    assert diagnosis.plain.value > diagnosis.bound.value + 0.2
    # A query attack of a small budget leaves some samples more than the linear truth.
    slack = 12 if name == "broken graph" else 2
    assert diagnosis.bound.value * 40 <= standing(linear(classes=2)) + slack


def test_each_remedy_mends_its_fault() -> None:
    diagnoses = {name: examined(MASKS[name]).diagnoses[0] for name in ("rounded inputs", "saturated logits")}
    assert [each.verdict for each in diagnoses.values()] == ["masked", "masked"]
    by_name = {name: {trial.name: trial for trial in each.trials} for name, each in diagnoses.items()}
    assert by_name["rounded inputs"]["straight through"].p < 0.01
    assert by_name["rounded inputs"]["margin"].only == 0
    assert by_name["saturated logits"]["float64"].p < 0.01
    assert by_name["saturated logits"]["margin"].p > 0.01
    assert "straight through" not in by_name["saturated logits"]


def test_what_no_attack_reaches_is_not_shown_to_hold() -> None:
    """A constant answer with the labels it always gives: nothing falls with every input allowed, and that is odd."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([1 + 0.01 * x.flatten(1).mean(1), torch.zeros(x.shape[0])], dim=1)

    x = torch.rand(40, 1, 4, 6, generator=generator(1))
    recipe = make_recipe(
        {
            "data": {"spec": "given"},
            "threats": [{"norm": "linf", "eps": 0.1}],
            "shields": [{"name": "shield", "model": "given:model"}],
            "spears": [{"attack": "pgd"}],
        }
    )
    data = make_dataset("given", "given", x.numpy(), torch.zeros(40, dtype=torch.long).numpy(), None)
    met = prepare(recipe, f"memory://diagnosis/{uuid.uuid4().hex}", models={"shield": Constant()}, data=data)
    (diagnosis,) = examine(met, met.shields["shield"]).diagnoses
    assert diagnosis.verdict == "not shown"
    assert "unconstrained" in diagnosis.sentence and diagnosis.action


def test_finite_differences_agree_exactly_on_a_line_and_never_on_a_lie() -> None:
    shares = [share for _, share in agreement(laboratory(linear(classes=2)))]
    assert min(shares) == 1.0

    class Lying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = linear(classes=2)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.model(x.detach()) - 0.5 * (self.model(x) - self.model(x).detach())
            return answer

    assert max(share for _, share in agreement(laboratory(Lying()))) == 0.0
    found = {finding.name: finding for finding in examined(Lying()).findings}
    assert found["finite_differences"].level == "alarm"


def test_an_answer_that_jumps_is_searched_by_values_and_from_other_starts() -> None:
    def sawtooth(z: Tensor, width: float = 0.01) -> Tensor:
        """Let the margin fall on every tooth and rise from tooth to tooth: a true slope of no use."""
        lead = z[:, 0] - z[:, 1]
        return torch.stack([lead - 1.5 * (lead - width * (lead / width).detach().floor()), torch.zeros_like(lead)], 1)

    toothed = Around(after=sawtooth)
    shares = agreement(laboratory(toothed))
    assert shares[0][1] > 0.6 and shares[-1][1] < 0.2
    assert jumps(laboratory(toothed)) and not jumps(laboratory(linear(classes=2)))
    found = examined(toothed)
    (diagnosis,) = found.diagnoses
    trials = {each.name: each for each in diagnosis.trials}
    assert diagnosis.verdict == "masked"
    assert trials["long square"].standing.value <= trials["square"].standing.value < diagnosis.plain.value
    assert "restarts" in trials
    # Nearly as many fall as of the model without the teeth.
    assert round(40 * diagnosis.bound.value) <= standing(toothed.model) + 2
    told = next(finding for finding in found.findings if finding.name == "finite_differences")
    assert told.level == "note" and "square with 2000 queries" in told.action


def test_wrappers_keep_the_values() -> None:
    x = torch.rand(5, 1, 4, 6, generator=generator(3))
    model = Around(before=lambda x: (20 * x).round() / 20)
    through = StraightThrough(model)
    probe = x.clone().requires_grad_(True)
    assert torch.equal(through(probe), model(x)) and through.hits == 1
    assert bool(torch.autograd.grad(through(probe)[:, 0].sum(), probe)[0].any())
    assert torch.allclose(Double(model)(x).float(), model(x), atol=1e-4)
    assert torch.equal(Contrast(model, 1.0)(x), model(x))
    classifier = linear(classes=2)
    assert bare(Defended(build_defense("bit_depth"), classifier)) is classifier
    assert bare(classifier) is None


def test_float64_finds_a_direction_that_float32_loses() -> None:
    model = Around(after=lambda z: 1e-30 * torch.tanh(1e-18 * z))
    x = torch.rand(5, 1, 4, 6, generator=generator(3)).requires_grad_(True)
    (lost,) = torch.autograd.grad(model(x)[:, 0].sum(), x)
    (kept,) = torch.autograd.grad(Double(model)(x)[:, 0].sum(), x)
    assert not bool(lost.any())
    want = linear(classes=2).weight[0].sign().expand(5, -1)
    assert torch.equal(kept.flatten(1).sign(), want)


def test_the_slice_is_drawn() -> None:
    surface = examined(linear(classes=2)).diagnoses[0].surface
    assert len(surface.places) == 21 and len(surface.margins) == 21 == len(surface.margins[0])
    # Margins rise towards the mistake along the gradient's steepest direction.
    middle = [row[10] for row in surface.margins]
    assert middle == sorted(middle)
    drawn = surface_svg(surface)
    assert drawn.count("<rect") == 21 * 21 + 1 and "NaN" not in drawn


def test_the_command_prints_a_verdict_and_writes_a_page(tmp_path, capsys) -> None:
    words = ["diagnose", "zoo:digits-cnn-distilled-t100", "--data", "digits", "--eps", "0.15", "--limit", "24"]
    words += ["--seed", "3"]
    assert command([*words, "--out", str(tmp_path), "--progress", "quiet"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Masked:" in printed and "all together" in printed
    page = (tmp_path / "report.html").read_text()
    assert "Is it real?" in page and "up the gradient" in page
    # The line that the run keeps is the line that made it: what is missing in it would be another run.
    kept = shlex.split(json.loads((tmp_path / "manifest.json").read_text())["command"])
    assert all(flag in kept for flag in words) and kept[kept.index("--seed") + 1] == "3"
    assert command([*words[:4], "--eps", "0.15", "--norm", "l0", "--out", str(tmp_path / "no")]) == 2


def test_a_stack_is_diagnosed_and_a_radius_of_nothing_is_not(maodun, tmp_path, monkeypatch) -> None:
    words = ("diagnose", "zoo:digits-cnn", "--data", "digits", "--limit", "8", "--out", tmp_path)
    for eps, complaint in (("0", "nothing to change"), ("0.1,0.2", "several radii"), ("x", "not a number")):
        assert complaint in maodun(*words, "--eps", eps).error

    def stop(recipe, out, *, command, device):
        raise InputError(recipe.shields[0].label, command, "enough seen")

    monkeypatch.setattr("maodun.arena.setup.prepare", stop)
    line = maodun(*words, "--eps", "0.05", "--defense", "bit_depth:bits=3,gaussian:sigma=0.5").error
    assert "zoo:digits-cnn + bit_depth + gaussian" in line
    assert "--defense bit_depth:bits=3,gaussian:sigma=0.5" in line
