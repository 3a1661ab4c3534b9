"""The ladder of attacks on a stochastic shield: every rung under every rule, and which rung a number may rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from maodun.arena.metrics import CONFIDENCE, rate
from maodun.arena.recipe import SpearSpec
from maodun.arena.summary import Finding, Ladder, LadderRow, Rate
from maodun.core.engine import Attack
from maodun.defenses import DefenseSpec

if TYPE_CHECKING:
    from maodun.arena.account import Records

Columns = Mapping[str, NDArray[Any]]

RUNGS = {
    0: "static: examples of other models",
    1: "BPDA",
    2: "surrogate process",
    3: "adjoint",
    4: "exact gradient",
    5: "selective and deviating losses",
    6: "unseen threats and queries",
    7: "seed known",
}
RESUBMISSIONS = (1, 2, 5, 10, 50)
MAIN = (4, 5)
_SELECTIVE = ("diffhammer", "diffattack")
# Other threats than the ball's strongest: slow waves (displacements have a norm of their own).
_UNSEEN = ("lowfreq",)
_GRADIENTS = {"bpda": 1, "surrogate": 2, "adjoint": 3}
# Fewer draws than this leave the mean gradient of a purifier mostly noise (DiffBreak: it settles near 64).
_FEW = 10


def rung(spear: SpearSpec, attack: Attack[Any], norm: str) -> int:
    """Return a spear's rung, a key of RUNGS; BPDA for broken parts only is the exact gradient of all others, so 4."""
    if spear.surrogate:
        return 0
    if spear.seed_known:
        return 7
    if attack.access != "gradient" or spear.gradient in ("nes", "spsa") or norm == "flow" or attack.name in _UNSEEN:
        return 6
    if attack.name in _SELECTIVE:
        return 5
    if spear.gradient == "bpda" and spear.gradient_options.get("every") is False:
        return 4
    return _GRADIENTS.get(spear.gradient, 4)


def evaluations(model: nn.Module) -> int:
    """Return the network evaluations that the defences inside `model` make for one answer, the classifier's aside."""
    specs = [getattr(module, "spec", None) for module in model.modules()]
    return sum(spec.nfe for spec in specs if isinstance(spec, DefenseSpec))


def share(total: float, n: int) -> Rate:
    """Return total / n with an interval, where `total` adds up `n` numbers in [0, 1].

    No such sum varies more than one of zeros and ones, so Clopper and Pearson's interval, whose quantiles of the beta
    distribution exist for any total, is conservative here.
    """
    from scipy.stats import beta

    if n == 0:
        return rate(0, 0)
    tail = (1 - CONFIDENCE) / 2
    low = 0.0 if total <= 0 else float(beta.ppf(tail, total, n - total + 1))
    high = 1.0 if total >= n else float(beta.ppf(1 - tail, total + 1, n - total))
    return Rate(value=total / n, low=low, high=high, n=n)


def survival(fooled: NDArray[np.int64], draws: int, tries: int) -> NDArray[np.float64]:
    """Return per sample the chance that `tries` of its `draws` fresh draws, taken at random, fool nobody (N,).

    C(draws - fooled, tries) / C(draws, tries): the unbiased estimate of (1 - p) ** tries. Needs tries <= draws.
    """
    standing = np.ones(len(fooled))
    for place in range(tries):
        standing *= np.maximum(draws - fooled - place, 0) / (draws - place)
    return standing


def rules(fooled: NDArray[np.int64], draws: int, mean_wrong: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the four rules' robust accuracies and the resubmission curve from counts of fooled draws (N,).

    single: a fresh draw, estimated by all of them. mean: the class of the mean probabilities. majority: wrong when at
    least half of the draws are. worst: wrong when any is. The curve gives (R, accuracy) for R free tries up to `draws`.
    """
    n = len(fooled)
    return {
        "single": share(float((1.0 - fooled / draws).sum()), n),
        "mean": rate(int((~mean_wrong).sum()), n),
        "majority": rate(int((2 * fooled < draws).sum()), n),
        "worst": rate(int((fooled == 0).sum()), n),
        "resubmission": [
            (tries, float(survival(fooled, draws, tries).mean())) for tries in RESUBMISSIONS if tries <= draws
        ],
    }


def ladders(
    cells: Sequence[Records], shields: Mapping[str, Mapping[str, str]], clean: Mapping[str, Columns]
) -> Iterator[Ladder]:
    """Yield a ladder per stochastic shield and threat, rungs upwards; `clean` are the shields' clean passes."""
    places = dict.fromkeys(records.place for records in cells)
    for place in places:
        shield, norm, eps, targeted = place
        if shields.get(shield, {}).get("stochastic") != "yes":
            continue
        own = [records for records in cells if records.place == place and "rung" in records.about]
        rows = sorted((_row(records) for records in own), key=lambda row: row.rung)
        if rows:
            first = [] if targeted or shield not in clean else [_clean_row(clean[shield])]
            yield Ladder(shield=shield, norm=norm, eps=eps, targeted=targeted, rows=[*first, *rows])


def _row(records: Records) -> LadderRow:
    about, columns = records.about, records.columns
    draws = int(columns["draws"].max())
    fooled, known = columns["success_draws"].astype(np.int64), None
    if about["rung"] == 7 and "draw_flags" in columns and draws > 1:
        # The first draw is the one the adversary knew; the others say whether that helps against new ones.
        known = rate(int((~columns["draw_flags"][:, 0]).sum()), len(fooled))
        fooled, draws = fooled - columns["draw_flags"][:, 0], draws - 1
    aim = columns["label"] if not about["targeted"] else columns["target"]
    wrong = (columns["adv_pred"] == aim) if about["targeted"] else (columns["adv_pred"] != aim)
    n = max(1, len(fooled))
    calls = float(columns["forwards"].mean())
    return LadderRow(
        rung=about["rung"],
        title=RUNGS[about["rung"]],
        spear=about["spear"],
        cell=about["name"],
        draws=draws,
        eot=about.get("eot", 1),
        known=known,
        forwards=calls,
        backwards=float(columns["backwards"].mean()),
        # What a search on other models asked, it asked of them.
        nfe=0.0 if about["surrogates"] else calls * about.get("nfe", 0),
        seconds=float(columns["seconds"].sum()) / n,
        memory=float(columns["memory"].max()) if "memory" in columns else None,
        **rules(fooled, draws, np.asarray(wrong)),
    )


def _clean_row(columns: Columns) -> LadderRow:
    draws = columns["draw_preds"]
    fooled = (draws != columns["label"][:, None]).sum(1)
    return LadderRow(
        rung=-1, title="no attack", spear="", cell="", draws=draws.shape[1], eot=1, known=None, forwards=0.0,
        backwards=0.0, nfe=0.0, seconds=0.0, memory=None,
        **rules(fooled, draws.shape[1], columns["pred"] != columns["label"]),
    )  # fmt: skip


def weak_rungs(found: Sequence[Ladder]) -> Iterator[Finding]:
    """Yield a warning for every ladder whose number rests on a rung that cannot carry it.

    That is: no exact gradient at all, an exact one with too few draws, and a rung below the main ones (or a query)
    that leaves less standing than they do, beyond both intervals.
    """
    for ladder in found:
        rows = [row for row in ladder.rows if row.rung >= 0]
        main = [row for row in rows if row.rung in MAIN]
        lowest = min(rows, key=lambda row: row.majority.value)
        if lowest.majority.value == 0:
            continue  # nothing is left that could be overstated
        quoted = f"{100 * lowest.majority.value:.1f} % (majority of {lowest.draws}) at {_threat(ladder)}"
        if not main:
            highest = max(row.rung for row in rows if row.rung != 7) if any(row.rung != 7 for row in rows) else 7
            yield _warning(
                ladder,
                f"{quoted} rests on no rung above '{RUNGS[highest]}': nobody has followed the shield's own gradient, "
                "so it is an upper bound and no robustness.",
                "Add spears with gradient: exact and eot: 20 or more, losses ce, margin and dlr.",
            )
            continue
        if max(row.eot for row in main) < _FEW:
            most = max(row.eot for row in main)
            yield _warning(
                ladder,
                f"{quoted} rests on gradients of {most} draws, too few to see through the shield's noise.",
                "Raise eot to 20, and once to 64.",
            )
        best = min(main, key=lambda row: row.majority.value)
        for row in rows:
            if row.rung not in MAIN and row.rung != 7 and row.majority.high < best.majority.low:
                yield _warning(
                    ladder,
                    f"{row.spear} ({row.title}) leaves {100 * row.majority.value:.1f} % standing, less than the exact "
                    f"gradient's {100 * best.majority.value:.1f} %.",
                    "The main rung is not tuned: more steps, restarts or draws, another loss or step size.",
                )


def _threat(ladder: Ladder) -> str:
    from maodun.arena.recipe import format_radius

    return f"{ladder.norm} {format_radius(ladder.eps)}"


def _warning(ladder: Ladder, text: str, action: str) -> Finding:
    return Finding(name="weak_rung", level="warning", shield=ladder.shield, spear=None, sentence=text, action=action)
