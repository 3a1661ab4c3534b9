"""Is the attack blind? Cheap trials on a small fixed subset, each ending in a sentence with the next action.

Indicators after Athalye et al. (ICML 2018), Carlini et al. (arXiv 1902.06705), Pintor et al. (NeurIPS 2022)
and Croce and Hein (ICML 2020). On by default, before the attacks.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maodun.arena.fallback import bare
from maodun.arena.indicators import finding, finite_differences, incomplete, jumps, silent_success, unstable
from maodun.arena.laboratory import (
    STEPS,
    SUBSET,
    THOROUGH,
    Laboratory,
    everything,
    stronger,
    trial_threat,
)
from maodun.arena.metrics import rate
from maodun.arena.plan import slug
from maodun.arena.recipe import SpearSpec, format_radius
from maodun.arena.remedies import Remedy, beyond_jumps, blind_attack, remedies, twin_attack
from maodun.arena.setup import Arena, Shield
from maodun.arena.summary import Diagnosis, Finding, Trial
from maodun.arena.verdicts import decide, trial
from maodun.attacks.gradient.pgd import FGSM, PGD
from maodun.core.engine import Attack

_QUERIES = 200
_TEMPERATURES = (0.01, 0.1, 10.0, 100.0)
_DISAGREE = 0.1
_ADAPT = "Use gradient: bpda or an exact gradient of the defence, and add a query attack such as square."


def findings_name(shield: str) -> str:
    """Return the store's name for a shield's findings."""
    return f"findings/{slug(shield)}-{hashlib.sha256(shield.encode()).hexdigest()[:6]}.json"


def diagnosis_name(shield: str) -> str:
    """Return the store's name for a shield's diagnoses."""
    return findings_name(shield).replace("findings/", "diagnoses/", 1)


@dataclass(frozen=True)
class Examination:
    """What was found out about a shield: a finding per check, and per norm a diagnosis with its trials."""

    findings: list[Finding]
    diagnoses: list[Diagnosis]


def diagnose(arena: Arena, shield: Shield) -> list[Finding]:
    """Return the findings of `examine`."""
    return examine(arena, shield).findings


def examine(arena: Arena, shield: Shield) -> Examination:
    """Try `shield` under every norm of the recipe, through the gradient estimators of its spears.

    Every estimator has its gradients looked at; the trials with attacks go through the most adaptive one only, and end
    in a verdict. The remedies beyond the usual trials are run when a check rings, or when the recipe asks for thorough
    diagnostics, which look at twice as many samples. Returns one finding per check, and one that says what the
    checks cost.
    """
    started, found, diagnoses = time.perf_counter(), [], []
    forwards = backwards = 0
    for laboratory in _laboratories(arena, shield):
        own = []
        for check in LOOKS + (_trials(laboratory) if laboratory.adaptive else ()):
            told = check(laboratory)
            if told is not None:
                own.append(told)
        if laboratory.adaptive and laboratory.threat.norm in PGD.norms:
            diagnosis, verdict = decide(laboratory, own, tried(laboratory, own))
            diagnoses.append(diagnosis)
            own.append(verdict)
        found += own
        forwards, backwards = forwards + laboratory.forwards, backwards + laboratory.backwards
    seconds = time.perf_counter() - started
    sentence = f"These checks cost {forwards} forwards, {backwards} backwards and {seconds:.1f} s in all."
    cost = Finding(name="cost", level="ok", shield=shield.label, spear=None, sentence=sentence, action="")
    return Examination([*found, *seen_before(arena, shield), cost], diagnoses)


def tried(lab: Laboratory, found: list[Finding]) -> list[tuple[Trial, Tensor]]:
    """Return the trials that may show a mask, with who fell: the usual ones, and every remedy where there is reason."""
    scale, blind = best_temperature(lab), blind_attack(lab, _QUERIES)
    usual = [
        Remedy("dlr", "the loss is a ratio of logits (DLR)", lambda: lab.fell(_many("dlr"))),
        Remedy("logit scale", f"logits are divided by {scale:g}", lambda: lab.fell(_many(), temperature=scale)),
        Remedy(blind.name, "gradients are not used at all", lambda: lab.fell(blind)),
    ]
    doubted = any(each.level in ("alarm", "warning") for each in found)
    if doubted or lab.arena.recipe.diagnostics == "thorough":
        usual += remedies(lab)
        usual += [each for each in [twin_attack(lab)] if each is not None]
    if jumps(lab) and not bool(lab.plain().all()):
        usual += beyond_jumps(lab)
    return [trial(lab, remedy) for remedy in usual]


def seen_before(arena: Arena, shield: Shield) -> list[Finding]:
    """Was a trained attack trained on the very split it is judged on, as far as its file says?

    Returns one warning per such spear of the shield.
    """
    data = arena.recipe.data
    found = {}
    for cell in arena.plan.cells:
        learnt = getattr(cell.attack, "about", {}).get("recipe", {}).get("data", {})
        if cell.shield == shield.label and learnt.get("spec") == data.spec and learnt.get("split") == data.split:
            found[cell.spear] = Finding(
                name="seen_before",
                level="warning",
                shield=shield.label,
                spear=cell.spear,
                sentence=f"{cell.spear} was trained on the {data.split} split of {data.spec} and is judged on it.",
                action="Judge it on another split; on images it was trained on it looks stronger than it is.",
            )
    return list(found.values())


def _laboratories(arena: Arena, shield: Shield) -> Iterator[Laboratory]:
    """Yield a laboratory per norm (at its first radius) and distinct way to get gradients."""
    cells = [cell for cell in arena.plan.cells if cell.shield == shield.label and not cell.spec.surrogate]
    cells = [cell for cell in cells if cell.attack.access == "gradient" and cell.spec.gradient in ("exact", "bpda")]
    first = {(cell.threat.norm, *_way(shield, cell.spec)): cell for cell in reversed(cells)}
    alone = len({key[1:] for key in first}) == 1
    best = max((key[1:] for key in first), key=lambda way: (way[0] == "bpda", way[1]), default=None)
    for key, cell in reversed(first.items()):
        threat = trial_threat(cell.threat, arena.data.x)
        size = THOROUGH if arena.recipe.diagnostics == "thorough" else SUBSET
        twin = bare(shield.model) or next((each.model for each in arena.surrogates.values()), None)
        yield Laboratory(
            shield, threat, arena, cell.spec, None if alone else cell.spear, key[1:] == best, size=size, twin=twin
        )


def _trials(lab: Laboratory) -> tuple[Check, ...]:
    """Return the trials with attacks that make sense under the laboratory's norm."""
    return TRIALS if lab.threat.norm in PGD.norms else (untried,)


def _way(shield: Shield, spec: SpearSpec) -> tuple[str, int]:
    """Return what of a spear's estimator matters for this shield.

    Averaging draws changes nothing without randomness, nor does BPDA where no module has a partner to offer.
    """
    partners = any(hasattr(module, "bpda_partner") for module in shield.model.modules())
    return spec.gradient if partners else "exact", spec.eot if shield.stochastic else 1


def _many(loss: str = "ce") -> Attack[Any]:
    return PGD(steps=STEPS, loss=loss)


def _suspicion(suspect: Tensor, expected: Tensor, tries: int = 1) -> tuple[str, int, int]:
    """Return the level and the counts for a suspect attack that ought not to be the stronger, the best of `tries`."""
    only, other, p = stronger(suspect, expected)
    # Bonferroni: the best of several is expected to win by something.
    if p * tries < 0.05:
        return "alarm", only, other
    return ("note" if only >= 2 and only > other else "ok"), only, other


def untried(lab: Laboratory) -> Finding:
    """Say that the trials with PGD were left out, for a norm in which it does not search."""
    norm = lab.threat.norm
    sentence = f"PGD does not search in {norm}, so only the gradients were looked at, no trial attacks were run"
    action = f"Add a threat in linf, l2 or l1 to the recipe: trials there doubt the same gradients as {norm} uses."
    return finding(lab, "trials", "note", sentence, action)


def zero_gradients(lab: Laboratory) -> Finding:
    """Are there samples whose gradient is exactly zero, and is it the loss or the model?"""
    flat = ~(lab.gradients("ce")[0] != 0).any(1)
    count = int(flat.sum())
    if count == 0:
        return finding(lab, "zero_gradient", "ok", "The cross-entropy has a gradient on every sample")
    level = "alarm" if 2 * count >= lab.n else "warning" if 20 * count >= lab.n else "note"
    dead = int((flat & ~(lab.gradients("margin")[0] != 0).any(1)).sum())
    if dead < count:
        sentence = f"The cross-entropy's gradient is exactly zero on {count} samples, the margin's on {dead}"
        return finding(lab, "zero_gradient", level, sentence, "Attack with loss dlr or margin, not cross-entropy.")
    sentence = f"Every gradient is exactly zero on {count} samples"
    return finding(lab, "zero_gradient", level, sentence, _ADAPT)


def draws_agree(lab: Laboratory) -> Finding | None:
    """Do two gradient estimates of a stochastic shield point the same way?"""
    if not lab.shield.stochastic:
        return None
    first, second = lab.gradients("ce", times=2, whole=True)
    cosine = float(torch.nn.functional.cosine_similarity(first, second, dim=1).mean())
    draws = lab.spec.eot
    sentence = f"Two gradient estimates of {draws} draws each have a mean cosine of {cosine:.2f}"
    level = "ok" if cosine >= 0.5 else "note" if cosine >= _DISAGREE else "warning"
    return finding(lab, "eot_agreement", level, sentence, f"Raise eot above {draws} until the draws agree.")


def eps_zero(lab: Laboratory) -> Finding:
    """Does an adversary who may change nothing get the clean accuracy?"""
    clean = lab.n - int(lab.clean_wrong().sum())
    control = lab.n - int(lab.fell(_many(), eps=0.0).sum())
    measured = rate(control, lab.n)
    good = control == clean if not lab.shield.stochastic else measured.low <= clean / lab.n <= measured.high
    sentence = f"With eps = 0 {control} samples stand, of {clean} that are right without an attack"
    action = "Do not trust the robust accuracy: draws are counted as attacks; use more verdict draws."
    return finding(lab, "eps_zero", "ok" if good else "alarm", sentence, action)


def unconstrained(lab: Laboratory) -> Finding:
    """Does everything fall when the whole box is allowed?"""
    eps = everything(lab.threat, lab.x)
    standing = lab.n - int(lab.fell(PGD(steps=2 * STEPS), eps=eps).sum())
    level = "ok" if standing == 0 else "alarm" if 10 * standing > lab.n else "warning"
    sentence = f"With every input allowed {standing} samples still stand against {2 * STEPS} steps"
    return finding(lab, "unconstrained", level, sentence, f"The search is misled. {_ADAPT}")


def monotone(lab: Laboratory) -> Finding:
    """Does a larger radius fell at least as many?"""
    eps = lab.threat.eps
    radii = [eps / 2, eps, min(2 * eps, everything(lab.threat, lab.x))]
    fell = [lab.plain() if radius == eps else lab.fell(_many(), eps=radius) for radius in radii]
    counts = ", ".join(f"{int(each.sum())} at {format_radius(eps)}" for each, eps in zip(fell, radii, strict=True))
    levels = [_suspicion(small, large)[0] for small, large in itertools.pairwise(fell)]
    level = "alarm" if "alarm" in levels else "note" if "note" in levels else "ok"
    action = "A larger radius must not help the defence: raise the steps, then suspect masked gradients."
    return finding(lab, "monotone", level, f"Samples felled by radius: {counts}", action)


def one_step(lab: Laboratory) -> Finding:
    """Is one step stronger than many?"""
    level, only, other = _suspicion(lab.fell(FGSM()), lab.plain())
    sentence = f"One step fells {only} samples that {STEPS} steps leave standing, and misses {other}"
    action = f"Iterating should help: lower the step size, add restarts, and suspect masked gradients. {_ADAPT}"
    return finding(lab, "one_step", level, sentence, action)


def black_box(lab: Laboratory) -> Finding:
    """Is an attack without gradients stronger than one with them?"""
    blind = blind_attack(lab, _QUERIES)
    level, only, other = _suspicion(lab.fell(blind), lab.plain())
    sentence = f"Without gradients {blind.name} fells {only} samples that PGD leaves standing, and misses {other}"
    return finding(lab, "black_box", level, sentence, f"The gradients mislead. {_ADAPT}")


def loss_gap(lab: Laboratory) -> Finding:
    """Does a margin loss see what cross-entropy does not?"""
    level, only, other = _suspicion(lab.fell(_many("dlr")), lab.plain())
    sentence = f"The DLR loss fells {only} samples that cross-entropy leaves standing, and misses {other}"
    action = "Cross-entropy is blind here: attack with loss dlr or margin, or with autoattack."
    return finding(lab, "loss_gap", level, sentence, action)


def logit_scale(lab: Laboratory) -> Finding:
    """Does dividing the logits by a constant, which changes no decision, make the attack stronger?"""
    best = best_temperature(lab)
    level, only, other = _suspicion(lab.fell(_many(), temperature=best), lab.plain(), len(_TEMPERATURES))
    sentence = f"Attacking f / {best:g} fells {only} samples that attacking f leaves standing, and misses {other}"
    action = "The scale of the logits hides gradients: attack with loss dlr or margin, or divide the logits."
    return finding(lab, "logit_scale", level, sentence, action)


def best_temperature(lab: Laboratory) -> float:
    """Return the temperature, of a sweep over four powers of ten, at which PGD fells most."""
    fell = {value: lab.fell(_many(), temperature=value) for value in _TEMPERATURES}
    return max(fell, key=lambda value: int(fell[value].sum()))


Check = Callable[[Laboratory], Finding | None]
LOOKS: tuple[Check, ...] = (zero_gradients, draws_agree, finite_differences)
TRIALS: tuple[Check, ...] = (
    eps_zero,
    unstable,
    incomplete,
    unconstrained,
    monotone,
    one_step,
    black_box,
    loss_gap,
    logit_scale,
    silent_success,
)
