"""The shield: what is done in training, before the model, or instead of it, to withstand an attack."""

from __future__ import annotations

from maodun.defenses.preprocessing.base import Defended, Defense, DefenseSpec
from maodun.defenses.registry import DEFENSES, build_defense
from maodun.defenses.stack import Stack

__all__ = ["DEFENSES", "Defended", "Defense", "DefenseSpec", "Stack", "build_defense"]
