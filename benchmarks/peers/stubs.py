"""Stand-ins for modules that peers import at load time and never use in the attacks measured here.

adv-lib imports `torchvision.models` (for LPIPS) and `visdom` (for live plots). torchvision's wheels do not load
beside a CPU-only torch, and visdom's source package does not build; neither is touched by an attack.
"""

from __future__ import annotations

import importlib.util
import sys
import types


def install() -> None:
    """Register empty `torchvision` and `visdom` modules where the real ones are not installed."""
    if "torchvision" not in sys.modules and importlib.util.find_spec("torchvision") is None:
        torchvision = types.ModuleType("torchvision")
        models = types.ModuleType("torchvision.models")
        torchvision.models = models  # type: ignore[attr-defined]
        sys.modules["torchvision"], sys.modules["torchvision.models"] = torchvision, models
    if "visdom" not in sys.modules and importlib.util.find_spec("visdom") is None:
        visdom = types.ModuleType("visdom")
        visdom.Visdom = type("Visdom", (), {})  # type: ignore[attr-defined]
        sys.modules["visdom"] = visdom
