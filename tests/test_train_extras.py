"""Mixed pictures, averaged weights, compiled models, event logs; what a training run refuses and what it survives."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maodun.app import training
from maodun.arena.objectives import build_objective
from maodun.arena.train import train
from maodun.arena.train_recipe import load_train_recipe
from maodun.attacks.registry import build_attack
from maodun.core.errors import InputError
from maodun.core.threat import Threat
from maodun.defenses.training import (
    ACE,
    AWP,
    MART,
    SCORE,
    TRADES,
    UAD,
    AdversarialTraining,
    Batch,
    FitSettings,
    Free,
    Inner,
    MixedTraining,
    Objective,
    ShiftFlip,
    Standard,
    fit,
)
from maodun.defenses.training.augment import CutMix
from maodun.defenses.training.norms import refresh_norms
from maodun.zoo.architectures import ARCHITECTURES, initialise

GENERATOR = torch.Generator().manual_seed(0)
X = torch.rand(40, 2, 6, 6, generator=GENERATOR)
Y = (X.mean((2, 3))[:, 0] > X.mean((2, 3))[:, 1]).long() + 2 * (X[:, 0, 0, 0] > 0.5).long()
THREAT = Threat("linf", 0.05)
ATTACK = Inner(build_attack("pgd", steps=1), THREAT)


def network() -> nn.Module:
    conv = nn.Conv2d(2, 4, 3)
    model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    initialise(model, 0)
    return model


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


def run(settings: FitSettings, objective: Objective | None = None, **more: object) -> nn.Module:
    model = network()
    more.setdefault("validate", lambda _: 0.0)
    fit(model, X, Y, objective or Standard(), settings, seed=3, **more)  # type: ignore[arg-type]
    return model


class TestCutMix:
    rows = torch.arange(400)
    # One value per picture, so that a pixel says where it comes from.
    x = torch.arange(400.0).view(-1, 1, 1, 1).expand(400, 1, 12, 10) / 400
    y = torch.arange(400) % 4

    def test_the_label_share_is_the_area_and_the_box_is_a_box(self) -> None:
        out, mixed = CutMix(4).mix(self.x, self.y, self.rows, 0, 0)
        own = (out == self.x).flatten(1).double().mean(1)
        assert torch.allclose(mixed.sum(1), torch.ones(400))
        alien = out.flatten(1) != self.x.flatten(1)
        partner = (torch.where(alien, out.flatten(1), 0.0).amax(1) * 400).round().long()
        expected = own.unsqueeze(1) * F.one_hot(self.y, 4) + (1 - own).unsqueeze(1) * F.one_hot(partner % 4, 4)
        assert torch.allclose(mixed.double(), expected, atol=1e-6)
        for image in (out != self.x)[:50, 0]:
            lines, columns = image.any(1).nonzero(), image.any(0).nonzero()
            assert int(image.sum()) == lines.numel() * columns.numel()

    def test_the_box_covers_what_a_uniform_share_cut_at_the_borders_covers(self) -> None:
        # sides s = sqrt(u); the mean of what is left of [c - s/2, c + s/2] in [0, 1] is s - s^2 / 4 along each axis.
        u = torch.linspace(0, 1, 20001, dtype=torch.float64)
        expected = float(((u.sqrt() - u / 4) ** 2).mean())
        out, _ = CutMix(4).mix(self.x, self.y, self.rows, 1, 0)
        assert float((out != self.x).double().mean()) == pytest.approx(expected, abs=0.04)

    def test_it_belongs_to_the_sample_whatever_its_batch(self) -> None:
        way = CutMix(4, 0.5, ShiftFlip(1, flip=True))
        whole = way.mix(self.x, self.y, self.rows, 2, 5)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
        for size in (1, 7, 64):
            part = order[:size]
            for a, b in zip(whole, way.mix(self.x, self.y, part, 2, 5), strict=True):
                assert torch.equal(a[part], b)
        assert not torch.equal(whole[0], way.mix(self.x, self.y, self.rows, 3, 5)[0])

    def test_the_probability_is_the_share_that_is_mixed(self) -> None:
        assert torch.equal(CutMix(4, 0.0).mix(self.x, self.y, self.rows, 0, 0)[0], self.x)
        out, mixed = CutMix(4, 0.3).mix(self.x, self.y, self.rows, 0, 0)
        touched = (out != self.x).flatten(1).any(1)
        assert 80 <= int(touched.sum()) <= 145
        assert torch.equal(mixed[~touched], F.one_hot(self.y[~touched], 4).float())
        with pytest.raises(InputError, match="is a probability"):
            CutMix(4, 1.5)

    @pytest.mark.parametrize(
        "objective",
        [
            Standard(0.1),
            AdversarialTraining(ATTACK),
            MixedTraining(ATTACK, 0.3),
            TRADES(ATTACK),
            SCORE(ATTACK),
            AWP(TRADES(ATTACK), 0.01),
            Free(THREAT),
        ],
        ids=lambda each: type(each).__name__,
    )
    def test_shares_of_one_label_are_that_label(self, objective: Objective) -> None:
        model = network().eval()
        rows = torch.arange(40)
        hard = objective(model, Batch(X, Y, rows, 0))
        soft = objective(model, Batch(X, Y, rows, 0, F.one_hot(Y, 4).float()))
        assert torch.allclose(hard, soft, atol=1e-6)
        other = objective(model, Batch(X, Y, rows, 0, torch.full((40, 4), 0.25)))
        assert not torch.allclose(hard, other, atol=1e-3)

    def test_cross_entropy_of_shares_is_the_weighted_mean_of_cross_entropies(self) -> None:
        model = network().eval()
        other = (Y + 1) % 4
        mixed = 0.7 * F.one_hot(Y, 4) + 0.3 * F.one_hot(other, 4)
        loss = TRADES(lambda _, batch: batch.x, beta=6.0)
        with torch.no_grad():
            first, second = (loss(model, Batch(X, each, torch.arange(40), 0)) for each in (Y, other))
            found = loss(model, Batch(X, Y, torch.arange(40), 0, mixed))
        assert torch.allclose(found, 0.7 * first + 0.3 * second, atol=1e-5)

    @pytest.mark.parametrize(
        "objective", [MART(ATTACK), ACE(TRADES(ATTACK)), UAD(TRADES(ATTACK)), AWP(MART(ATTACK))], ids=repr
    )
    def test_objectives_that_ask_what_is_right_refuse_it(self, objective: Objective) -> None:
        with pytest.raises(InputError, match=r"cutmix: .* leave it out"):
            run(FitSettings(epochs=1), objective, augment=CutMix(4))


class TestAveragedWeights:
    settings = FitSettings(epochs=6, batch_size=16, swa=0.5)

    def test_they_are_the_plain_mean_of_the_epochs_and_norms_are_taken_anew(self) -> None:
        ends: list[dict[str, Tensor]] = []
        model = network()

        def keep(_: dict[str, float]) -> None:
            ends.append({name: value.clone() for name, value in model.state_dict().items()})

        fit(model, X, Y, Standard(), self.settings, validate=lambda _: 0.0, seed=3, on_epoch=keep)
        kept = model.state_dict()
        for name, _ in model.named_parameters():
            assert torch.allclose(kept[name], torch.stack([end[name] for end in ends[3:]]).mean(0), atol=1e-6)
        with torch.no_grad():
            maps = [model[0](part) for part in torch.chunk(X, 3)]
        assert torch.allclose(kept["1.running_mean"], torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0), atol=1e-5)
        assert torch.allclose(kept["1.running_var"], torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0), atol=1e-5)
        # What the run itself goes on with is not averaged.
        assert equal(ends[-1], {**run(FitSettings(epochs=6, batch_size=16)).state_dict()})

    @pytest.mark.parametrize("after", [2, 5])
    def test_a_stopped_run_continues_to_the_same_mean(self, tmp_path: Path, after: int) -> None:
        def stop(line: dict[str, float]) -> None:
            if line["epoch"] + 1 == after:
                raise KeyboardInterrupt

        more = {"checkpoint": tmp_path / "run.ckpt", "augment": CutMix(4, 0.5, ShiftFlip(1))}
        with pytest.raises(KeyboardInterrupt):
            run(self.settings, on_epoch=stop, **more)
        resumed = run(self.settings, **more)
        assert equal(resumed.state_dict(), run(self.settings, augment=more["augment"]).state_dict())

    def test_refreshing_leaves_modes_momentum_and_frozen_norms_alone(self) -> None:
        model = network().train()
        model[0].eval()
        bare = nn.BatchNorm2d(2, track_running_stats=False)
        refresh_norms(nn.Sequential(bare), X, 8)
        before = torch.random.get_rng_state()
        refresh_norms(model, X, 8)
        assert [module.training for module in model] == [False, True, True, True, True]
        assert model[1].momentum == 0.1
        assert torch.equal(before, torch.random.get_rng_state())

    def test_two_means_at_once_are_refused(self) -> None:
        with pytest.raises(InputError, match="average and swa"):
            FitSettings(average=0.9, swa=0.5)


class TestCompiled:
    def test_a_compiled_model_takes_the_same_steps(self) -> None:
        plain = run(FitSettings(epochs=1, batch_size=20), TRADES(ATTACK))
        compiled = run(FitSettings(epochs=1, batch_size=20, compile="aot_eager"), TRADES(ATTACK))
        for name, value in plain.state_dict().items():
            assert torch.allclose(value, compiled.state_dict()[name], atol=1e-5), name

    @pytest.mark.parametrize("objective", [AWP(TRADES(ATTACK)), UAD(TRADES(ATTACK))], ids=["awp", "uad"])
    def test_objectives_that_reach_inside_refuse_it(self, objective: Objective) -> None:
        with pytest.raises(InputError, match=r"compile: .* leave compile out"):
            run(FitSettings(epochs=1, compile="aot_eager"), objective)


RECIPE = """
name: tiny
data: {spec: digits, limit: 120, validation: 0.2}
architecture: digits-cnn
options: {OPTIONS}
fit: {epochs: 2, batch_size: 48, swa: 0.5}
augment: {cutmix: 0.5}
measure: {limit: 20}
card: {summary: s, provenance: p, data: digits}
"""


def recipe(folder: Path, options: str = "") -> Path:
    (folder / "tiny.yaml").write_text(RECIPE.replace("OPTIONS", options))
    return folder / "tiny.yaml"


class TestRuns:
    def test_events_say_what_the_table_says_and_a_seed_replaces_the_recipes(self, tmp_path: Path) -> None:
        pytest.importorskip("tensorboard", reason="tensorboard is an extra")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        steps: list[tuple[int, int]] = []
        made = train(recipe(tmp_path), tmp_path / "a", seed=4, tensorboard=True, on_step=lambda *at: steps.append(at))
        # 97 samples are two batches: the last one goes with the second.
        assert steps == [(number, 4) for number in range(1, 5)]
        assert {entry.seed for entry in made.card.measured} == {4}
        log = EventAccumulator(str(tmp_path / "a" / "tiny.model.events")).Reload()
        lines = [line.split(",") for line in (tmp_path / "a" / "tiny.model.csv").read_text().splitlines()[1:]]
        assert [(each.step, each.value) for each in log.Scalars("loss")] == [
            (number, pytest.approx(float(line[1]))) for number, line in enumerate(lines)
        ]
        assert train(recipe(tmp_path), tmp_path / "b").card.sha256 != made.card.sha256

    def test_the_progress_line_says_what_the_epoch_is_chosen_by(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = recipe(tmp_path)
        plain, select = file.read_text(), "select: {attack: pgd, options: {steps: 1}, norm: linf, eps: 0.1}\n"
        for text, named in ((plain, "validation accuracy"), (plain + select, "robust validation accuracy")):
            file.write_text(text)
            training.train(str(file), str(tmp_path / named), resume=True, quiet=False)
            said = " ".join(capsys.readouterr().err.split())
            assert [each in said for each in ("epoch 0", "epoch 1", f" {named} 0.")] == [True] * 3
            assert ("robust" in said) == ("robust" in named)

    @pytest.mark.parametrize("classes", [9, 12])
    def test_another_number_of_classes_is_refused_before_any_work(self, tmp_path: Path, classes: int) -> None:
        told: list[object] = []
        with pytest.raises(InputError, match=f"answers {classes} classes, the data have 10; give it 10"):
            train(recipe(tmp_path, f"num_classes: {classes}"), tmp_path / "out", on_step=lambda *at: told.append(at))
        assert not told

    def test_a_full_disk_ends_the_run_and_keeps_the_last_whole_epoch(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        checkpoint, settings = tmp_path / "run.ckpt", FitSettings(epochs=4, batch_size=16)
        sync, calls = os.fsync, iter(range(100))

        def full(file: int) -> None:
            if next(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(file)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(InputError, match=r"No space left on device.*free space"):
            run(settings, checkpoint=checkpoint)
        assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]
        assert len(torch.load(checkpoint, weights_only=True)["history"]) == 2
        assert equal(run(settings, checkpoint=checkpoint).state_dict(), run(settings).state_dict())

    def test_a_loss_that_is_not_a_number_names_its_step_and_keeps_the_last_good_epoch(self, tmp_path: Path) -> None:
        checkpoint, settings = tmp_path / "run.ckpt", FitSettings(epochs=3, batch_size=16)

        class Breaks(Standard):
            def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
                return super().__call__(model, batch) * (math.nan if batch.step == 4 else 1.0)

        with pytest.raises(InputError, match="epoch 1, step 4: the loss is nan"):
            run(settings, Breaks(), checkpoint=checkpoint)
        kept = torch.load(checkpoint, weights_only=True)
        assert len(kept["history"]) == 1
        assert all(bool(value.isfinite().all()) for value in kept["model"].values())
        assert equal(run(settings, checkpoint=checkpoint).state_dict(), run(settings).state_dict())


FOLDERS = Path(__file__).parents[1] / "recipes" / "train"


@pytest.mark.parametrize("path", sorted(FOLDERS.glob("*/*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_tables_and_of_published_length_are_valid(path: Path) -> None:
    described = load_train_recipe(path)
    assert described.name == path.stem
    with torch.device("meta"):
        ARCHITECTURES[described.architecture](**described.options)
    build_objective(described.objective, seed=0, per_epoch=1, epochs=1)
    FitSettings(**described.fit.model_dump())
    for inner in (described.select, described.measure.inner):
        if inner is not None:
            build_attack(inner.attack, **inner.options)
    if path.parent.name == "published":
        assert "NOT RUN HERE" in path.read_text(encoding="utf-8")
