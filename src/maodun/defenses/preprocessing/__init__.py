"""Defences that change the input before the classifier sees it."""

from __future__ import annotations

from maodun.defenses.preprocessing.base import Defended, Defense, DefenseSpec, NoDefense
from maodun.defenses.preprocessing.bit_depth import BitDepth
from maodun.defenses.preprocessing.jpeg import JPEG
from maodun.defenses.preprocessing.median import Median
from maodun.defenses.preprocessing.random_resize_pad import RandomResizePad

__all__ = ["JPEG", "BitDepth", "Defended", "Defense", "DefenseSpec", "Median", "NoDefense", "RandomResizePad"]
