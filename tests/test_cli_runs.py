"""Every command's ordinary use on a few real digits, and that the same line again resumes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import victims
from conftest import Outcome
from PIL import Image

Maodun = Callable[..., Outcome]
LINEAR = ("--model", "victims:linear", "--data", "digits", "--progress", "quiet")
TESTS = Path(victims.__file__).parent

RECIPE = """\
name: tiny
data: {spec: digits, limit: 60}
threats: [{norm: linf, eps: 0.05}, {norm: l2, eps: 0.5}]
shields:
  - {name: plain, model: "victims:linear"}
  - {name: coarse, model: "victims:linear", defense: bit_depth, options: {bits: 3}}
spears:
  - {attack: fgsm}
  - {attack: pgd, options: {steps: 10}, gradient: bpda}
shard_size: 20
diagnostics: false
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(RECIPE)
    return file


def numbers(maodun: Maodun, run: Path) -> list[dict[str, str]]:
    """The run's rows as exported, without the seconds, which no two runs share."""
    out = run.parent / f"{run.name}.csv"
    assert maodun("report", run, "--out", out).code == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"], row["command"]
    return rows


def parts(run: Path) -> dict[str, int]:
    """Every finished part and when it was written."""
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.rglob("part-*")}


def test_evaluate_prints_the_table_and_keeps_nothing_unasked(maodun: Maodun, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = maodun("evaluate", *LINEAR, "--eps", "0.1", "--attack", "fgsm,pgd:steps=5", "--limit", 60)
    assert done.code == 0, done.err
    assert "fgsm" in done.out and "pgd" in done.out and "worst case" in done.out and "%" in done.out
    assert list(tmp_path.iterdir()) == []


def test_evaluate_twice_with_out_does_nothing_twice(maodun: Maodun, tmp_path: Path) -> None:
    words = ("evaluate", *LINEAR, "--eps", "0.1", "--attack", "pgd:steps=5", "--limit", 60, "--out", tmp_path / "r")
    first = maodun(*words)
    assert first.code == 0, first.err
    written = parts(tmp_path / "r")
    second = maodun(*words)
    assert second.code == 0, second.err
    assert second.out == first.out
    assert parts(tmp_path / "r") == written != {}


def test_evaluate_targeted_minimum_and_several_radii(maodun: Maodun, tmp_path: Path) -> None:
    words = ("--attack", "pgd:steps=5", "--targeted", "--norm", "l2", "--eps", "0.5,1", "--limit", 20)
    done = maodun("evaluate", *LINEAR, *words, "--no-diagnostics")
    assert done.code == 0, done.err
    assert "l2 0.5 targeted" in done.out and "l2 1 targeted" in done.out


def test_evaluate_on_a_stochastic_defence_under_every_rule(maodun: Maodun) -> None:
    for rule in ("single", "mean", "majority", "worst"):
        words = ("--defense", "random_resize_pad", "--eot", 2, "--rule", rule, "--draws", 3, "--eps", "0.05")
        done = maodun("evaluate", *LINEAR, *words, "--attack", "pgd:steps=3", "--limit", 20, "--no-diagnostics")
        assert done.code == 0, done.err


def test_score_based_estimators(maodun: Maodun) -> None:
    for gradient in ("nes", "spsa"):
        words = ("--gradient", gradient, "--eps", "0.1", "--attack", "pgd:steps=2", "--limit", 10)
        done = maodun("evaluate", *LINEAR, *words, "--no-diagnostics")
        assert done.code == 0, done.err


def test_compute_flags_change_no_number(maodun: Maodun, tmp_path: Path) -> None:
    words = ("evaluate", *LINEAR, "--eps", "0.1", "--attack", "pgd:steps=5", "--limit", 40, "--no-diagnostics")
    assert maodun(*words, "--out", tmp_path / "a").code == 0
    assert maodun(*words, "--batch-size", 7, "--channels-last", "--out", tmp_path / "b").code == 0
    first, second = (numbers(maodun, tmp_path / name) for name in "ab")
    assert [row["robust"] for row in first] == [row["robust"] for row in second]


def test_quiet_is_quiet(maodun: Maodun, tmp_path: Path) -> None:
    words = ("--eps", "0.1", "--attack", "fgsm", "--limit", 10, "--quiet", "--no-diagnostics")
    done = maodun("evaluate", "--model", "victims:linear", "--data", "digits", *words)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_log_says_what_is_finished(maodun: Maodun) -> None:
    words = ("--eps", "0.1", "--attack", "fgsm", "--limit", 10, "--progress", "log", "--no-diagnostics")
    done = maodun("evaluate", "--model", "victims:linear", "--data", "digits", *words)
    assert "[10/20]" in done.err and "[20/20]" in done.err


def test_attack_saves_pictures_that_fool_as_they_are(maodun: Maodun, tmp_path: Path) -> None:
    """The saved bytes, read back by another library and shown to the model, give the label in their name."""
    out = tmp_path / "adv"
    words = ("--eps", "0.15", "--attack", "pgd:steps=10", "--limit", 40, "--out", out, "--save", "png")
    done = maodun("attack", *LINEAR, *words)
    assert done.code == 0, done.err
    [table] = out.glob("saved/*/pictures.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 5
    import torch

    model = victims.linear()
    for row in rows:
        pixels, clean = (np.asarray(Image.open(table.parent / row[key])) for key in ("adversarial", "clean"))
        assert pixels.dtype == np.uint8 and pixels.shape == (8, 8)
        assert np.abs(pixels.astype(int) - clean).max() <= 0.15 * 255
        seen = int(model(torch.from_numpy(pixels / np.float32(255))[None]).argmax())
        assert seen == int(row["prediction"])
        assert (seen != int(row["label"])) == (row["fools"] == "1")
        assert row["label"] == row["clean_prediction"]


def test_attack_saves_arrays_that_keep_every_bit(maodun: Maodun, tmp_path: Path) -> None:
    out = tmp_path / "adv"
    words = ("--norm", "l2", "--eps", "0.8", "--attack", "pgd:steps=10", "--limit", 40, "--out", out, "--save", "npz")
    assert maodun("attack", *LINEAR, *words).code == 0
    [file] = out.glob("saved/*.npz")
    saved = np.load(file, allow_pickle=False)
    distance = np.linalg.norm((saved["x_adv"] - saved["x"]).reshape(len(saved["x"]), -1), axis=1)
    assert len(distance) >= 5 and distance.max() <= 0.8 * (1 + 1e-4) and distance.min() > 0
    assert (saved["predictions"] != saved["labels"]).all()


def test_arena_again_resumes_and_gives_the_same(maodun: Maodun, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = maodun("arena", recipe, "--out", out, "--progress", "quiet")
    assert first.code == 0, first.err
    assert "coarse" in first.out and "worst case" in first.out
    whole, rows = parts(out), numbers(maodun, out)
    assert len(rows) == 2 * 2 * 2 + 2 * 2
    lost = sorted(path for path in out.rglob("records/*/part-00001.parquet"))[:2]
    for path in lost:
        path.unlink()
    assert maodun("arena", recipe, "--out", out, "--quiet").code == 0
    again = parts(out)
    changed = {name for name in whole if again[name] != whole[name]}
    assert again.keys() == whole.keys()
    assert {str(path.relative_to(out)) for path in lost} <= changed
    assert all("part-00001" in name for name in changed)
    assert numbers(maodun, out) == rows


def test_interrupt_keeps_finished_shards(maodun: Maodun, recipe: Path, tmp_path: Path, monkeypatch) -> None:
    from maodun.arena import run

    real, calls = run.execute, []

    def third_is_interrupted(*words: object) -> None:
        calls.append(words)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(*words)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run, "execute", third_is_interrupted)
        done = maodun("arena", recipe, "--out", out, "--progress", "quiet")
    assert done.code == 130
    assert done.err.strip().startswith("interrupted: ") and "resumes" in done.err and str(out) in done.err
    kept = parts(out)
    assert len(kept) == 2
    assert maodun("arena", recipe, "--out", out, "--quiet").code == 0
    assert kept.items() <= parts(out).items()


def test_kill_at_any_moment_and_a_second_start_give_the_undisturbed_table(
    maodun: Maodun, recipe: Path, tmp_path: Path
) -> None:
    """Real kills (SIGKILL) of the real program, after 2 and after 5 parts, then the same line to the end."""
    out = tmp_path / "run"
    line = [sys.executable, "-m", "maodun.app", "arena", str(recipe), "--out", str(out), "--quiet"]
    # Every unit waits a little, so that a kill between two parts is sure to hit a living program.
    slow = (
        "import time, sys; from maodun.arena import run; real = run.execute\n"
        "def execute(*words):\n    real(*words)\n    time.sleep(0.2)\n"
        "run.execute = execute\nfrom maodun.app import cli; sys.exit(cli.run(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    seen: dict[str, int] = {}
    for wanted in (2, 5):
        child = subprocess.Popen([sys.executable, "-c", slow, *line[3:]], env=environment)
        deadline = time.monotonic() + 60
        while len(list(out.rglob("part-*.parquet"))) < wanted and time.monotonic() < deadline:
            assert child.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        now = parts(out)
        assert len([name for name in now if name.endswith(".parquet")]) >= wanted
        finished = {name for name in seen if name.endswith(".parquet")}
        assert all(now[name] == seen[name] for name in finished), "a finished shard was done again"
        seen = now
    assert maodun(*line[3:]).code == 0
    undisturbed = tmp_path / "undisturbed"
    assert maodun("arena", recipe, "--out", undisturbed, "--quiet").code == 0
    assert numbers(maodun, out) == numbers(maodun, undisturbed)


def test_report_writes_what_the_suffix_says(maodun: Maodun, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert maodun("arena", recipe, "--out", out, "--quiet").code == 0
    done = maodun("report", out)
    assert done.code == 0, done.err
    assert done.out.strip() == str(out / "report.html")
    page = (out / "report.html").read_text()
    assert "coarse" in page and page.rstrip().endswith("</html>")
    files = [tmp_path / f"r.{suffix}" for suffix in ("csv", "json", "md", "tex", "html")]
    assert maodun("report", out, "--light", *(word for file in files for word in ("--out", file))).code == 0
    assert all(file.stat().st_size > 100 for file in files)
    assert json.loads(files[1].read_text())["name"] == "tiny"


def test_compare_pairs_two_runs(maodun: Maodun, tmp_path: Path) -> None:
    for name, steps in (("weak", 1), ("strong", 20)):
        words = ("--attack", f"pgd:steps={steps}", "--eps", "0.1", "--limit", 60, "--no-diagnostics")
        assert maodun("evaluate", *LINEAR, *words, "--out", tmp_path / name).code == 0
    done = maodun(
        "compare", tmp_path / "weak", tmp_path / "strong", "--out", tmp_path / "c.html", "--out", tmp_path / "c.md"
    )
    assert done.code == 0, done.err
    assert "McNemar" in done.out and "pgd" in done.out
    assert (tmp_path / "c.html").exists() and "pgd" in (tmp_path / "c.md").read_text()


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        ("attacks", ("pgd", "autoattack", "square", "linf")),
        ("defenses", ("bit_depth", "none")),
        ("models", ("zoo:digits-cnn", "witness:trades-mnist")),
        ("data", ("digits", "folder:DIR")),
        ("recipes", ("demo.yaml",)),
    ],
)
def test_list(maodun: Maodun, thing: str, words: tuple[str, ...]) -> None:
    done = maodun("list", thing)
    assert done.code == 0, done.err
    for word in words:
        assert word in done.out


def test_version(maodun: Maodun) -> None:
    out = maodun("version").out
    assert "maodun" in out and "0.1.0" in out and "torch" in out


def test_train_writes_weights_and_a_card_and_resumes(maodun: Maodun, tmp_path: Path) -> None:
    recipe, out = tmp_path / "small.yaml", tmp_path / "made"
    recipe.write_text(
        "name: small\nseed: 0\ndata: {spec: digits, validation: 0.1}\narchitecture: digits-cnn\n"
        "objective: {kind: standard}\nfit: {epochs: 2, batch_size: 64, rate: 0.05}\n"
        "measure: {limit: 100}\ncard: {summary: a test, provenance: made by a test, data: digits}\n"
    )
    done = maodun("train", recipe, "--out", out)
    assert done.code == 0, done.err
    assert "clean accuracy" in done.out and "n = 100" in done.out
    [weights] = out.rglob("*.safetensors")
    before = weights.read_bytes()
    assert maodun("train", recipe, "--out", out, "--quiet").code == 0
    assert weights.read_bytes() == before
    words = ("--model", "zoo:digits-cnn", "--weights", weights, "--data", "digits", "--eps", "0.1", "--attack", "fgsm")
    assert maodun("evaluate", *words, "--limit", 60, "--quiet", "--no-diagnostics").code == 0


def test_train_makes_every_member_of_a_sweep_once(maodun: Maodun, tmp_path: Path) -> None:
    recipe, out = tmp_path / "soft.yaml", tmp_path / "out"
    recipe.write_text(
        "name: soft-t{temperature}\nsweep: {objective.temperature: [1, 20]}\ndata: {spec: digits, limit: 60}\n"
        "architecture: digits-cnn\nobjective: {kind: distillation, teacher: 'zoo:digits-cnn'}\n"
        "fit: {epochs: 1, batch_size: 30}\nmeasure: {limit: 20}\ncard: {summary: s, provenance: p, data: digits}\n"
    )
    done = maodun("train", str(recipe), "--out", str(out))
    assert done.code == 0 and "soft-t1, clean accuracy" in done.out and "soft-t20, clean accuracy" in done.out
    assert sorted(path.name for path in out.glob("*.safetensors")) == ["soft-t1.safetensors", "soft-t20.safetensors"]
    (out / "soft-t20.yaml").unlink()
    again = maodun("train", str(recipe), "--out", str(out))
    assert again.code == 0 and "soft-t1," not in again.out and "soft-t20, clean accuracy" in again.out


def test_calibration_is_printed_when_asked_for(maodun: Maodun) -> None:
    words = ("evaluate", "--model", "zoo:digits-cnn", "--data", "digits", "--limit", 24, "--eps", "0.15")
    done = maodun(*words, "--attack", "maxconf:steps=3", "--no-diagnostics", "--calibration")
    assert done.code == 0 and "calibration, [95 % bootstrap]" in done.out and "maxconf" in done.out
