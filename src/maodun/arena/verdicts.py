"""What the trials amount to for one shield: it holds, it is not shown to hold, or it is masked, and by how much."""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.arena.indicators import agreement, plane
from maodun.arena.laboratory import STEPS, Laboratory, stronger
from maodun.arena.metrics import rate
from maodun.arena.remedies import Remedy
from maodun.arena.summary import Diagnosis, Finding, Rate, Surface, Trial

# Several remedies are compared with one attack, so each must be surer than a single comparison would: 1 in 100.
SURE = 0.01
CLOSE = 0.02
_LEVELS = {"holds": "ok", "not shown": "warning", "masked": "alarm"}


def trial(lab: Laboratory, remedy: Remedy) -> tuple[Trial, Tensor]:
    """Run a remedy and compare it, sample by sample, with the plain attack; returns it and who fell (n,)."""
    fell = remedy.run()
    only, other, p = stronger(fell, lab.plain())
    standing = rate(lab.n - int(fell.sum()), lab.n)
    return Trial(name=remedy.name, mends=remedy.mends, standing=standing, only=only, missed=other, p=p), fell


def decide(lab: Laboratory, found: list[Finding], tried: list[tuple[Trial, Tensor]]) -> tuple[Diagnosis, Finding]:
    """Return the diagnosis of a shield under one norm, and its sentence as a finding.

    Masked: some remedy fells more than the plain attack, with p < 0.01 in the sign test; the bound is what is left by
    all trials together. Not shown: no remedy helps, but a check rings. Holds: neither.
    """
    fallen = torch.stack([lab.plain(), *(fell for _, fell in tried)]).any(0)
    bound, plain = rate(lab.n - int(fallen.sum()), lab.n), rate(lab.n - int(lab.plain().sum()), lab.n)
    better = [each for each, _ in tried if each.p < SURE]
    rings = sorted((each for each in found if each.level in ("alarm", "warning")), key=lambda each: each.level)
    alarms = [each for each in rings if each.level == "alarm"]
    standing = f"{_of(plain, lab.n)} of {lab.n} samples stand against PGD on the cross-entropy with {STEPS} steps"
    words = f"{100 * bound.value:.1f} % [{100 * bound.low:.1f}, {100 * bound.high:.1f}]"
    if better:
        least = min(each.standing.value for each in better)
        # Of remedies about as good as the best, the first, which is the simplest.
        best = next(each for each in better if each.standing.value <= least + CLOSE)
        verdict, first = "masked", (alarms or rings)[0] if rings else None
        sentence = (
            f"Masked: {standing}, {_of(best.standing, lab.n)} when {best.mends}, and {_of(bound, lab.n)} against all "
            f"trials together, so the real number is at most {words}"
        )
        action = f"Quote no attack weaker than '{best.name}'" + (f"; {first.action}" if first else ".")
    elif alarms and bound.value > 0:
        verdict = "not shown"
        sentence = f"Not shown to hold: {standing}, but the attack is doubted ({alarms[0].name.replace('_', ' ')})"
        action = f"{alarms[0].sentence.rpartition(' (')[0]}: {alarms[0].action}"
    else:
        verdict, action = "holds", ""
        rest = "" if bound.value == plain.value else f", {_of(bound, lab.n)} against all trials together"
        # With nobody left standing it is the number that holds, not the defence.
        left = "Holds" if bound.value > 0 else "The number holds, there is nothing a mask could hide"
        sentence = f"{left}: {standing}{rest}, and no check has found the attack blind"
    diagnosis = Diagnosis(
        shield=lab.shield.label,
        norm=lab.threat.norm,
        eps=lab.threat.eps,
        verdict=verdict,
        sentence=sentence + ".",
        action=action,
        plain=plain,
        bound=bound,
        trials=[each for each, _ in tried],
        agreement=agreement(lab) if not lab.shield.stochastic else [],
        surface=surface(lab),
    )
    told = Finding(
        name="verdict",
        level=_LEVELS[verdict],
        shield=lab.shield.label,
        spear=lab.spear,
        sentence=f"{sentence} ({lab.threat.norm}, n = {lab.n}).",
        action=action,
    )
    return diagnosis, told


def _of(share: Rate, n: int) -> int:
    return round(share.value * n)


def surface(lab: Laboratory) -> Surface:
    """Return the slice of the margin around one sample."""
    sample, places, values = plane(lab)
    return Surface(sample_id=sample, places=places, margins=values)
