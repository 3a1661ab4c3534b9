"""Hardening a user's classifier: it gains robustness, resumes, and refuses what it cannot train."""

from __future__ import annotations

from pathlib import Path

import pytest

from maodun.app.cli import run
from maodun.arena.harden import Hardening, harden
from maodun.core.errors import InputError
from maodun.zoo import load_model

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
    assert run([*words[:5], "0.1,0.2"]) == 2
    assert "one radius" in capsys.readouterr().err
