"""Which attacks are compared, with which published parameters, and against whom.

A contender is named by `module.function` in `benchmarks.peers`; a star marks one that does different work at the same
parameters (no binary search, never drops a sample, ...): it is shown and never sets the bar.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PEERS = ("torchattacks", "advlib", "foolbox", "art", "autoattack")


@dataclass(frozen=True)
class Case:
    """One attack: its norm, its parameters, the peers' function name, and the options of ours that mean the same.

    `minimum` attacks are scored by success and median distance, the others by robust accuracy at eps. `ours` maps a
    label to (attack name in maodun's registry, options); the label always starts with "maodun".
    """

    name: str
    norm: str
    function: str
    peers: tuple[str, ...]
    options: Mapping[str, Any]
    ours: Mapping[str, tuple[str, Mapping[str, Any]]]
    minimum: bool = False
    not_comparable: Mapping[str, str] = field(default_factory=dict)
    heavy: bool = False


def _pgd(name: str, norm: str, steps: int, peers: tuple[str, ...]) -> Case:
    rel = 2.5 / steps
    ours = {
        "maodun": ("pgd", {"steps": steps, "rel_step": rel}),
        "maodun same calls": ("pgd", {"steps": steps, "rel_step": rel, "stop_early": False}),
    }
    return Case(name, norm, "pgd", peers, {"steps": steps, "rel_step": rel}, ours)


def _apgd(name: str, norm: str, function: str, peers: tuple[str, ...], **ours: Any) -> Case:
    options = {"steps": 100} | ({"targets": 9} if function == "apgd_t" else {})
    attack = "apgd-t" if function == "apgd_t" else "apgd"
    variants = {
        "maodun": (attack, {"steps": 100, **ours}),
        "maodun same calls": (attack, {"steps": 100, "stop_early": False, **ours}),
    }
    return Case(name, norm, function, peers, options, variants, heavy=function == "apgd_t")


_CW = {"steps": 100, "searches": 5, "lr": 0.01, "const": 1.0}
_NO_DROP = "keeps attacking misclassified and already fooled samples"

CASES: tuple[Case, ...] = (
    Case("fgsm", "linf", "fgsm", ("torchattacks", "foolbox", "art"), {"steps": 1}, {"maodun": ("fgsm", {})}),
    _pgd("pgd10", "linf", 10, ("torchattacks", "advlib", "foolbox", "art")),
    _pgd("pgd40", "linf", 40, ("torchattacks", "advlib", "foolbox", "art")),
    _pgd("pgd40-l2", "l2", 40, ("torchattacks", "foolbox", "art")),
    Case(
        "mifgsm10", "linf", "mifgsm", ("torchattacks", "foolbox", "art"), {"steps": 10, "rel_step": 0.1},
        {"maodun": ("mifgsm", {"steps": 10, "rel_step": 0.1})},
    ),
    Case(
        "nifgsm10", "linf", "nifgsm", ("torchattacks",), {"steps": 10, "rel_step": 0.1},
        {"maodun": ("nifgsm", {"steps": 10, "rel_step": 0.1})},
    ),
    _apgd("apgd-ce", "linf", "apgd_ce", ("torchattacks", "advlib", "autoattack", "art"), loss="ce"),
    _apgd("apgd-dlr", "linf", "apgd_dlr", ("torchattacks", "advlib", "autoattack"), loss="dlr"),
    _apgd("apgd-ce-l2", "l2", "apgd_ce", ("torchattacks", "advlib", "autoattack"), loss="ce"),
    _apgd("apgd-ce-l1", "l1", "apgd_ce", ("advlib", "autoattack"), loss="ce", larger_eps=True),
    _apgd("apgd-t", "linf", "apgd_t", ("torchattacks", "advlib", "autoattack"), targets=9),
    Case(
        "deepfool-l2", "l2", "deepfool", ("advlib", "foolbox", "torchattacks", "art"), {"steps": 50},
        {"maodun": ("deepfool", {"steps": 50})}, minimum=True,
        not_comparable={"art": "one backward per class and sample for all 50 steps"},
    ),
    Case(
        "deepfool-linf", "linf", "deepfool", ("advlib", "foolbox"), {"steps": 50},
        {"maodun": ("deepfool", {"steps": 50})}, minimum=True,
    ),
    Case(
        "cw-l2", "l2", "cw", ("advlib", "foolbox", "torchattacks"), _CW,
        {"maodun": ("cw", {"steps": 100, "searches": 5, "lr": 0.01, "initial_const": 1.0})}, minimum=True,
        not_comparable={"torchattacks": "one search at c = 1, no binary search"},
    ),
    Case(
        "ddn-l2", "l2", "ddn", ("advlib", "foolbox"), {"steps": 100}, {"maodun": ("ddn", {"steps": 100})},
        minimum=True,
    ),
    Case(
        "fmn-l2", "l2", "fmn", ("advlib", "foolbox"), {"steps": 100, "alpha": 1.0},
        {"maodun": ("fmn", {"steps": 100})}, minimum=True,
    ),
    Case(
        "fmn-linf", "linf", "fmn", ("advlib", "foolbox"), {"steps": 100, "alpha": 10.0},
        {"maodun": ("fmn", {"steps": 100})}, minimum=True,
    ),
    Case(
        "fab-t", "linf", "fab_t", ("torchattacks", "autoattack", "advlib"), {"steps": 100, "targets": 9},
        {"maodun": ("fab", {"steps": 100, "targets": 9, "enough": "eps"})},
        not_comparable={"advlib": _NO_DROP}, heavy=True,
    ),
    Case(
        "square", "linf", "square", ("torchattacks", "autoattack", "art"), {"queries": 5000},
        {"maodun": ("square", {"queries": 5000})}, heavy=True,
    ),
    Case(
        "square-l2", "l2", "square", ("torchattacks", "autoattack", "art"), {"queries": 5000},
        {"maodun": ("square", {"queries": 5000})}, heavy=True,
    ),
    Case(
        "hopskipjump", "l2", "hopskipjump", ("foolbox", "art"), {"steps": 10, "draws": 100},
        {"maodun": ("hopskipjump", {"steps": 10, "draws": 100})}, minimum=True, heavy=True,
    ),
    Case(
        "hopskipjump-linf", "linf", "hopskipjump", ("foolbox", "art"), {"steps": 10, "draws": 100},
        {"maodun": ("hopskipjump", {"steps": 10, "draws": 100}), "maodun rays": ("rays", {"queries": 2500})},
        minimum=True, heavy=True,
    ),
    Case(
        "boundary", "l2", "boundary", ("foolbox",), {"steps": 2000}, {"maodun": ("boundary", {"steps": 2000})},
        minimum=True, heavy=True,
    ),
    Case(
        "geoda", "l2", "geoda", ("art",), {"queries": 2000}, {"maodun": ("geoda", {"queries": 2000})},
        minimum=True, heavy=True,
    ),
    Case(
        "simba", "l2", "simba", ("art",), {"queries": 1000}, {"maodun": ("simba", {"queries": 1000})},
        not_comparable={"art": "knows no radius: stops at the first success, however far"}, heavy=True,
    ),
    Case(
        "spsa", "linf", "spsa", ("torchattacks",), {"steps": 20, "samples": 64},
        {"maodun": ("spsa", {"steps": 20, "samples": 64})}, heavy=True,
    ),
    Case(
        "standard", "linf", "standard", ("torchattacks", "autoattack"), {},
        {"maodun": ("autoattack", {}), "maodun sharp": ("sharp", {})},
        heavy=True,
    ),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}

QUICK = {"steps": 10, "queries": 100, "searches": 2}
"""Lengths that `--quick` puts in place of the published ones: a check that everything runs, not a measurement."""


def shortened(case: Case) -> Case:
    """Return the case with the lengths of `QUICK` wherever it names one of them."""

    def cut(options: Mapping[str, Any]) -> dict[str, Any]:
        return {k: min(v, QUICK[k]) if k in QUICK else v for k, v in options.items()}

    ours = {label: (name, cut(options)) for label, (name, options) in case.ours.items()}
    options = cut(case.options)
    if case.function == "standard":
        options = {"steps": QUICK["steps"], "queries": QUICK["queries"]}
        ours = {label: (name, {**given, **options}) for label, (name, given) in ours.items()}
    return Case(
        case.name, case.norm, case.function, case.peers, options, ours, case.minimum, case.not_comparable, case.heavy
    )
