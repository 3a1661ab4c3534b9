"""Purification by diffusion: levels, denoisers, samplers, and the filter made of them."""

from __future__ import annotations

from maodun.defenses.purification.classifier import DiffusionClassifier
from maodun.defenses.purification.denoiser import Converted, Denoiser, clean_estimate, from_eps, to_eps
from maodun.defenses.purification.gdmp import GDMP
from maodun.defenses.purification.levels import CLEAN, Levels, parse_levels, sub_vp, ve, vp, vp_discrete
from maodun.defenses.purification.likelihood import LikelihoodMaximisation
from maodun.defenses.purification.loading import load_score
from maodun.defenses.purification.presets import SAMPLERS, find_sampler
from maodun.defenses.purification.purifier import DiffusionFilter, vote
from maodun.defenses.purification.replay import Plain, Replay
from maodun.defenses.purification.samplers import Sampler, State
from maodun.defenses.purification.transfer import DistributionTransfer

PURIFIERS = (DistributionTransfer, GDMP, LikelihoodMaximisation, DiffusionClassifier)

__all__ = [
    "CLEAN",
    "GDMP",
    "PURIFIERS",
    "SAMPLERS",
    "Converted",
    "Denoiser",
    "DiffusionClassifier",
    "DiffusionFilter",
    "DistributionTransfer",
    "Levels",
    "LikelihoodMaximisation",
    "Plain",
    "Replay",
    "Sampler",
    "State",
    "clean_estimate",
    "find_sampler",
    "from_eps",
    "load_score",
    "parse_levels",
    "sub_vp",
    "to_eps",
    "ve",
    "vote",
    "vp",
    "vp_discrete",
]
