"""The store: whole or absent, append-only, and loud about disks it cannot use."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from maodun.arena.store import EVENTS, MANIFEST, Store, first_difference, part_name
from maodun.core.errors import StoreError

RECIPE = {"recipe": {"seed": 0, "spears": [{"attack": "pgd"}]}, "weights": {"none": "ab"}}
KEYS = ("recipe", "weights")


@contextmanager
def small_files(limit: int) -> Iterator[None]:
    """Let the kernel refuse every file larger than `limit` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def visible(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_parts_come_back_exactly(tmp_path: Path) -> None:
    store = Store(tmp_path / "run")
    x = np.random.default_rng(0).random((5, 1, 8, 8), dtype=np.float32)
    store.write_arrays("adversarials/a/part-00000.npz", x=x, ids=np.arange(5))
    back = store.read_arrays("adversarials/a/part-00000.npz")
    assert np.array_equal(back["x"], x)
    assert back["x"].dtype == np.float32
    schema = pa.schema([("sample_id", pa.int64()), ("probs", pa.list_(pa.float32()))])
    for shard in (0, 1):
        columns = {"sample_id": [shard * 2, shard * 2 + 1], "probs": [[0.5, 0.5], [1.0, 0.0]]}
        store.write_table(f"records/a/{part_name(shard)}.parquet", columns, schema)
    table = store.read_table([f"records/a/{part_name(shard)}.parquet" for shard in (0, 1)])
    assert table["sample_id"].to_pylist() == [0, 1, 2, 3]


def test_memory_file_system_works_as_a_folder_does() -> None:
    store = Store("memory://maodun-test/run")
    store.open_for(RECIPE, KEYS, 1000)
    store.event("started", shard=1)
    store.event("finished", shard=1)
    assert [event["event"] for event in store.events()] == ["started", "finished"]
    assert Store("memory://maodun-test/run").manifest() == RECIPE
    store.fs.rm(store.root, recursive=True)


def test_second_start_continues_and_another_recipe_is_refused(tmp_path: Path) -> None:
    Store(tmp_path / "run").open_for({**RECIPE, "created": "then"}, KEYS, 1000)
    kept = Store(tmp_path / "run").open_for({**RECIPE, "created": "now"}, KEYS, 1000)
    assert kept["created"] == "then"
    other = json.loads(json.dumps(RECIPE))
    other["recipe"]["spears"][0]["attack"] = "fgsm"
    with pytest.raises(StoreError, match=r'recipe.spears.0.attack was "pgd" and is now "fgsm"'):
        Store(tmp_path / "run").open_for(other, KEYS, 1000)
    with pytest.raises(StoreError, match=r"weights\.none"):
        Store(tmp_path / "run").open_for({**RECIPE, "weights": {"none": "cd"}}, KEYS, 1000)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, "r.a was 1 and is now 2"),
        ({"a": 1}, {}, "r.a is only in the store"),
        ({}, {"b": 1}, "r.b is only in the new recipe"),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, "r.a.1.b was 2 and is now 3"),
        ({"a": [1]}, {"a": [1, 2]}, "r.a was [1] and is now [1, 2]"),
    ],
)
def test_first_difference(old: object, new: object, words: str | None) -> None:
    assert first_difference(old, new, "r") == words


def test_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(StoreError, match="holds no run"):
        Store(tmp_path).open_for(RECIPE, KEYS, 1000)
    assert visible(tmp_path) == ["thesis.tex"]
    with pytest.raises(StoreError, match="holds no run"):
        Store(tmp_path / "nowhere").manifest()


def test_folder_under_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be"):
        Store(tmp_path / "file" / "run").open_for(RECIPE, KEYS, 1000)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_the_right_to_write(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match="cannot be"):
        Store(tmp_path / "locked" / "run").open_for(RECIPE, KEYS, 1000)


def test_kernel_file_system_cannot_be_written() -> None:
    with pytest.raises(StoreError, match="cannot be"):
        Store("/proc/maodun-run").open_for(RECIPE, KEYS, 1000)


def test_full_disk_is_found_before_anything_is_kept(tmp_path: Path) -> None:
    with small_files(100_000):
        Store(tmp_path / "small").open_for(RECIPE, KEYS, 50_000)
        with pytest.raises(StoreError, match="cannot be written"):
            Store(tmp_path / "large").open_for(RECIPE, KEYS, 200_000)
    assert visible(tmp_path / "small") == [MANIFEST]
    assert visible(tmp_path / "large") == []


def test_more_than_the_disk_holds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="MiB are free"):
        Store(tmp_path / "run").open_for(RECIPE, KEYS, 2**60)
    assert visible(tmp_path / "run") == []


def test_a_failed_write_keeps_the_old_part_and_leaves_no_litter(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("part", b"old")
    with small_files(1000), pytest.raises(StoreError):
        store.write("part", b"n" * 5000)
    assert store.read("part") == b"old"
    assert visible(tmp_path) == ["part"]


def test_killed_writer_leaves_nothing_that_counts(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        from maodun.arena.store import Store
        store = Store({str(tmp_path / "run")!r})
        store.open_for({{"recipe": 1}}, ("recipe",), 10)
        open({str(tmp_path / "ready")!r}, "w").close()
        number = 0
        while True:
            store.write(f"records/part-{{number % 7}}", bytes([number % 7]) * 3_000_000)
            store.event("wrote", number=number)
            number += 1
        """
    )
    for delay in (0.0, 0.03, 0.11):
        (tmp_path / "ready").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-c", script])
        try:
            while not (tmp_path / "ready").exists():
                assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.15 + delay)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for part in (tmp_path / "run" / "records").glob("part-*"):
            assert part.read_bytes() == bytes([int(part.name[-1])]) * 3_000_000
    store = Store(tmp_path / "run")
    store.open_for({"recipe": 1}, ("recipe",), 10)
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert store.events()


def test_cut_event_line_does_not_hurt_its_neighbours(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.event("first")
    with (tmp_path / EVENTS).open("ab") as file:
        file.write(b'{"time": 1, "eve')
    store.event("second")
    assert [event["event"] for event in store.events()] == ["first", "second"]


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "bomb.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        Store(tmp_path).read_arrays("bomb.npz")
