"""What `maodun harden` prints: before, the epochs, after, and how to use what it made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from maodun.app.consoles import console
from maodun.app.endings import Interrupted
from maodun.app.flags import parse_options, parse_radii, wrong

if TYPE_CHECKING:
    from maodun.arena.harden import Measure


def harden(
    model: str,
    data: str,
    out: str,
    *,
    eps: str,
    weights: str | None,
    model_option: list[str] | None,
    resume: bool,
    quiet: bool,
    **plan: Any,
) -> None:
    """Harden `model` on `data` into the folder `out`; epochs go to standard error, both measures to standard output."""
    from maodun.arena import harden as room

    radii = parse_radii(eps)
    if len(radii) != 1:
        raise wrong(f"eps '{eps}'", "hardening takes one radius", "give one, as 8/255")
    if not 0 < radii[0] < float("inf"):
        raise wrong(f"eps '{eps}'", "is no ball to harden against", "give a finite radius above 0, as 8/255")
    watch, say = console(error=True), console()

    def epoch(line: dict[str, float]) -> None:
        if not quiet:
            watch.print("  ".join(f"{key} {value:.4g}" for key, value in line.items()))

    def measured(when: str, measure: Measure) -> None:
        if quiet:
            return
        clean, robust = (
            f"{100 * each.value:.1f} % [{100 * each.low:.1f}, {100 * each.high:.1f}]"
            for each in (measure.clean, measure.robust)
        )
        attack = plan.get("attack", "sharp")
        say.print(f"{when}: clean {clean}, under {attack} {robust}, n = {measure.robust.n}", soft_wrap=True)

    options = parse_options(model_option or [], thing="--model-option")
    try:
        made = room.harden(
            model, data, room.Hardening(eps=radii[0], **plan), out, weights=weights, options=options,
            on_epoch=epoch, on_measure=measured, resume=resume,
        )  # fmt: skip
    except KeyboardInterrupt:
        raise Interrupted(f"what was done is kept in {out}, the same command line resumes") from None
    if not quiet:
        say.print(f"{made.weights}  (use it as --model {model} --weights {made.weights})", soft_wrap=True)
