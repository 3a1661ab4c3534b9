"""Attacks on what text is made of: words."""

from __future__ import annotations

from maodun.attacks.text.substitution import Substituted, Substitution

__all__ = ["Substituted", "Substitution"]
