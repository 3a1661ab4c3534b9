"""Turn a case into runnable contenders; whoever cannot be imported or refuses is reported, never hidden."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from benchmarks.cases import Case
from benchmarks.job import Attack, Job
from benchmarks.peers import stubs

Prepare = Callable[[Job], Attack]


def peer(library: str, function: str) -> Prepare:
    """Return the adapter `function` of one peer. ImportError when the library (or AUTOATTACK_SRC) is missing."""
    stubs.install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(f"benchmarks.peers.with_{library}")
    prepare: Prepare = getattr(module, function)
    return prepare


def ours(name: str, options: dict[str, Any]) -> Prepare:
    """Return our attack `name` with `options`, behind the same face as the peers."""
    from benchmarks import maodun_side

    return maodun_side.prepare(name, options)


def contenders(case: Case, *, only: set[str] | None = None) -> tuple[dict[str, Prepare], dict[str, str]]:
    """Return (runnable by label, reasons of the absent by label) for one case; `only` keeps the named labels."""
    found: dict[str, Prepare] = {}
    absent: dict[str, str] = {}
    wanted: list[tuple[str, Callable[[], Prepare]]] = [
        (label, lambda name=name, options=options: ours(name, dict(options)))
        for label, (name, options) in case.ours.items()
    ]
    wanted += [(library, lambda library=library: peer(library, case.function)) for library in case.peers]
    for label, build in wanted:
        if only and label not in only:
            continue
        try:
            found[label] = build()
        except (ImportError, AttributeError, LookupError) as error:
            absent[label] = str(error).splitlines()[0]
    return found, absent
