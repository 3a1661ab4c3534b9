"""Files are whole or absent: an interrupted or impossible write leaves what stood there."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from maodun.core.errors import InputError
from maodun.core.files import save_whole, weights_of, write_whole


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
