"""The multi-task experiment on toy networks: honest rows, paired comparison, resumption, the page, bad recipes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from maodun.arena import multitask, multitask_stage
from maodun.arena.multitask import CLEAN, run_multitask
from maodun.arena.multitask_recipe import MultitaskRecipe, load_multitask_recipe
from maodun.arena.multitask_stage import Player, Stage
from maodun.attacks.multitask.module import build_module
from maodun.core.errors import InputError
from maodun.core.streams import Stream
from maodun.report import multitask as pages
from maodun.tasks import Classification, Detection, Labelled, Reconstruction, Retrieval, Segmentation

ROOT = Path(__file__).parents[1]
EPS = 16 / 255


def pictures(name: str, n: int, height: int, width: int) -> Tensor:
    small = Stream(0, name).uniform(torch.arange(n), (3, height // 4, width // 4))
    return (torch.nn.functional.interpolate(small, size=(height, width)) * 255).byte()


class ToyStage(Stage):
    """The real stage with untrained networks and made-up images."""

    groups: ClassVar = {
        "street": Labelled("street", pictures("s", 3, 32, 40), torch.arange(3).reshape(3, 1, 1).expand(3, 32, 40) % 11),
        "people": Labelled("people", pictures("p", 3, 32, 40), torch.tensor([[[4.0, 4, 20, 28]]]).expand(3, 1, 4)),
        "things": Labelled("things", pictures("t", 6, 32, 32), torch.arange(6) % 2),
    }
    pool = pictures("pool", 520, 32, 32).float() / 255

    @property
    def players(self):
        embed = Retrieval().build(1).eval()
        made = {
            "segmentation": Segmentation(), "detection": Detection(), "classification": Classification(),
            "reconstruction": Reconstruction(),
        }  # fmt: skip
        players = {name: Player(task, task.build(1).eval()) for name, task in made.items()}
        # Untrained networks say nothing of the truth; what they say of the clean images is made the truth instead.
        seen = self.groups["things"].images()
        players["retrieval"] = Player(Retrieval(embed(seen).detach(), torch.arange(6) % 2), embed)
        return players

    @property
    def surrogate(self):
        return Classification().build(2).eval()

    def relation(self, kind):
        return build_module(kind, self.pool)


@pytest.fixture
def toys(monkeypatch):
    with torch.no_grad():
        stage = ToyStage(MultitaskRecipe(name="toy", reference="noise", rows=[]), lambda _: None)
        street, things = ToyStage.groups["street"], ToyStage.groups["things"]
        own = stage.players["segmentation"].model(street.images()).argmax(1)
        answers = stage.players["classification"].model(things.images()).argmax(1)
        _, boxes = Detection().decode(stage.players["detection"].model(ToyStage.groups["people"].images()))
    groups = {
        "street": Labelled("street", street.x, own),
        "people": Labelled("people", ToyStage.groups["people"].x, boxes[:, :1]),
        "things": Labelled("things", things.x, answers),
    }
    monkeypatch.setattr(ToyStage, "groups", groups)
    monkeypatch.setattr(multitask, "Stage", ToyStage)
    monkeypatch.setattr(pages, "Stage", ToyStage)
    monkeypatch.setattr(multitask_stage, "Stage", ToyStage)


def recipe(*rows: dict, reference: str = "noise") -> MultitaskRecipe:
    images = {"street": 3, "people": 3, "things": 6, "gallery": 10}
    return MultitaskRecipe(name="toy", images=images, reference=reference, resamples=100, generator_steps=3, rows=rows)


def test_rows_stay_in_the_ball_resume_and_the_oracle_hurts_more_than_noise(toys, tmp_path):
    rows = (
        {"name": "noise", "attack": "noise"}, {"name": "oracle", "attack": "oracle"},
        {"name": "dr", "attack": "dr", "options": {"steps": 2}},
        {"name": "relation", "attack": "relation", "space": "relation", "options": {"steps": 2}},
    )  # fmt: skip
    said: list[str] = []
    first = run_multitask(recipe(*rows), tmp_path, rows=("noise",), say=said.append)
    assert [line.name for line in first] == [CLEAN, "noise"]
    lines = {line.name: line for line in run_multitask(recipe(*rows), tmp_path, say=said.append)}
    assert said == ["row clean", "row noise", "row oracle", "row dr", "row relation"]
    assert list(lines) == [CLEAN, "noise", "oracle", "dr", "relation"]
    from safetensors.torch import load_file

    clean = load_file(tmp_path / "clean.images.safetensors")
    for name in ("noise", "oracle", "dr", "relation"):
        made = load_file(tmp_path / f"{name}.images.safetensors")
        for group, x in made.items():
            assert x.dtype == torch.uint8 and x.shape == clean[group].shape
            assert 0 < (x.int() - clean[group].int()).abs().max() <= 16
    assert lines["oracle"].score > lines["noise"].score
    assert lines[CLEAN].score == 0.0 and all(drop == 0.0 for drop in lines[CLEAN].drops.values())
    assert lines["noise"].low == lines["noise"].high == lines["noise"].margin == 0.0 and lines["noise"].p == 1.0
    assert lines["oracle"].margin < 0 and lines["oracle"].low <= lines["oracle"].margin <= lines["oracle"].high
    assert lines["noise"].worst == min(lines["noise"].drops, key=lines["noise"].drops.get)
    assert math.isclose(lines["dr"].score, sum(lines["dr"].drops.values()) / 5)


def test_trained_rows_are_files_that_can_be_loaded_again(toys, tmp_path):
    from maodun.attacks.registry import build_attack

    rows = (
        {"name": "noise", "attack": "noise"},
        {"name": "uap", "attack": "uap", "options": {"epochs": 1, "starts": 1}},
        {"name": "ltp", "attack": "ltp", "options": {"layer": "features.1"}},
        {"name": "ours", "attack": "relation-generator", "space": "relation"},
    )
    run_multitask(recipe(*rows), tmp_path)
    for name, kind in (("uap", "uap"), ("ltp", "ltp"), ("ours", "relation-generator")):
        attack = build_attack(f"file:{tmp_path / name}.attack.safetensors")
        assert attack.name == kind and attack.eps == pytest.approx(EPS)


def test_the_page_shows_every_task_and_picture_and_asks_for_nothing(toys, tmp_path):
    described = recipe({"name": "noise", "attack": "noise"}, {"name": "oracle", "attack": "oracle"})
    lines = run_multitask(described, tmp_path)
    page = Path(pages.write_multitask(described, tmp_path, tmp_path / "report.html")).read_text()
    for word in ("segmentation, mIoU", "detection, mAP@0.5", "oracle", "16/255", "least hurt task"):
        assert word in page
    # Six pictures, three rows each, given and seen.
    assert page.count("data:image/png") == 6 * 3 * 2
    assert "http://" not in page and "https://" not in page
    assert pages.to_table(lines).row_count == 3


def test_another_recipe_is_kept_out_of_a_folder(toys, tmp_path):
    run_multitask(recipe({"name": "noise", "attack": "noise"}), tmp_path)
    other = recipe({"name": "noise", "attack": "noise"}).model_copy(update={"eps": 8 / 255})
    with pytest.raises(InputError, match="another recipe"):
        run_multitask(other, tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("name: x\nreference: a\nrows: [{name: b, attack: dr}]", "no row 'a'"),
        ("name: x\nreference: a\nrows: [{name: a, attack: dr}, {name: a, attack: dr}]", "same name"),
        ("name: x\nreference: a\nrows: [{name: a, attack: dr, on: x}]", "rows"),
        ("name: [", "cannot be read"),
    ],
)
def test_bad_recipes_are_clear_errors(tmp_path, maodun, text, reason):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert reason in maodun("multitask", path, "--out", tmp_path / "run").error


def test_the_shipped_recipe_can_be_read_and_names_known_attacks():
    from maodun.attacks.registry import get_attack

    described = load_multitask_recipe(ROOT / "recipes/multi-task.yaml")
    assert described.eps == pytest.approx(EPS)
    for row in described.rows:
        if row.attack not in ("noise", "oracle", "uap", "ltp", "relation-generator"):
            get_attack(row.attack)(**row.options)
