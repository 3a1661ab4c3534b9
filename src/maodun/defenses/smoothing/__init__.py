"""Randomised smoothing: a classifier's vote under Gaussian noise, and the l2 radius in which it cannot change."""

from __future__ import annotations

from maodun.defenses.smoothing.bounds import largest_radius, lower_bound, radius
from maodun.defenses.smoothing.certificate import ABSTAIN, Certificate, certify, predict
from maodun.defenses.smoothing.denoise import Denoise, matching_level
from maodun.defenses.smoothing.noise import GaussianNoise
from maodun.defenses.smoothing.votes import count_votes

__all__ = [
    "ABSTAIN",
    "Certificate",
    "Denoise",
    "GaussianNoise",
    "certify",
    "count_votes",
    "largest_radius",
    "lower_bound",
    "matching_level",
    "predict",
    "radius",
]
