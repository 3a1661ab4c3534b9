"""Measure Maodun beside its peers: time, calls, strength and memory.

Importing this package fixes the environment of the measurement before torch is loaded: one thread, and OpenMP
workers that sleep instead of spinning (spinning workers made wall times of the same work differ by 12x on a shared
two-core machine).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
