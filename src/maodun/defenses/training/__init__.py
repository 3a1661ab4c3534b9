"""Defences that are a way of training: objectives, and the one loop they all run in."""

from __future__ import annotations

from maodun.defenses.training.augment import NoAugmentation, ShiftFlip
from maodun.defenses.training.distillation import Distillation, soft_labels
from maodun.defenses.training.fit import FitReport, FitSettings, fit, split_holdout
from maodun.defenses.training.inner import Inner
from maodun.defenses.training.objective import Batch, Crafter, Objective, Standard
from maodun.defenses.training.pgd_at import AdversarialTraining

__all__ = [
    "AdversarialTraining",
    "Batch",
    "Crafter",
    "Distillation",
    "FitReport",
    "FitSettings",
    "Inner",
    "NoAugmentation",
    "Objective",
    "ShiftFlip",
    "Standard",
    "fit",
    "soft_labels",
    "split_holdout",
]
