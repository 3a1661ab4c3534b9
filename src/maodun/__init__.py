"""Maodun (矛盾, spear and shield): every attack against every defence, and what is left standing.

`maodun.attack(model, x, y, "pgd", norm="linf", eps=8/255)` searches, `maodun.evaluate(model, data, ...)` judges, and
`maodun.DiffusionFilter(score).wrap(model)` puts the diffusion filter in front of a classifier.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maodun.arena.evaluate import attack, evaluate
    from maodun.defenses.purification import DiffusionFilter

try:
    __version__ = version("maodun")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["DiffusionFilter", "__version__", "attack", "evaluate"]


def __getattr__(name: str) -> Any:
    """Load the two doors on first use, so that importing a room does not import the whole house."""
    if name in ("attack", "evaluate"):
        from maodun.arena import evaluate as doors

        return getattr(doors, name)
    if name == "DiffusionFilter":
        from maodun.defenses.purification import DiffusionFilter as Filter

        return Filter
    raise AttributeError(f"module 'maodun' has no attribute '{name}'")
