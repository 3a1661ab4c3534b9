"""Universal attacks from recipes: trained on some digits, measured on others, used as files, refused by name."""

from __future__ import annotations

import pytest
import yaml

from maodun.app.cli import app
from maodun.arena.train_universal import load_universal_recipe, train_universal
from maodun.attacks.artifacts import load_attack
from maodun.core.errors import InputError

UAP = {
    "name": "small",
    "attack": "uap",
    "data": {"spec": "digits", "limit": 300, "validation": 0.2},
    "models": ["victims:linear"],
    "eps": "0.4",
    "fit": {"epochs": 3, "starts": 1},
    "measure": {"limit": 100},
}
PATCH = {**UAP, "attack": "patch", "placement": {"side": 3, "rotation": 10, "at": [0.5, 0.5]}}
del PATCH["eps"]


def written(folder, content):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return file


def test_a_perturbation_is_trained_saved_and_measured_on_images_it_has_not_seen(tmp_path):
    lines = []
    made = train_universal(written(tmp_path, UAP), tmp_path / "out", on_epoch=lines.append)
    assert made.attack == load_attack(tmp_path / "out" / "small.safetensors")
    assert [line["epoch"] for line in lines] == [0, 1, 2] and lines[0]["phase"] == "uap"
    held, test = made.measured
    assert "held out" in held.metric and "test" in test.metric
    assert held.n <= 60 and 60 < test.n <= 100 and test.value > 0.25
    assert made.attack.about["images"] == 240 and made.attack.about["recipe"]["data"]["split"] == "train"
    assert made.attack.about["measured"][1]["value"] == test.value
    assert not list((tmp_path / "out").glob("*.ckpt*"))
    again = train_universal(written(tmp_path, UAP), tmp_path / "twice")
    assert again.attack.sha256 != "" and again.attack.tensors["delta"].equal(made.attack.tensors["delta"])


@pytest.mark.parametrize(
    "change",
    [{"method": "deepfool", "deepfool": {"epochs": 1, "batch_size": 20}}, {"target": 3}, {"norm": "l2", "eps": 1.5}],
)
def test_the_other_ways_to_train_one(tmp_path, change):
    made = train_universal(written(tmp_path, {**UAP, **change}), tmp_path / "out")
    assert made.attack.norm == change.get("norm", "linf") and made.attack.target == change.get("target")
    assert made.measured[1].value > 0.03
    assert made.attack.about["method"] == change.get("method", "sgd")


def test_the_command_line_trains_a_patch_and_uses_it(tmp_path):
    from typer.testing import CliRunner

    run = CliRunner().invoke(app, ["train", str(written(tmp_path, PATCH)), "--out", str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert "success on victims:linear, test" in run.output
    file = tmp_path / "out" / "small.safetensors"
    words = [
        "evaluate",
        "--model",
        "victims:linear",
        "--data",
        "digits",
        "--limit",
        "60",
        "--norm",
        "l0",
        "--no-diagnostics",
    ]
    run = CliRunner().invoke(app, [*words, "--eps", "3", "--attack", f"file:{file}"])
    assert run.exit_code != 0 and "covers up to 16 entries and the threat allows 3" in str(run.exception)
    run = CliRunner().invoke(app, [*words, "--eps", "16", "--attack", f"file:{file}"])
    assert run.exit_code == 0, run.output


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({**UAP, "eps": None}, "without a radius"),
        ({**PATCH, "placement": None}, "without a placement"),
        ({**PATCH, "eps": 0.1}, "gives a patch a ball"),
        ({**UAP, "placement": {"side": 3}}, "with a placement"),
        ({**UAP, "method": "deepfool", "target": 1}, "asks DeepFool for a target"),
        ({**UAP, "models": []}, "models"),
        ({**UAP, "fit": {"epoch": 3}}, "unknown key 'fit.epoch'; did you mean 'epochs'"),
        ({**UAP, "norm": "l1"}, "norm"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        load_universal_recipe(written(tmp_path, content))


def test_a_patch_larger_than_the_image_is_refused_before_any_work(tmp_path):
    with pytest.raises(InputError, match="larger than the image of 8 x 8"):
        train_universal(written(tmp_path, {**PATCH, "placement": {"side": 9}}), tmp_path / "out")
