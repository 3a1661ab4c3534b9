"""Purification by diffusion: levels, denoisers, samplers, and the filter made of them."""

from __future__ import annotations

from maodun.defenses.purification.denoiser import Converted, Denoiser, clean_estimate, from_eps, to_eps
from maodun.defenses.purification.levels import CLEAN, Levels, parse_levels, sub_vp, ve, vp, vp_discrete
from maodun.defenses.purification.purifier import DiffusionFilter, vote
from maodun.defenses.purification.samplers import SAMPLERS, Sampler, State, find_sampler

__all__ = [
    "CLEAN",
    "SAMPLERS",
    "Converted",
    "Denoiser",
    "DiffusionFilter",
    "Levels",
    "Sampler",
    "State",
    "clean_estimate",
    "find_sampler",
    "from_eps",
    "parse_levels",
    "sub_vp",
    "to_eps",
    "ve",
    "vote",
    "vp",
    "vp_discrete",
]
