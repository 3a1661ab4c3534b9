"""What several test files share: the command line, called as a user calls it, and the place of the real data."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from maodun.app import cli
from maodun.app.process import keep_freed_memory

torch.set_num_threads(1)
keep_freed_memory()


@dataclass(frozen=True)
class Outcome:
    """What a command line gave back."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The single line of an expected error; fails when there is another number of lines."""
        lines = self.err.strip().splitlines()
        assert self.code == 2, (self.code, self.out, self.err)
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0]


@pytest.fixture
def maodun(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the command line in this process: the same function the installed command calls."""

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = cli.run([str(word) for word in words])
        captured = capfd.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder MAODUN_DATA points at; the test is skipped when there is none."""
    place = os.environ.get("MAODUN_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("MAODUN_DATA is not set to a folder of real data")
    return Path(place)
