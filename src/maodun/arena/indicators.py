"""Indicators of attack failure that need no further attack: what gradients, draws and traces say of the search.

After Pintor et al. (NeurIPS 2022), whose six indicators are: unavailable gradients (zero_gradient, in diagnostics),
unstable predictions, silent success, incomplete optimisation, transfer failure (twin, in diagnostics) and failure
without a bound (unconstrained, in diagnostics). Thresholds are theirs where they name one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maodun.arena.laboratory import STEPS, Laboratory
from maodun.arena.summary import Finding
from maodun.core.geometry import per_sample
from maodun.core.known import KnownDraw
from maodun.core.losses import margin
from maodun.core.oracle import Oracle, Session, is_stochastic
from maodun.core.streams import Stream

_PROBES = 16
_DIRECTIONS = 3
_STEP_SHARES = (1 / 1024, 1 / 128, 1 / 16)
_TOLERANCE = 0.2
_LOCAL = 0.25
_UNSTABLE = 0.5
_MOVED = 0.05


def finding(lab: Laboratory, name: str, level: str, sentence: str, action: str = "") -> Finding:
    """Return a finding; a set-up that passes needs no action."""
    return Finding(
        name=name,
        level=level,
        shield=lab.shield.label,
        spear=lab.spear,
        sentence=f"{sentence} ({lab.threat.norm}, n = {lab.n}).",
        action="" if level == "ok" else action,
    )


def open_session(lab: Laboratory) -> tuple[Oracle, Session]:
    """Return an oracle on the shield in one known draw, so that it is a fixed function, and a session on the subset."""
    shield, seed = lab.shield, lab.arena.recipe.seed
    model = KnownDraw(shield.model, seed) if shield.stochastic else shield.model
    size = lab.arena.recipe.compute.batch_size
    own = getattr(lab.estimator, "inner", lab.estimator)
    oracle = Oracle(model, gradient=own, stochastic=shield.stochastic, batch_size=size)
    return oracle, oracle.session(lab.x, lab.ids, seed, lab.y)


def agreement(lab: Laboratory) -> list[tuple[float, float]]:
    """Return (step, share) pairs: on what share of slopes the gradient and central differences of that step agree.

    Measured once per laboratory.

    Slopes are those of the margin near the clean inputs (noise of an eighth of the radius, drawn in from the box's
    walls by the largest step), along the gradient's steepest direction and two random sign directions. Two slopes agree
    when they differ by at most a fifth of the larger; two zeros do not agree, for nothing has been seen.
    """
    if not lab.slopes:
        lab.slopes += _agreement(lab)
    return lab.slopes


def jumps(lab: Laboratory) -> bool:
    """Tell whether the gradient says nothing of a step of a sixteenth of the radius, well as it may fit a tiny one.

    So it is where the answer jumps from point to point (k-winners-take-all), and then the many small jumps, which no
    gradient sees, are most of the slope. Smooth networks with somebody left standing agree on three fifths and more.
    """
    if lab.shield.stochastic:
        return False
    return agreement(lab)[-1][1] < _LOCAL


def _agreement(lab: Laboratory) -> list[tuple[float, float]]:
    steps = [share * min(lab.threat.eps, 1.0) for share in _STEP_SHARES]
    if lab.threat.norm != "linf":
        size = float(lab.x[0].numel())
        steps = [step / (size**0.5 if lab.threat.norm == "l2" else size) for step in steps]
    oracle, session = open_session(lab)
    rows = torch.arange(lab.n, device=lab.x.device)
    stream = Stream(lab.arena.recipe.seed, "diagnostics/directions")
    # Plain backgrounds tie in every pooling window, and at a tie there is no slope: a little noise parts them.
    away = 2.0 * max(steps) * (2.0 * stream.uniform(lab.ids, tuple(lab.x.shape[1:])).to(lab.x) - 1.0)
    base = (lab.x + away).clamp(max(steps), 1.0 - max(steps))

    def heads(logits: Tensor, at: Tensor) -> Tensor:
        return margin(logits, lab.y[at]).unsqueeze(1)

    with oracle.ready():
        gradient = session.estimate(base, rows, heads)[2][0]
        lines = [gradient.sign()]
        lines += [stream.signs(lab.ids, tuple(lab.x.shape[1:]), turn).to(base) for turn in range(1, _DIRECTIONS)]
        shares = []
        for step in steps:
            agree = []
            for line in lines:
                known = (gradient * line).flatten(1).sum(1)
                ahead, behind = (session.logits(base + turn * step * line, rows) for turn in (1.0, -1.0))
                seen = (margin(ahead, lab.y) - margin(behind, lab.y)) / (2.0 * step)
                larger = torch.maximum(known.abs(), seen.abs())
                agree.append(((known - seen).abs() <= _TOLERANCE * larger) & (larger > 0))
            shares.append((step, float(torch.stack(agree).float().mean())))
    lab.forwards += int(session.meter.forwards.sum())
    lab.backwards += int(session.meter.backwards.sum())
    return shares


def finite_differences(lab: Laboratory) -> Finding | None:
    """Is the gradient the slope?"""
    if lab.shield.stochastic and not is_stochastic(lab.shield.model):
        # Randomness that cannot be held fixed: the slope of one draw is not to be had.
        return None
    shares = agreement(lab)
    best = max(share for _, share in shares)
    level = "alarm" if best < 0.25 else "warning" if best < 0.5 else "note" if best < 0.75 else "ok"
    told = ", ".join(f"{100 * share:.0f} % at {step:.2g}" for step, share in shares)
    sentence = f"Gradient and finite differences of the margin agree on these shares of slopes by step: {told}"
    action = "The gradient is not the slope: use bpda or straight-through gradients, and trust query attacks more."
    if level == "ok" and shares[-1][1] < _LOCAL:
        level, action = (
            "note",
            "The answer jumps over steps that an attack takes: add restarts and square with 2000 queries.",
        )
    return finding(lab, "finite_differences", level, sentence, action)


def unstable(lab: Laboratory) -> Finding | None:
    """Does the margin jump about around the inputs, so that a gradient at one point says little of the next?

    The mean, over uniform points within half the radius (at most 4/255 in linf), of the margin's change relative to
    itself, capped at 1.
    """
    if lab.shield.stochastic and not is_stochastic(lab.shield.model):
        return None
    radius = lab.threat.eps / 2
    threat = lab.threat.with_eps(min(radius, 4 / 255) if lab.threat.norm == "linf" else radius)
    oracle, session = open_session(lab)
    rows = torch.arange(lab.n, device=lab.x.device)
    stream = Stream(lab.arena.recipe.seed, "diagnostics/unstable")
    with oracle.ready():
        here = margin(session.logits(lab.x, rows), lab.y)
        changes = [
            (margin(session.logits(threat.random_start(lab.x, stream, lab.ids, turn), rows), lab.y) - here).abs()
            for turn in range(_PROBES)
        ]
    lab.forwards += int(session.meter.forwards.sum())
    share = float((torch.stack(changes) / here.abs().clamp(min=1e-12)).clamp(max=1.0).mean())
    level = "note" if share > _UNSTABLE else "ok"
    sentence = f"Random points within half the radius change the margin by {100 * share:.0f} % of itself on average"
    return finding(lab, "unstable", level, sentence, "Average gradients over points nearby, or over more draws (eot).")


def incomplete(lab: Laboratory) -> Finding:
    """Was the loss still rising when the search stopped, on the samples that it left standing?"""
    lab.plain()
    last = lab.trace.history[-1][0] if lab.trace.history else torch.zeros(0, dtype=torch.long)
    if len(lab.trace.history) < STEPS or not len(last):
        sentence = "No sample was left standing whose loss could still have risen"
        return finding(lab, "incomplete", "ok", sentence)
    losses = torch.stack([_at(rows, values, last) for rows, values in lab.trace.history])
    envelope = losses.cummax(0).values
    spread = (losses.amax(0) - losses.amin(0)).clamp(min=1e-12)
    moved = (envelope[-1] - envelope[-1 - STEPS // 4]) > _MOVED * spread
    count = int(moved.sum())
    level = "note" if 2 * count > len(last) >= 4 else "ok"
    sentence = f"On {count} of {len(last)} samples left standing the loss still rose in the last {STEPS // 4} steps"
    return finding(lab, "incomplete", level, sentence, f"Raise the steps above {STEPS}, and look again.")


def _at(rows: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
    """Return the values of the `wanted` rows, all of which are among `rows` (both in rising order)."""
    return values[torch.searchsorted(rows, wanted)]


def silent_success(lab: Laboratory) -> Finding:
    """Did searches believe in successes that the verdict did not grant?

    A success on the way is never lost here: the engine keeps every iterate that fooled the model.
    """
    share = lab.refused / max(1, lab.claimed)
    limit = 0.2 if lab.shield.stochastic else 0.02
    level = "warning" if share > limit and lab.refused > 1 else "ok"
    sentence = f"Of {lab.claimed} successes that the trials believed in, the fresh verdict refused {lab.refused}"
    action = "The search sees another model than the verdict: look for state, or average over more draws."
    return finding(lab, "silent_success", level, sentence, action)


def plane(lab: Laboratory, side: int = 21) -> tuple[int, list[float], list[list[float]]]:
    """Return a slice of the loss surface around one sample: its id, coordinates in radii, margins (side x side).

    Rows go along the gradient's steepest direction, columns along a random sign direction, each from -2 to 2 radii, in
    linf terms (of the l2 or l1 ball a cube of the same length); positive margins are mistakes. The sample is the first
    right one that the plain attack leaves standing, or else the first right one.
    """
    oracle, session = open_session(lab)
    rows = torch.arange(lab.n, device=lab.x.device)
    standing, right = ~lab.plain(), ~lab.clean_wrong()
    order = (2 * (standing & right).int() + right.int()).argmax()
    reach = min(lab.threat.eps, 1.0)
    if lab.threat.norm != "linf":
        size = float(lab.x[0].numel())
        reach /= size**0.5 if lab.threat.norm == "l2" else size
    places = torch.linspace(-2.0, 2.0, side, device=lab.x.device)

    def heads(logits: Tensor, at: Tensor) -> Tensor:
        return margin(logits, lab.y[at]).unsqueeze(1)

    stream = Stream(lab.arena.recipe.seed, "diagnostics/plane")
    with oracle.ready():
        slope = session.estimate(lab.x, rows, heads)[2][0][order].sign()
        other = stream.signs(lab.ids, tuple(lab.x.shape[1:]))[order].to(slope)
        one, two = torch.meshgrid(places, places, indexing="ij")
        points = per_sample(one.flatten(), lab.x) * slope + per_sample(two.flatten(), lab.x) * other
        points = (lab.x[order] + reach * points).clamp(0.0, 1.0)
        at = order.expand(points.shape[0])
        values = margin(session.logits(points, at), lab.y[at])
    lab.forwards += int(session.meter.forwards.sum())
    lab.backwards += lab.n
    return int(lab.ids[order]), places.tolist(), values.reshape(side, side).tolist()
