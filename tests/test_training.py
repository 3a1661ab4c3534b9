"""Training: the loop repeats itself and survives a stop; crafting is in evaluation mode; distillation only blinds."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from maodun.arena.objectives import build_objective
from maodun.arena.text_recipe import trains_text
from maodun.arena.train import begin_as, train
from maodun.arena.train_recipe import load_train_recipe, trains_attack
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.oracle import Oracle
from maodun.core.threat import Threat
from maodun.defenses.training import (
    AdversarialTraining,
    Batch,
    Distillation,
    FitSettings,
    Inner,
    ShiftFlip,
    Standard,
    fit,
    soft_labels,
    split_holdout,
)
from maodun.zoo import load_data, load_model
from maodun.zoo.architectures import build_architecture, initialise

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(60, 4, generator=GENERATOR)
Y = (X[:, 0] > 0.5).long() + (X[:, 1] > 0.5).long()


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    initialise(model, 0)
    return model


def accuracy(model: nn.Module) -> float:
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        return float((model(X).argmax(1) == Y).float().mean())


def run(
    settings: FitSettings, checkpoint: Path | None = None, seed: int = 0, stop_after: int | None = None
) -> nn.Module:
    model = network()

    def stop(line: dict[str, float]) -> None:
        if stop_after is not None and line["epoch"] + 1 == stop_after:
            raise KeyboardInterrupt

    fit(model, X, Y, Standard(), settings, validate=accuracy, seed=seed, checkpoint=checkpoint, on_epoch=stop)
    return model


def equal(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class TestLoop:
    settings = FitSettings(epochs=6, batch_size=16, rate=0.1, average=0.9)

    def test_learns_and_repeats_itself_and_leaves_the_global_generator_alone(self) -> None:
        first, again = run(self.settings), run(self.settings)
        assert equal(first, again)
        assert not equal(first, run(self.settings, seed=1))
        model = network()
        before = torch.random.get_rng_state()
        fit(model, X, Y, Standard(), self.settings, validate=accuracy)
        assert torch.equal(before, torch.random.get_rng_state())
        assert accuracy(first) > accuracy(network().eval()) + 0.2

    def test_convolutions_are_laid_out_for_the_run_only_and_take_the_same_steps(self) -> None:
        x, y, seen = torch.rand(12, 2, 6, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3, []

        class Spy(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                seen.append(self.weight.is_contiguous(memory_format=torch.channels_last))
                return super().forward(x)

        model = nn.Sequential(Spy(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3))
        initialise(model, 0)
        twin = copy.deepcopy(model)
        settings = FitSettings(epochs=1, batch_size=12, momentum=0.0, decay=0.0, rate=0.1, warmup=0.0)
        fit(model, x, y, Standard(), settings, validate=lambda _: 0.0)
        assert all(seen)
        assert model[0].weight.is_contiguous()
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        rate = settings.rate_at(0.0)
        nn.functional.cross_entropy(twin.train()(x[order]), y[order]).backward()
        for (name, new), old in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(new, old - rate * old.grad, atol=1e-6), name

    @pytest.mark.parametrize("after", [1, 4])
    def test_a_stopped_run_continues_to_the_same_weights(self, tmp_path: Path, after: int) -> None:
        checkpoint = tmp_path / "run.ckpt"
        with pytest.raises(KeyboardInterrupt):
            run(self.settings, checkpoint, stop_after=after)
        assert checkpoint.exists()
        assert equal(run(self.settings, checkpoint), run(self.settings))
        assert not list(tmp_path.glob("*.part"))

    def test_a_last_batch_of_one_goes_with_the_one_before_it(self) -> None:
        steps: list[tuple[int, int]] = []
        for size in (59, 30, 60, 7):
            model = network()  # its batch norm refuses a single sample
            fit(
                model, X, Y, Standard(), FitSettings(epochs=1, batch_size=size, rate=0.1), validate=accuracy,
                on_step=lambda done, count: steps.append((done, count)),
            )  # fmt: skip
        assert [each for each in steps if each[0] == each[1]] == [(1, 1), (2, 2), (1, 1), (9, 9)]

    def test_dropout_belongs_to_the_step_and_not_to_torchs_own_generator(self, tmp_path: Path) -> None:
        def train(name: str, stop_after: int = 0) -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
            initialise(model, 0)

            def stop(line: dict[str, float]) -> None:
                torch.rand(5)  # whatever else draws in this process changes nothing
                if line["epoch"] + 1 == stop_after:
                    raise KeyboardInterrupt

            fit(
                model, X, Y, Standard(), self.settings, validate=accuracy, checkpoint=tmp_path / name, on_epoch=stop
            )  # fmt: skip
            return model

        whole = train("a")
        with pytest.raises(KeyboardInterrupt):
            train("b", stop_after=2)
        assert equal(train("b"), whole)

    def test_a_checkpoint_of_other_settings_is_refused(self, tmp_path: Path) -> None:
        run(self.settings, tmp_path / "run.ckpt")
        with pytest.raises(InputError, match="other settings"):
            run(FitSettings(epochs=7), tmp_path / "run.ckpt")

    def test_the_best_epoch_is_kept(self) -> None:
        scores = iter([0.1, 0.9, 0.2, 0.3])
        kept: list[dict[str, Tensor]] = []

        def validate(model: nn.Module) -> float:
            kept.append({name: value.clone() for name, value in model.state_dict().items()})
            return next(scores)

        model = network()
        report = fit(model, X, Y, Standard(), FitSettings(epochs=4, batch_size=16), validate=validate)
        assert report.best_epoch == 1
        assert report.score == 0.9
        assert all(torch.equal(value, kept[1][name]) for name, value in model.state_dict().items())
        assert not model.training

    def test_a_loss_that_is_not_finite_stops_the_run(self) -> None:
        def broken(model: nn.Module, batch: Batch) -> Tensor:
            return model(batch.x).sum() * math.nan

        with pytest.raises(InputError, match="the loss is nan; lower the rate"):
            fit(network(), X, Y, broken, FitSettings(epochs=1), validate=accuracy)


def test_holdout_is_stratified_disjoint_and_fixed() -> None:
    y = torch.arange(3).repeat_interleave(torch.tensor([20, 40, 60]))
    kept, held = split_holdout(y, 0.1, 7)
    assert y[held].bincount().tolist() == [2, 4, 6]
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(120))
    assert torch.equal(held, split_holdout(y, 0.1, 7)[1])
    assert not torch.equal(held, split_holdout(y, 0.1, 8)[1])
    with pytest.raises(InputError, match="validation share"):
        split_holdout(y, 1.0, 0)


class TestAugmentation:
    def test_a_shift_moves_whole_pixels_and_belongs_to_the_sample(self) -> None:
        x = torch.zeros(30, 1, 7, 7)
        x[:, :, 3, 3] = 1.0
        rows = torch.arange(30)
        out = ShiftFlip(2)(x, rows, epoch=0, seed=0)
        assert torch.equal(out.sum((1, 2, 3)), torch.ones(30))
        places = {tuple(image[0].nonzero()[0].tolist()) for image in out}
        assert places <= {(top, left) for top in range(1, 6) for left in range(1, 6)}
        assert len(places) > 8
        assert torch.equal(ShiftFlip(2)(x[5:6], rows[5:6], epoch=0, seed=0), out[5:6])
        assert not torch.equal(ShiftFlip(2)(x, rows, epoch=1, seed=0), out)

    def test_a_flip_mirrors_about_half(self) -> None:
        x = torch.rand(200, 3, 4, 5, generator=torch.Generator().manual_seed(1))
        out = ShiftFlip(0, flip=True)(x, torch.arange(200), epoch=0, seed=0)
        mirrored = (out == x.flip(3)).flatten(1).all(1)
        assert ((out == x).flatten(1).all(1) ^ mirrored).all()
        assert 70 <= int(mirrored.sum()) <= 130


class TestAdversarialTraining:
    threat = Threat("linf", 0.1)

    def test_crafting_sees_evaluation_mode_and_training_sees_train_mode(self) -> None:
        model = network().train()
        model[1].eval()  # a frozen norm must come back frozen
        seen: list[bool] = []
        model.register_forward_pre_hook(lambda module, _: seen.append(module[2].training))
        before = model[1].running_mean.clone()
        attack = Inner(build_attack("pgd", steps=2), self.threat)
        AdversarialTraining(attack)(model, Batch(X, Y, torch.arange(60), 0)).backward()
        assert seen == [False, False, True]
        assert [module.training for module in model] == [True, False, True, True]
        assert torch.equal(before, model[1].running_mean)
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_the_last_iterate_is_returned_even_where_it_does_not_fool(self) -> None:
        model = network().eval()
        with torch.no_grad():
            labels = model(X).argmax(1)  # right everywhere, and at this radius hardly ever fooled
        batch = Batch(X, labels, torch.arange(60), 0)
        found = Inner(build_attack("pgd", steps=3), Threat("linf", 1e-3))(model, batch)
        moved = (found - X).flatten(1).abs().amax(1)
        assert float(moved.max()) <= 1e-3 + 1e-6
        assert int((moved > 0).sum()) == 60
        with torch.no_grad():
            before, after = (nn.functional.cross_entropy(model(x), labels) for x in (X, found))
        assert after > before

    @pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd", "mifgsm", "spsa"])
    def test_every_attack_in_a_ball_raises_the_loss_on_every_sample(self, name: str) -> None:
        model = network().eval()
        with torch.no_grad():
            labels = model(X).argmax(1)
        options = {} if name == "fgsm" else {"steps": 3}
        found = Inner(build_attack(name, **options), Threat("linf", 0.01))(model, Batch(X, labels, torch.arange(60), 0))
        with torch.no_grad():
            before, after = (nn.functional.cross_entropy(model(x), labels, reduction="none") for x in (X, found))
        assert float((after > before).double().mean()) > 0.9

    def test_the_best_of_all_runs_is_handed_over(self) -> None:
        model = network().eval()
        batch = Batch(X, Y, torch.arange(60), 0)
        losses = []
        for restarts in (1, 5):
            found = Inner(build_attack("apgd", steps=2, restarts=restarts), self.threat)(model, batch)
            with torch.no_grad():
                losses.append(nn.functional.cross_entropy(model(found), Y, reduction="none"))
        assert float((losses[1] - losses[0]).min()) > -1e-5
        assert losses[1].mean() > losses[0].mean()

    @pytest.mark.parametrize("name", ["autoattack", "autoattack-rand", "deepfool", "fab"])
    def test_a_search_that_stops_at_the_first_success_is_refused(self, name: str) -> None:
        with pytest.raises(InputError, match=f"inner attack '{name}'"):
            Inner(build_attack(name), self.threat)

    def test_the_radius_grows_over_the_ramp(self) -> None:
        model = network().eval()
        attack = Inner(build_attack("pgd", steps=3), self.threat, ramp=10)
        reach = [float((attack(model, Batch(X, Y, torch.arange(60), step)) - X).abs().max()) for step in (0, 4, 9, 50)]
        assert reach == pytest.approx([0.01, 0.05, 0.1, 0.1], rel=1e-3)

    def test_starts_depend_on_step_and_row_only(self) -> None:
        model = network().eval()
        attack = Inner(build_attack("pgd", steps=1), self.threat)
        whole = attack(model, Batch(X, Y, torch.arange(60), 3))
        part = attack(model, Batch(X[20:30], Y[20:30], torch.arange(20, 30), 3))
        assert torch.allclose(whole[20:30], part, atol=1e-6)
        assert not torch.allclose(whole, attack(model, Batch(X, Y, torch.arange(60), 4)))

    def test_shipped_weights_resist_where_the_plain_ones_do_not(self) -> None:
        data = load_data("digits", limit=300)
        robust = {}
        for name in ("digits-cnn", "digits-cnn-at"):
            oracle = Oracle(load_model(f"zoo:{name}").model)
            found = build_attack("pgd", steps=20).run(oracle, data.x, data.y, Threat("linf", 0.15)).found
            robust[name] = 1 - float(found.float().mean())
        assert robust["digits-cnn"] < 0.1
        assert robust["digits-cnn-at"] > 0.55


class TestDistillation:
    def test_loss_at_a_temperature_is_that_of_divided_logits(self) -> None:
        model = network().eval()
        batch = Batch(X, Y, torch.arange(60), 0)
        with torch.no_grad():
            expected = 20 * nn.functional.cross_entropy(model(X) / 20, Y)
            assert torch.allclose(Distillation(20.0)(model, batch), expected)
            soft = soft_labels(model, X, 20.0)
            assert torch.allclose(soft.sum(1), torch.ones(60))
            own = Distillation(20.0, soft)(model, Batch(X[5:9], Y[5:9], torch.arange(5, 9), 0))
        # Cross-entropy with one's own answers is their entropy.
        assert torch.allclose(own, -20 * (soft[5:9] * soft[5:9].log()).sum(1).mean(), atol=1e-5)
        with pytest.raises(InputError, match="temperature 0"):
            Distillation(0.0)

    def test_shipped_students_have_logits_larger_by_the_temperature(self) -> None:
        data = load_data("digits")
        size = {}
        for temperature in (1, 20, 100):
            with torch.no_grad():
                size[temperature] = float(load_model(f"zoo:digits-cnn-distilled-t{temperature}").model(data.x).std())
        assert 10 < size[20] / size[1] < 40
        assert 50 < size[100] / size[1] < 200

    def test_the_mask_blinds_cross_entropy_and_not_margins(self) -> None:
        data = load_data("digits", limit=300)
        oracle = Oracle(load_model("zoo:digits-cnn-distilled-t100").model)
        robust = {
            loss: 1
            - float(
                build_attack("pgd", loss=loss, steps=20)
                .run(oracle, data.x, data.y, Threat("linf", 0.15))
                .found.float()
                .mean()
            )
            for loss in ("ce", "margin")
        }
        assert robust["ce"] > 0.7
        assert robust["margin"] < 0.1


class TestRecipes:
    text = """
name: tiny
data: {spec: digits, limit: 120, validation: 0.2}
architecture: digits-cnn
objective: {kind: KIND}
augment: {shift: 1}
fit: {epochs: 2, batch_size: 40}
measure: {limit: 50, inner: {attack: pgd, options: {steps: 2}, norm: linf, eps: 0.1}}
card: {summary: s, provenance: p, data: digits}
"""

    def write(self, folder: Path, text: str) -> Path:
        (folder / "tiny.yaml").write_text(text)
        return folder / "tiny.yaml"

    @pytest.mark.parametrize(
        "kind",
        [
            "standard",
            "distillation, temperature: 5",
            "adversarial, inner: {attack: pgd, options: {steps: 1}, norm: linf, eps: 0.1}",
        ],
    )
    def test_a_recipe_makes_weights_and_a_card_and_makes_them_again(self, tmp_path: Path, kind: str) -> None:
        recipe = self.write(tmp_path, self.text.replace("KIND", kind))
        lines: list[object] = []
        result = train(recipe, tmp_path / "out", on_epoch=lines.append)
        phases = ["student", "teacher"] if "distillation" in kind else ["model"]
        tables = [f"tiny.{phase}.csv" for phase in phases]
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
            [*tables, "tiny.safetensors", "tiny.yaml"]
        )
        written = (tmp_path / "out" / tables[0]).read_text().splitlines()
        assert written[0] == "epoch,loss,score,seconds"
        assert [line.split(",")[0] for line in written[1:]] == ["0.0", "1.0"]
        assert len(lines) == (4 if "distillation" in kind else 2)
        loaded = load_model("zoo:digits-cnn", weights=str(result.weights)).model
        assert equal(loaded, result.model)
        assert [entry.n for entry in result.card.measured] == [50, 50]
        assert result.card.measured[1].value <= result.card.measured[0].value
        again = train(recipe, tmp_path / "again")
        assert again.card.sha256 == result.card.sha256

    def test_a_sweep_is_a_recipe_for_every_value_with_one_teacher_for_all(self, tmp_path: Path) -> None:
        kind = "distillation, teacher: 'zoo:digits-cnn'"
        text = self.text.replace("KIND", kind).replace("name: tiny", "name: tiny-t{temperature}")
        swept = load_train_recipe(self.write(tmp_path, text + "sweep: {objective.temperature: [1, 50]}\n"))
        assert [each.name for each in swept.each()] == ["tiny-t1", "tiny-t50"]
        assert [each.objective.temperature for each in swept.each()] == [1.0, 50.0]
        with pytest.raises(InputError, match="is a sweep of several"):
            train(swept, tmp_path)
        results = [train(each, tmp_path / "out", source="sweep.yaml") for each in swept.each()]
        assert {result.card.recipe for result in results} == {"sweep.yaml"}
        assert results[0].card.sha256 != results[1].card.sha256
        assert sorted(path.name for path in (tmp_path / "out").glob("*.csv")) == [
            "tiny-t1.student.csv",
            "tiny-t50.student.csv",
        ]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("{temperature}", ""), "have one name; put {temperature} into it"),
            (("objective.temperature", "objective.heat"), "'objective.heat' leads nowhere"),
            (("objective.temperature", "fit.rate.peak"), "'fit.rate.peak' leads nowhere"),
            (("[1, 50]", "[1, -5]"), "does not fit"),
            (("distillation,", "standard,"), "'standard' has no teacher"),
            (("teacher: 'zoo:digits-cnn'", "start: true"), "nothing to start from"),
        ],
    )
    def test_a_sweep_that_cannot_be_meant_is_named(self, tmp_path: Path, change: tuple[str, str], message: str) -> None:
        text = self.text.replace("KIND", "distillation, teacher: 'zoo:digits-cnn'")
        text = text.replace("name: tiny", "name: tiny-t{temperature}")
        text += "sweep: {objective.temperature: [1, 50]}\n"
        with pytest.raises(InputError, match=message):
            load_train_recipe(self.write(tmp_path, text.replace(*change)))

    def test_a_student_may_begin_as_its_teacher_with_logits_times_the_temperature(self) -> None:
        student = load_model("zoo:digits-cnn-at").model
        begin_as(student, "zoo:digits-cnn", 30.0)
        x = load_data("digits", limit=20).x
        with torch.no_grad():
            assert torch.allclose(student(x), 30.0 * load_model("zoo:digits-cnn").model(x), rtol=1e-4, atol=1e-3)
        with pytest.raises(InputError):
            begin_as(build_architecture("vgg-small", {"channels": 1}), "zoo:digits-cnn", 30.0)

    def test_a_teacher_of_other_classes_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "wide.py").write_text(
            "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
        )
        kind = f"distillation, teacher: '{tmp_path}/wide.py:net'"
        with pytest.raises(InputError, match="tells 7 classes apart, the student 10"):
            train(self.write(tmp_path, self.text.replace("KIND", kind)), tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("augment", "augmnt"), r"line 6: unknown key 'augmnt'; did you mean 'augment'"),
            (("epochs", "epoch"), r"line 7: unknown key 'fit\.epoch'; did you mean 'epochs'"),
            (("epochs: 2", "epochs: 0"), r"line 7: 'fit\.epochs' is wrong"),
            (("KIND", "adversarial"), "no inner attack"),
            (("eps: 0.1", "eps: -1"), r"line 8: 'measure\.inner\.eps' is wrong"),
            (("{spec", "[spec"), "not valid YAML"),
        ],
    )
    def test_mistakes_name_their_line(self, tmp_path: Path, change: tuple[str, str], message: str) -> None:
        text = self.text.replace(*change).replace("KIND", "standard")
        with pytest.raises(InputError, match=message):
            load_train_recipe(self.write(tmp_path, text))

    def test_a_missing_recipe_and_an_unusable_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="cannot be read"):
            load_train_recipe(tmp_path / "absent.yaml")
        recipe = self.write(tmp_path, self.text.replace("KIND", "standard"))
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be made"):
            train(recipe, tmp_path / "file" / "out")

    @pytest.mark.parametrize(
        "path",
        [
            path
            for path in sorted(Path(__file__).parents[1].glob("recipes/train/*.yaml"))
            if not trains_attack(path) and not trains_text(path)
        ],
        ids=lambda path: path.stem,
    )
    def test_shipped_recipes_are_valid(self, path: Path) -> None:
        recipe = load_train_recipe(path)
        assert recipe.name == path.stem or recipe.name.startswith(f"{path.stem}-")
        build_architecture(recipe.architecture, recipe.options)
        if recipe.objective.kind != "distillation":
            build_objective(recipe.objective, seed=0, per_epoch=1, epochs=1)
        for inner in (recipe.select, recipe.measure.inner):
            if inner is not None:
                build_attack(inner.attack, **inner.options)
