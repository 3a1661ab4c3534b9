"""How much memory a piece of work needed at its highest, as far as this system tells."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Self

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """A context that measures the highest memory in use while it lasts, in MiB: `mebibytes` once it is left.

    On a CUDA `device` it is what torch allocated there; elsewhere the resident set of the whole process, interpreter
    and libraries included (Linux: within the context; macOS: since the process began; other systems: 0).
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None
        self.mebibytes = 0.0

    def __enter__(self) -> Self:
        if self.device is not None:
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            with contextlib.suppress(OSError):  # a container may forbid it; then the peak is the process's own
                _CLEAR.write_text("5")
        return self

    def __exit__(self, *problem: object) -> None:
        self.mebibytes = self._peak()

    def _peak(self) -> float:
        if self.device is not None:
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if _STATUS.exists():
            line = next((each for each in _STATUS.read_text().splitlines() if each.startswith("VmHWM")), "")
            return int(line.split()[1]) / 2**10 if line else 0.0
        if sys.platform == "darwin":
            import resource

            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return 0.0
