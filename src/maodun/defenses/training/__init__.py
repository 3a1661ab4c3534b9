"""Defences that are a way of training: objectives, and the one loop they all run in."""

from __future__ import annotations

from maodun.defenses.training.ace import ACE, calibration_term, complement_term, entropy_term
from maodun.defenses.training.adp import ADP
from maodun.defenses.training.adversarial import Adversarial
from maodun.defenses.training.augment import CutMix, NoAugmentation, ShiftFlip
from maodun.defenses.training.awp import AWP
from maodun.defenses.training.distillation import Distillation, soft_labels
from maodun.defenses.training.dkl import DKL
from maodun.defenses.training.embedding import (
    EmbeddingAdversarial,
    EmbeddingNoise,
    EmbeddingObjective,
    Trim,
    VirtualAdversarial,
)
from maodun.defenses.training.fast import Free, NoisyFGSM
from maodun.defenses.training.fit import FitReport, fit, split_holdout
from maodun.defenses.training.inner import Inner
from maodun.defenses.training.input_gradient import InputGradient
from maodun.defenses.training.mart import MART
from maodun.defenses.training.objective import Batch, Crafter, Objective, Standard
from maodun.defenses.training.pgd_at import AdversarialTraining, MixedTraining
from maodun.defenses.training.score import SCORE
from maodun.defenses.training.settings import FitSettings
from maodun.defenses.training.trades import TRADES
from maodun.defenses.training.uad import UAD

__all__ = [
    "ACE",
    "ADP",
    "AWP",
    "DKL",
    "MART",
    "SCORE",
    "TRADES",
    "UAD",
    "Adversarial",
    "AdversarialTraining",
    "Batch",
    "Crafter",
    "CutMix",
    "Distillation",
    "EmbeddingAdversarial",
    "EmbeddingNoise",
    "EmbeddingObjective",
    "FitReport",
    "FitSettings",
    "Free",
    "Inner",
    "InputGradient",
    "MixedTraining",
    "NoAugmentation",
    "NoisyFGSM",
    "Objective",
    "ShiftFlip",
    "Standard",
    "Trim",
    "VirtualAdversarial",
    "calibration_term",
    "complement_term",
    "entropy_term",
    "fit",
    "soft_labels",
    "split_holdout",
]
