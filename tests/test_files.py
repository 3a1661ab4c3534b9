"""Files are whole or absent: an interrupted or impossible write leaves what stood there."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
import torch

from maodun.core.errors import InputError
from maodun.core.files import load_checkpoint, save_whole, weights_of, write_whole


def test_writes_makes_the_folder_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    file = write_whole(tmp_path / "a" / "b.bin", b"one")
    assert write_whole(file, b"two").read_bytes() == b"two"
    assert [path.name for path in file.parent.iterdir()] == ["b.bin"]


def test_a_full_disk_keeps_the_old_file_and_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_whole(tmp_path / "run.ckpt", b"old")

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("maodun.core.files.os.fsync", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_whole(file, {"weights": torch.zeros(3)})
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["run.ckpt"]


def test_what_is_saved_reads_back_without_running_code(tmp_path: Path) -> None:
    file = save_whole(tmp_path / "x.pt", {"history": [{"loss": 0.5}], "weights": torch.arange(3)})
    back = torch.load(file, weights_only=True)
    assert back["history"] == [{"loss": 0.5}]
    assert torch.equal(back["weights"], torch.arange(3))


def test_weights_keep_integers_and_round_the_rest() -> None:
    from safetensors.torch import load

    model = torch.nn.BatchNorm1d(2)
    state = load(weights_of(model, torch.float16))
    assert state["weight"].dtype == torch.float16
    assert state["num_batches_tracked"].dtype == torch.int64


def test_two_that_write_one_file_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "manifest.json", os.fsync
    there: list[int] = []

    def between(number: int) -> None:
        # While one is about to rename, another writes the same file from beginning to end.
        real(number)
        monkeypatch.setattr(os, "fsync", real)
        write_whole(file, b"second")
        there.append(len(list(tmp_path.iterdir())))

    monkeypatch.setattr(os, "fsync", between)
    write_whole(file, b"first")
    assert there == [2]
    assert file.read_bytes() == b"first"
    assert [each.name for each in tmp_path.iterdir()] == ["manifest.json"]


def test_what_a_killed_process_left_long_ago_is_removed(tmp_path: Path) -> None:
    for name, age in (("a.ckpt.0123.part", 7200), ("a.ckpt.4567.part", 60), ("b.ckpt.0123.part", 7200)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_whole(tmp_path / "a.ckpt", b"whole")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.ckpt", "a.ckpt.4567.part", "b.ckpt.0123.part"]


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    file = save_whole(tmp_path / "run.ckpt", {"signature": "a", "model": torch.arange(3)})
    assert load_checkpoint(file)["signature"] == "a"
    whole = file.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"checkpoint '.*run.ckpt': cannot be read: it is damaged.*--restart"):
            load_checkpoint(file)
    with pytest.raises(InputError, match="no training that could go on"):
        load_checkpoint(save_whole(tmp_path / "other.pt", {"weights": torch.arange(3)}))
