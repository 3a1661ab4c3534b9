"""Defences that change the input before the classifier sees it."""

from __future__ import annotations

from maodun.defenses.preprocessing.base import Defended, Defense, DefenseSpec, NoDefense
from maodun.defenses.preprocessing.bilateral import Bilateral
from maodun.defenses.preprocessing.bit_depth import BitDepth
from maodun.defenses.preprocessing.crop_rescale import CropRescale
from maodun.defenses.preprocessing.gaussian import Gaussian
from maodun.defenses.preprocessing.jpeg import JPEG
from maodun.defenses.preprocessing.jpeg_codec import JPEGCodec
from maodun.defenses.preprocessing.median import Median
from maodun.defenses.preprocessing.non_local_means import NonLocalMeans
from maodun.defenses.preprocessing.quilting import Quilting
from maodun.defenses.preprocessing.random_resize_pad import RandomResizePad
from maodun.defenses.preprocessing.total_variation import TotalVariation

__all__ = [
    "JPEG",
    "PREPROCESSORS",
    "Bilateral",
    "BitDepth",
    "CropRescale",
    "Defended",
    "Defense",
    "DefenseSpec",
    "Gaussian",
    "JPEGCodec",
    "Median",
    "NoDefense",
    "NonLocalMeans",
    "Quilting",
    "RandomResizePad",
    "TotalVariation",
]

PREPROCESSORS: tuple[type[Defense], ...] = (
    NoDefense,
    BitDepth,
    Median,
    Gaussian,
    Bilateral,
    NonLocalMeans,
    TotalVariation,
    JPEG,
    JPEGCodec,
    RandomResizePad,
    CropRescale,
    Quilting,
)
