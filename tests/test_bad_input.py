"""What cannot be used is refused before any long work: one line that names the thing, the reason and the remedy."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import victims
from conftest import Outcome
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits

Maodun = Callable[..., Outcome]
N = 60


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = load_digits(return_X_y=True)
    return (pixels[:N] / 16.0).astype(np.float32).reshape(N, 1, 8, 8), labels[:N].astype(np.int64)


@pytest.fixture
def evaluate(maodun: Maodun, tmp_path: Path, digits) -> Maodun:
    """`maodun evaluate` on a right model and right data; arguments replace x, y, the model, or add words."""

    def call(*words: object, model: str = "victims:linear", x=None, y=None, data: str = "", attack: str = "fgsm"):
        if not data:
            file = tmp_path / "data.npz"
            np.savez(file, x=digits[0] if x is None else x, y=digits[1] if y is None else y)
            data = f"npz:{file}"
        usual = ["--eps", "0.1"] if "--eps" not in words else []
        fixed = ["--model", model, "--data", data, "--attack", attack, "--progress", "quiet", "--no-diagnostics"]
        return maodun("evaluate", *fixed, *usual, *words)

    return call


def names(line: str, *words: str) -> None:
    """The line has a thing, a reason and a remedy, and these words."""
    thing, _, rest = line.removeprefix("error: ").partition(": ")
    reason, _, remedy = rest.partition("; ")
    assert thing and reason and remedy, line
    for word in words:
        assert word.lower() in line.lower(), (word, line)


def test_the_right_model_and_data_pass(evaluate: Maodun) -> None:
    """Everything below fails for its own reason only because this one works."""
    done = evaluate()
    assert done.code == 0, done.err
    assert "fgsm" in done.out


def test_unknown_attack_names_the_nearest(evaluate: Maodun) -> None:
    names(evaluate(attack="depfool").error, "depfool", "did you mean 'deepfool'")


def test_unknown_defense_names_the_nearest(evaluate: Maodun) -> None:
    names(evaluate("--defense", "bit_dept").error, "bit_dept", "did you mean 'bit_depth'")


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle_bomb_is_refused_and_does_not_go_off(evaluate: Maodun, tmp_path: Path, how: str) -> None:
    mark, file = tmp_path / "exploded", tmp_path / "bomb.pt"
    if how == "torch":
        torch.save({"score.weight": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(mark)))
    names(evaluate("--weights", file).error, "bomb.pt", "safetensors")
    assert not mark.exists()


def test_missing_weights_keys_are_named(evaluate: Maodun, tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"score.weight": torch.zeros(10, 64)}, file)
    names(evaluate("--weights", file).error, "weights.safetensors", "score.bias")


def test_missing_weights_file(evaluate: Maodun, tmp_path: Path) -> None:
    names(evaluate("--weights", tmp_path / "none.safetensors").error, "none.safetensors")


def test_standardised_inputs(evaluate: Maodun, digits) -> None:
    x = digits[0]
    names(evaluate(x=(x - x.mean()) / x.std()).error, "standardised", "normalisation")


def test_inputs_in_0_255(evaluate: Maodun, digits) -> None:
    names(evaluate(x=digits[0] * 255).error, "255", "divide")


def test_nan_inputs(evaluate: Maodun, digits) -> None:
    x = digits[0].copy()
    x[7, 0, 0, 0] = np.nan
    names(evaluate(x=x).error, "NaN", "sample 7")


@pytest.mark.parametrize("label", [10, -1])
def test_labels_out_of_range(evaluate: Maodun, digits, label: int) -> None:
    y = digits[1].copy()
    y[3] = label
    names(evaluate(y=y).error, "label", str(label))


def test_model_that_returns_probabilities(evaluate: Maodun) -> None:
    names(evaluate(model="victims:probabilities").error, "probabilities", "logits")


def test_model_in_train_mode_with_batchnorm(evaluate: Maodun) -> None:
    names(evaluate(model="victims:training_batchnorm").error, "BatchNorm", "train", "eval()")


def test_model_with_one_output(evaluate: Maodun) -> None:
    names(evaluate(model="victims:one_class").error, "1 value", "one logit per class")


def test_model_at_chance(evaluate: Maodun) -> None:
    names(evaluate(model="victims:shuffled").error, "guessing", "order of classes")


def test_factory_that_is_not_there(evaluate: Maodun) -> None:
    names(evaluate(model="victims:linaer").error, "linaer", "linear")
    names(evaluate(model="no_such_module_anywhere:build").error, "no_such_module_anywhere")
    names(evaluate(model="victims:not_a_model").error, "not_a_model", "Module")


def test_unknown_zoo_model_names_the_nearest(evaluate: Maodun) -> None:
    names(evaluate(model="zoo:digits-cn").error, "digits-cn", "did you mean 'zoo:digits-cnn'")


def test_unknown_data(evaluate: Maodun) -> None:
    names(evaluate(data="digitz").error, "digitz", "digits")


def test_wrong_norm_for_an_attack(evaluate: Maodun) -> None:
    names(evaluate("--norm", "linf", attack="cw").error, "cw", "linf", "l2")


def test_unknown_norm(evaluate: Maodun) -> None:
    names(evaluate("--norm", "l3").error, "l3", "linf")


def test_unknown_attack_option(evaluate: Maodun) -> None:
    names(evaluate(attack="pgd:stepz=3").error, "stepz", "steps")


@pytest.mark.parametrize("eps", ["-0.1", "-8/255", "big"])
def test_wrong_eps(evaluate: Maodun, eps: str) -> None:
    names(evaluate("--eps", eps).error, "eps", eps)


def test_empty_folder(evaluate: Maodun, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    names(evaluate(data=f"folder:{tmp_path / 'photos'}").error, "photos", "no pictures")


def test_corrupt_image(evaluate: Maodun, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        Image.new("L", (8, 8), 99).save(tmp_path / "photos" / label / "good.png")
    bad = tmp_path / "photos" / "dog" / "bad.png"
    bad.write_bytes((tmp_path / "photos" / "dog" / "good.png").read_bytes()[:40])
    names(evaluate(data=f"folder:{tmp_path / 'photos'}").error, "bad.png")


RECIPE = """\
name: tiny
data: {spec: digits, limit: 20}
threats: [{norm: linf, eps: 0.1}]
shields:
  - {name: none, model: "victims:linear"}
spears:
  - {attack: fgsm}
diagnostics: false
"""


def test_recipe_with_an_unknown_key_names_its_line(maodun: Maodun, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.replace("  - {attack: fgsm}", "  - attack: fgsm\n    optoins: {steps: 3}"))
    names(maodun("arena", file, "--out", tmp_path / "run").error, "recipe.yaml line 8", "optoins", "'options'")
    assert not (tmp_path / "run").exists()


def test_recipe_that_is_not_there(maodun: Maodun, tmp_path: Path) -> None:
    names(maodun("arena", tmp_path / "none.yaml").error, "none.yaml")


def test_store_of_another_recipe(maodun: Maodun, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(RECIPE)
    assert maodun("arena", file, "--out", out, "--quiet").code == 0
    file.write_text(RECIPE.replace("eps: 0.1", "eps: 0.2"))
    before = sorted(str(path) for path in out.rglob("*"))
    names(maodun("arena", file, "--out", out).error, str(out), "another recipe", "0.1", "0.2")
    assert sorted(str(path) for path in out.rglob("*")) == before


def test_a_folder_that_holds_something_else(maodun: Maodun, tmp_path: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "run"
    file.write_text(RECIPE)
    out.mkdir()
    (out / "letter.txt").write_text("dear reader")
    names(maodun("arena", file, "--out", out).error, str(out), "--out")
    assert (out / "letter.txt").read_text() == "dear reader"


def test_unwritable_folder(maodun: Maodun, tmp_path: Path) -> None:
    """A file where the folder should be: refused for root too, who may write anywhere."""
    file, blocked = tmp_path / "recipe.yaml", tmp_path / "file"
    file.write_text(RECIPE)
    blocked.write_text("")
    names(maodun("arena", file, "--out", blocked / "run").error, "cannot be", "--out")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a file system that can be mounted full")
def test_full_disk_is_an_error_before_the_first_attack(tmp_path: Path) -> None:
    """A real full disk: a memory disk of one page in a mount of our own, where the machine allows one."""
    disk, file = tmp_path / "disk", tmp_path / "recipe.yaml"
    disk.mkdir()
    file.write_text(RECIPE)
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here, so no disk of our own to fill")
    mount = f"mount -t tmpfs -o size=4k none {disk}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let a test mount a disk to fill")
    line = f"{mount} && exec {sys.executable} -m maodun.app arena {file} --out {disk}/run"
    environment = {**os.environ, "PYTHONPATH": str(Path(victims.__file__).parent)}
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", line], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    names(lines[0], str(disk), "--out")


def test_missing_run_folders(maodun: Maodun, tmp_path: Path) -> None:
    names(maodun("report", tmp_path / "none").error, "none", "no run")
    names(maodun("compare", tmp_path / "a", tmp_path / "b").error, "no run")
