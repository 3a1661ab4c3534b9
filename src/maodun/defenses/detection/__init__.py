"""Detection and rejection: a score, a threshold set on clean data, and a classifier that refuses what lies above it."""

from __future__ import annotations

from maodun.defenses.detection.artifact import load_detector, save_detector
from maodun.defenses.detection.base import Adversary, Answer, Detector, RejectingClassifier, Seen
from maodun.defenses.detection.comparing import FeatureSqueezing, PurifyCompare
from maodun.defenses.detection.confidence import Entropy, MaxSoftmax
from maodun.defenses.detection.features import LID, Mahalanobis, NearestNeighbours
from maodun.defenses.detection.fit import fit_detector
from maodun.defenses.detection.metrics import area_under_risk_coverage, auroc, risk_coverage
from maodun.defenses.detection.reconstruction import Reconstruction
from maodun.defenses.detection.trained import TrainedDetector

DETECTORS: tuple[type[Detector], ...] = (
    MaxSoftmax,
    Entropy,
    FeatureSqueezing,
    Mahalanobis,
    LID,
    NearestNeighbours,
    Reconstruction,
    PurifyCompare,
    TrainedDetector,
)

__all__ = [
    "DETECTORS",
    "LID",
    "Adversary",
    "Answer",
    "Detector",
    "Entropy",
    "FeatureSqueezing",
    "Mahalanobis",
    "MaxSoftmax",
    "NearestNeighbours",
    "PurifyCompare",
    "Reconstruction",
    "RejectingClassifier",
    "Seen",
    "TrainedDetector",
    "area_under_risk_coverage",
    "auroc",
    "fit_detector",
    "load_detector",
    "risk_coverage",
    "save_detector",
]
