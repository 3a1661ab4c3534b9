"""Hardening a user's classifier: it gains robustness, resumes, and refuses what it cannot train."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from maodun.app.cli import run
from maodun.arena.harden import Hardening, harden
from maodun.core.errors import InputError
from maodun.zoo import load_data, load_model

PLAN = Hardening(eps=0.1, epochs=4, steps=2, rate=0.05, batch_size=64, measure=150, attack="pgd")


def test_an_undefended_net_becomes_robust_and_its_file_is_what_was_measured(tmp_path: Path) -> None:
    said = []
    made = harden("zoo:digits-cnn", "digits", PLAN, tmp_path, on_measure=lambda when, _: said.append(when))
    assert said == ["before", "after"]
    assert made.before.clean.value > 0.9
    assert made.after.robust.low > made.before.robust.high
    assert made.after.clean.value > 0.8
    loaded = load_model("zoo:digits-cnn", weights=str(made.weights)).model
    pairs = zip(loaded.state_dict().values(), made.model.state_dict().values(), strict=True)
    assert all(bool((a == b).all()) for a, b in pairs)
    assert [path.name for path in tmp_path.iterdir()] == ["hardened.safetensors"]


def test_an_interrupted_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    def stop(line: dict[str, float]) -> None:
        if line["epoch"] == 1:
            raise KeyboardInterrupt

    whole = harden("zoo:digits-cnn", "digits", PLAN, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        harden("zoo:digits-cnn", "digits", PLAN, tmp_path / "b", on_epoch=stop)
    resumed = harden("zoo:digits-cnn", "digits", PLAN, tmp_path / "b")
    pairs = zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    assert all(bool((a == b).all()) for a, b in pairs)
    assert whole.after == resumed.after


def test_what_cannot_be_hardened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="objective 'free'"):
        harden("zoo:digits-cnn", "digits", Hardening(eps=0.1, objective="free"), tmp_path)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        harden("zoo:digits-cnn", "digits", PLAN, blocked / "out")


def test_the_command_says_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["harden", "zoo:digits-cnn", "--data", "digits", "--eps", "0.1", "--epochs", "1", "--steps", "1"]
    assert run([*words, "--measure", "50", "--attack", "pgd", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "before: clean" in out
    assert "after: clean" in out
    assert "--weights" in out
    assert run([*words, "--measure", "20", "--limit", "60", "--attack", "pgd", "--out", str(tmp_path), "-q"]) == 0
    assert not capsys.readouterr().out
    assert run([*words[:5], "0.1,0.2"]) == 2
    assert "one radius" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--eps", "0"), "eps '0': is no ball to harden against"),
        (("--eps", "inf"), "eps 'inf': is no ball to harden against"),
        (("--eps", "0.1", "--limit", "2"), "none is left to learn from"),
    ],
)
def test_what_leaves_nothing_to_learn_is_refused_before_any_work(maodun, tmp_path: Path, words, complaint) -> None:
    done = maodun("harden", "zoo:digits-cnn", "--data", "digits", *words, "--out", tmp_path)
    assert complaint in done.error
    assert not done.out


def test_data_of_another_shape_is_refused_in_words(tmp_path: Path) -> None:
    data = tmp_path / "wide.npz"
    x = np.full((60, 2, 9, 9), 0.5, np.float32)
    np.savez(data, x_train=x, y_train=np.arange(60) % 10, x_test=x[:9], y_test=np.arange(9))
    with pytest.raises(InputError, match=r"cannot take inputs of shape \(2, 9, 9\)"):
        harden("zoo:digits-cnn", f"npz:{data}", PLAN, tmp_path)


def test_a_file_without_a_test_split_is_refused_for_what_it_would_measure(maodun, tmp_path: Path) -> None:
    train = load_data("digits", split="train", limit=60)
    data = tmp_path / "one.npz"
    np.savez(data, x=train.x.numpy(), y=train.y.numpy())
    done = maodun("harden", "zoo:digits-cnn", "--data", f"npz:{data}", "--eps", "0.1", "--out", tmp_path / "out")
    assert "has no test split apart from what is trained on" in done.error
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: one\ndata: {{spec: 'npz:{data}'}}\narchitecture: digits-cnn\nfit: {{epochs: 1}}\n"
        "card: {summary: s, provenance: p, data: d}\n"
    )
    assert "has no test split apart" in maodun("train", recipe, "--out", tmp_path / "out").error
    assert not list((tmp_path / "out").glob("*.safetensors"))
