"""Killed at any moment and started again, a run ends with the table it would have had, and repeats nothing."""

from __future__ import annotations

import json
import multiprocessing
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from conftest import Outcome

from maodun.app import cli
from maodun.arena.store import Store
from maodun.arena.summary import summarise

RECIPE = """\
name: killed
seed: 5
data: {spec: digits, limit: 160}
threats: [{norm: linf, eps: 0.15}]
shields:
  - {name: plain, model: "victims:linear"}
spears:
  - {attack: pgd, options: {steps: 60, restarts: 2}}
  - {attack: fgsm}
  - {attack: square, options: {queries: 150}}
shard_size: 20
"""
CLEAN, CELLS, SHARDS = 8, 3, 8


# Children are forked from a server that has imported everything once: an import costs more than the run itself.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["maodun.app.runs", "maodun.zoo", "maodun.attacks.query.square", "sklearn.datasets"])


def arena(recipe: str, out: str) -> None:
    """What a child does: the command line, from its words to its exit code."""
    torch.set_num_threads(1)
    sys.exit(cli.run(["arena", recipe, "--out", out, "--quiet"]))


def start(recipe: Path, out: Path) -> Any:
    process = SERVER.Process(target=arena, args=(str(recipe), str(out)), daemon=True)
    process.start()
    return process


def finish(recipe: Path, out: Path) -> None:
    process = start(recipe, out)
    process.join(200)
    assert process.exitcode == 0


def finished(out: Path) -> list[str]:
    return [event["part"] for event in Store(out).events() if event["event"] == "shard finished"]


def table(out: Path) -> list[dict[str, Any]]:
    """What the run says, without what differs between equal runs: the seconds and the folder in the command."""
    summary = summarise(str(out))
    assert summary.complete
    cells = [cell.model_dump(exclude={"seconds", "command"}) for cell in summary.cells]
    findings = [finding.model_dump() for finding in summary.findings if finding.name != "cost"]
    return [*cells, *findings, *(worst.model_dump() for worst in summary.worst)]


@pytest.mark.slow
def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(RECIPE)
    finish(recipe, tmp_path / "whole")
    out, chance = tmp_path / "run", random.Random(11)
    # From before the first shard to the middle of the last cell; the exact moment within a shard is drawn.
    kills = 0
    for wanted in (0, 4, 12, 22):
        process = start(recipe, out)
        while (not out.exists() or len(finished(out)) < wanted) and process.is_alive():
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        process.kill()
        process.join()
        # On a busy machine this process may look too late, and the run is through before it is killed.
        assert process.exitcode in (-signal.SIGKILL, 0)
        kills += process.exitcode == -signal.SIGKILL
    assert kills >= 3
    finish(recipe, out)
    assert table(out) == table(tmp_path / "whole")
    for part in (tmp_path / "whole").rglob("*.parquet"):
        mine, theirs = (pq.read_table(path) for path in (out / part.relative_to(tmp_path / "whole"), part))
        keep = [name for name in mine.column_names if name not in ("seconds", "memory")]
        # As text, in which nan (no doubt: the model never rejects) equals nan.
        differ = [name for name in keep if repr(mine[name].to_pylist()) != repr(theirs[name].to_pylist())]
        assert not differ, part
    repeated_nothing(out)
    assert not list(out.rglob("*.tmp"))


def repeated_nothing(out: Path) -> None:
    """No shard is begun again after it was finished, and nothing but the shard that was killed is begun twice."""
    begun: list[str] = []
    done: set[str] = set()
    starts = 0
    for event in Store(out).events():
        starts += event["event"] == "start"
        if event["event"] == "shard":
            assert event["part"] not in done
            begun.append(event["part"])
        if event["event"] == "shard finished":
            assert event["part"] not in done
            done.add(event["part"])
    assert len(set(begun)) == CLEAN + CELLS * SHARDS
    assert len(begun) - len(set(begun)) <= starts - 1


def test_a_third_start_does_nothing(tmp_path: Path) -> None:
    recipe, out = tmp_path / "short.yaml", tmp_path / "run"
    recipe.write_text(RECIPE.replace("limit: 160", "limit: 60").replace("restarts: 2", "restarts: 1"))
    finish(recipe, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("part-*")}
    finish(recipe, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("part-*")} == before
    assert [event["event"] for event in Store(out).events()][-2:] == ["start", "end"]


@pytest.fixture
def refused(tmp_path: Path, maodun: Callable[..., Outcome]) -> Callable[[Path, str], None]:
    """Start a run that must end in one line with `words` and exit code 2, having attacked nobody."""
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(RECIPE)

    def check(out: Path, words: str) -> None:
        assert words in maodun("arena", recipe, "--out", out, "--quiet").error
        if out.is_dir():
            assert not list(out.rglob("*.parquet"))

    return check


Refused = Callable[[Path, str], None]


def test_disk_that_is_too_small_is_an_error_before_the_first_attack(tmp_path: Path, refused: Refused) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        refused(tmp_path / "run", "cannot be written (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_full_disk_is_an_error_before_the_first_attack(tmp_path: Path, refused: Refused) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        refused(disk / "run", "cannot be written (No space left on device)")
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_folder_that_cannot_be_written_is_an_error_before_the_first_attack(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "run", "cannot be")


def test_another_recipe_is_refused_by_name_of_the_key(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"recipe": {"seed": 4}}))
    refused(tmp_path / "run", "holds a run of another recipe (recipe.seed was 4 and is now 5)")
