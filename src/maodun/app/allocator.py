"""Keep freed memory for the next call instead of handing it back to the system each time."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for its parameters, glibc's malloc.h
_KEEP = 1 << 30


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
