"""What a process that attacks should settle once, before torch is imported: freed memory and idle threads."""

from __future__ import annotations

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for its parameters, glibc's malloc.h
_KEEP = 1 << 30


def let_idle_threads_sleep() -> None:
    """Have OpenMP's idle threads sleep instead of spin, unless the user says otherwise; must precede torch's import.

    Spinning threads on a machine that does anything else cost a small network more than ten times its own work.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks up to 1 GiB; returns whether it did (False where there is no glibc).

    An attack frees and takes the same activations thousands of times. By default glibc maps every large block anew, and
    the page faults cost a quarter of an input gradient on a small ResNet (benchmarks/README.md). The setting holds for
    the whole process and costs at most the peak already reached, so programs call it, and libraries do not.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _KEEP)) and bool(mallopt(_TRIM_THRESHOLD, _KEEP))
