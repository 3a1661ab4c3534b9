"""Several classifiers that answer as one: averages, votes, and a random few of them per query."""

from __future__ import annotations

from maodun.defenses.ensembles.committee import FUSIONS, Committee, Votes, refuse_other_classes

__all__ = ["FUSIONS", "Committee", "Votes", "refuse_other_classes"]
